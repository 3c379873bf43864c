"""torchrun's agent of a node, which starts ranks again in place only where something gets better by it.

What differs from torch's own (2.13):
* A run that ended with a code of its own (FINAL: a mistake, told to stop, ...) is not started again; nor is one that
  failed three times in a row without a new checkpoint in between.
* Where one rank fails the others are killed at once. Torch waits up to 30 s for ranks that wait for the dead one.
* Ranks that are well when machines join or leave get the time to save; torch gives them 30 s.
* Ranks that make no progress (launch/watch.py) leave their stacks, are killed, and are started again.
"""

# torch's own decorators lose the types of what is overridden here.
# pyright: reportIncompatibleVariableOverride=false, reportCallIssue=false
import contextlib
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext

from launch.endings import FINAL, HUNG, STOPPED, describe, read_exit_code, root_cause
from launch.watch import Watch
from pretrain.heartbeat import FOLDER

EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"
MAX_FUTILE = 3  # failures in a row without a new checkpoint
_HUNG_KEY = "pretrain/hung"
_CODE_KEY = "pretrain/exit-code"
_ASK_S = 0.5  # between two looks at what other nodes say
_OTHERS_DUMP_S = 2.0  # in which the other nodes have heard of a hang, and kept their stacks


class Agent(LocalElasticAgent):
    """Reads EXIT_CODE_FILE and the heartbeats' FOLDER from the environment, where `launch.torchrun` has put them."""

    _starting = False
    _held: SignalException | None = None

    @classmethod
    def tell_to_stop(cls) -> None:
        """Raises what ends torch's agent, whose ranks get SIGTERM, the one signal that they have to handle.

        It waits while ranks are being started: until all of them have, torch has none on its list, and would leave
        them behind.
        """
        asked = SignalException("asked to stop", sigval=signal.SIGTERM)
        if not cls._starting:
            raise asked
        cls._held = asked

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._exit_code_file = Path(os.environ[EXIT_CODE_FILE])
        self._heartbeats = Path(os.environ[FOLDER])
        self._watch = Watch(self._heartbeats)
        self._saved_step, self._futile = -1, 0
        self._asked = 0.0
        self._ended = False  # this attempt, by us

    @property
    def _several(self) -> bool:
        """Whether there are other nodes."""
        return (self._worker_group.group_world_size or 1) > 1

    @property
    def _words(self) -> Any:
        """The store that all agents of this attempt share."""
        return self._worker_group.store

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        for path in (self._exit_code_file, Path(f"{self._exit_code_file}.said")):  # of the attempt before
            path.unlink(missing_ok=True)
        self._watch, self._ended = Watch(self._heartbeats), False
        Agent._starting = True
        try:
            started = super()._start_workers(worker_group)
        finally:
            Agent._starting = False
        if Agent._held:
            raise Agent._held
        return started

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._shutdown(signal.SIGTERM, timeout=self._shutdown_timeout)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        pids = {worker.global_rank: worker.id for worker in worker_group.workers}
        if not self._ended and (self._watch.look(pids) or self._another_node_hangs()):
            self._end_hung(pids)
        first = self._kill_what_a_failure_leaves()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            causes = {rank: failure for rank, failure in result.failures.items() if rank in first} or result.failures
            result = dataclasses.replace(result, failures=causes)
            self._decide({rank: failure.exitcode for rank, failure in causes.items()})
        return result

    def _end_hung(self, pids: Mapping[int, int]) -> None:
        """Keeps the stacks of ranks that make no progress, says who holds them up, and kills them."""
        self._watch.look(pids, at_once=True)
        if self._several:
            self._tell(_HUNG_KEY, "1")
        print(f"launch: {self._watch.report(pids)}", file=sys.stderr)
        if self._several:
            time.sleep(_OTHERS_DUMP_S)
        self._exit_code_file.write_text(str(HUNG))
        self._ended = True
        for pid in pids.values():
            kill_session(pid)

    def _kill_what_a_failure_leaves(self) -> set[int]:
        """The ranks that failed by themselves, if any: the others wait for them in vain.

        After a code of the run's own they are left alone: they have heard it too, and clean up.
        """
        assert isinstance(self._pcontext, SubprocessContext)
        processes = {local: handler.proc for local, handler in self._pcontext.subprocess_handlers.items()}
        failed = {local for local, process in processes.items() if process.poll()}
        if failed and read_exit_code(self._exit_code_file) not in FINAL:
            self._ended = True
            for local, process in processes.items():
                if local not in failed:
                    kill_session(process.pid)
        return {self._worker_group.workers[local].global_rank for local in failed}

    def _decide(self, exit_codes: Mapping[int, int]) -> None:
        """Whether ranks that failed are started again, which torch does while restarts remain."""
        code = read_exit_code(self._exit_code_file) or root_cause(exit_codes)
        if self._several and code not in FINAL and (told := self._told(_CODE_KEY)):
            code = int(told)
            self._exit_code_file.write_text(told)
        if self._several and code == STOPPED and self._worker_group.spec.rdzv_handler.num_nodes_waiting() > 0:
            return  # not told to stop by anybody: another node made room for one that joins
        if code in FINAL:
            if self._several:
                self._tell(_CODE_KEY, str(code))
            self._remaining_restarts = 0
        if not self._remaining_restarts:
            return
        self._futile = 1 if self._watch.saved_step > self._saved_step else self._futile + 1
        self._saved_step = max(self._saved_step, self._watch.saved_step)
        why = "hung" if code == HUNG else describe(exit_codes)
        if self._futile > MAX_FUTILE:
            print(f"launch: {MAX_FUTILE} restarts brought no new checkpoint: not started again", file=sys.stderr)
            self._remaining_restarts = 0
        else:
            number = self._worker_group.spec.max_restarts - self._remaining_restarts + 1
            print(f"launch: {why}; restart {number} of at most {self._worker_group.spec.max_restarts}", file=sys.stderr)

    def _tell(self, key: str, value: str) -> None:
        """Leaves a word for the other nodes' agents, if the node that keeps such words still answers."""
        with contextlib.suppress(Exception):
            self._words.set(key, value)

    def _another_node_hangs(self) -> bool:
        if not self._several or time.monotonic() - self._asked < _ASK_S:
            return False
        self._asked = time.monotonic()
        return bool(self._told(_HUNG_KEY))

    def _told(self, key: str) -> str:
        with contextlib.suppress(Exception):
            if self._words.check([key]):
                return self._words.get(key).decode()
        return ""


def kill_session(pid: int) -> None:
    """Kills a rank and its data workers: each rank leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)

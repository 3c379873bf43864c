"""torchrun with manners: `python -m launch.torchrun` takes torchrun's arguments, numbers where it wants numbers.

Three things differ, each because of what plain torchrun does (tried with torch 2.13):

* Signals. A third SIGTERM, which Slurm does send, makes torchrun leave at once and abandon the ranks it was
  waiting for, and a SIGUSR1 kills it and leaves them running. Here the first signal asks every rank to save
  and stop, whatever signal it was, and later ones change nothing, except a second Ctrl-C, which kills.
* Exit codes. torchrun turns every failure into 1. Here the run's own code comes back: the one that a rank
  wrote to the file named by PRETRAIN_EXIT_CODE_FILE, else that of the rank which failed.
* The last words. torchrun ends with some forty lines of its own; here one line says which rank failed and how,
  and the rank's message stays in sight above it.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from launch.environment import count_cores, count_gpus, missing, variables

EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"

MEANINGS = {
    3: "no valid checkpoint, or one of another run",
    4: "the configuration or the data needs mending, see the message above",
    5: "too many bad steps",
    7: "the layout does not take the steps of one process",
    85: "saved what there was; the same command goes on from there",
}


def main(argv: Sequence[str]) -> int:
    """Run torchrun's agent in this process and return the run's exit code."""
    arguments = parse_args(list(argv))
    # torch insists on handling one signal at least: one that nobody sends, so that it leaves ours alone.
    arguments.signals_to_handle = "SIGUSR2"
    for name in ("multiprocessing.api", "agent.server.api"):  # what they say of a failure, describe() says
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        exit_code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, f"{folder}/exit-code"))
        os.environ.update(missing(environment_for(arguments.nproc_per_node, arguments.nnodes), os.environ))
        stop_once()
        try:
            run(arguments)
            return 0
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code, reason = root_cause(exit_codes), describe(exit_codes)
        except SignalException as error:
            code, reason = 128 + error.sigval, "stopped as asked"
        code = read_exit_code(exit_code_file) or code
    print(f"launch: {reason}; exit code {code}" + explain(code), file=sys.stderr)
    return code


def environment_for(nproc_per_node: str, nnodes: str) -> dict[str, str]:
    """Fill in the environment from torchrun's own arguments."""
    return variables(processes=int(nproc_per_node), gpus=count_gpus(os.environ), cores=count_cores(), nodes=int(nnodes))


def stop_once() -> None:
    """Make the first signal stop the run in good order, and a second Ctrl-C at once."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

    def stop(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        signal.signal(signal.SIGINT, kill_ranks)
        print(
            f"launch: {signal.Signals(number).name}: the ranks save and stop (Ctrl-C again kills them)",
            file=sys.stderr,
        )
        # The ranks get SIGTERM whatever came: the one signal that they have to handle.
        raise SignalException("asked to stop", sigval=signal.SIGTERM)

    for each in signals:
        signal.signal(each, stop)


def kill_ranks(number: int, frame: object) -> None:
    """Kill the ranks; each leads a session of its own, so its data workers go with it."""
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)


def read_exit_code(path: Path) -> int | None:
    """Read the code that a rank left, if it is one of ours."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() and int(text) in MEANINGS else None


def root_cause(exit_codes: Mapping[int, int]) -> int:
    """Pick the exit code, negative for a signal, that explains the others, as a shell would give it.

    When one rank dies the others lose their connection and end with 1, or are stopped with SIGTERM.
    """
    uninteresting = (1, -signal.SIGTERM)
    first = sorted(exit_codes.values(), key=lambda code: code in uninteresting)[0]
    return 128 - first if first < 0 else first


def describe(exit_codes: Mapping[int, int]) -> str:
    """Say in one line which ranks ended how, leaving out those that were stopped because another failed."""
    causes = {rank: code for rank, code in exit_codes.items() if code != -signal.SIGTERM} or exit_codes
    ranks: dict[int, list[str]] = {}
    for rank, code in sorted(causes.items()):
        ranks.setdefault(code, []).append(str(rank))
    ends = []
    for code, which in ranks.items():
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        ends.append(f"{'ranks' if len(which) > 1 else 'rank'} {', '.join(which)} {end}")
    return "; ".join(ends)


def explain(code: int) -> str:
    """Say what the user can do about it."""
    if code == 128 + signal.SIGKILL:
        return " (out of memory is the usual reason)"
    return f" ({MEANINGS[code]})" if code in MEANINGS else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

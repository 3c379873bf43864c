"""torchrun with manners: `python -m launch.torchrun` takes torchrun's arguments, all of them.

Some things differ, each because of what plain torchrun does (tried with torch 2.13):

* Signals. A third SIGTERM, which Slurm does send, makes torchrun leave at once and abandon the ranks it was
  waiting for, and a SIGUSR1 kills it and leaves them running. Here the first signal asks every rank to save
  and stop, whatever signal it was, and later ones change nothing, except a person's second Ctrl-C, which kills. One
  that is ignored when the run starts, as SIGHUP is by nohup, stays ignored.
* Restarts. Those in place (--max-restarts) come up, and happen where something gets better by them: launch/agent.py.
* Hangs. Ranks that make no progress leave their stacks and are started again: launch/watch.py.
* Exit codes. torchrun turns every failure into 1. Here the run's own code comes back: the one that a rank
  wrote to the file named by PRETRAIN_EXIT_CODE_FILE, else that of the rank which failed.
* The last words. torchrun ends with some forty lines of its own; here one line says which rank failed and how,
  and the rank's message stays in sight above it.
"""

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api as torch_launcher
from torch.distributed.run import (
    config_from_args,
    determine_local_world_size,
    parse_args,
    parse_min_max_nnodes,
    run,
)

from data_pipelines.errors import UserError
from launch.agent import EXIT_CODE_FILE, Agent, kill_session
from launch.endings import describe, explain, read_exit_code, root_cause
from launch.environment import count_cores, count_gpus, missing, variables
from pretrain.heartbeat import FOLDER as HEARTBEATS
from pretrain.stopping import REPEAT_S
from pretrain.time_limit import STARTED


def main(argv: Sequence[str]) -> int:
    """Run torchrun's agent in this process and return the run's exit code."""
    arguments = parse_args(list(argv))
    try:
        os.environ.update(missing(environment_for(arguments.nproc_per_node, arguments.nnodes), os.environ))
        config_from_args(arguments)  # torchrun's own objections, which it would raise in a traceback
    except (UserError, ValueError, AssertionError) as error:
        print(f"launch: {str(error).rstrip('.')}.", file=sys.stderr)
        return 2
    if (gpus := count_gpus(os.environ)) and not torch.cuda.is_available():
        print(
            f"launch: {gpus} GPUs are here, and torch {torch.__version__} cannot use them: the run is on the CPU; for "
            f"GPUs install torch's CUDA build, and NVIDIA's driver",
            file=sys.stderr,
        )
    # torch insists on handling one signal at least: one that nobody sends, so that it leaves ours alone.
    arguments.signals_to_handle = "SIGUSR2"
    for name in ("multiprocessing.api", "agent.server.api"):  # what they say of a failure, describe() says
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)

    with tempfile.TemporaryDirectory(prefix="launch-") as folder:  # on this node: heartbeats go there all the time
        exit_code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, f"{folder}/exit-code"))
        os.environ |= {HEARTBEATS: folder, STARTED: str(time.time())}
        torch_launcher.LocalElasticAgent = Agent  # pyright: ignore (torch has no other way to name one)
        stop_once()
        try:
            run(arguments)
            return 0
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code, reason = root_cause(exit_codes), describe(exit_codes)
        except SignalException as error:
            code, reason = 128 + error.sigval, "stopped as asked"
        except RendezvousClosedError:
            code, reason = 1, "the run has ended on another machine, which says why"
        except RendezvousError:
            code, place = 1, arguments.rdzv_endpoint or "the first of them"
            reason = (
                f"the {arguments.nnodes} machines did not meet at {place}: see that it is reached from all of them, "
                f"that its port is free, and that the run was started on each"
            )
        code = read_exit_code(exit_code_file) or code
    print(f"launch: {reason}; exit code {code}" + explain(code), file=sys.stderr)
    return code


def environment_for(nproc_per_node: str, nnodes: str) -> dict[str, str]:
    """Fill in the environment from torchrun's own arguments, with a word where it takes words.

    Raises:
        UserError: they say no number of processes, or of nodes.
    """
    try:
        processes = determine_local_world_size(nproc_per_node)
    except ValueError:  # a word that is none of torchrun's, or gpu where torch finds no GPU
        processes = 0
    if processes < 1:
        raise UserError(
            f"--nproc-per-node {nproc_per_node} starts no process here: give a number, cpu, auto, or gpu where torch "
            f"finds a GPU."
        )
    try:
        fewest, most = parse_min_max_nnodes(nnodes)
    except (ValueError, RuntimeError):
        fewest = most = 0
    if not 1 <= fewest <= most:
        raise UserError(f"--nnodes {nnodes} is no number of machines: give one, or FEWEST:MOST, such as 1:2.")
    return variables(processes=processes, gpus=count_gpus(os.environ), cores=count_cores(), nodes=most)


def stop_once() -> None:
    """Make the first signal stop the run in good order, and a Ctrl-C that comes REPEAT_S after it at once."""
    known = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    signals = [each for each in known if signal.getsignal(each) != signal.SIG_IGN]
    told: list[float] = []

    def stop(number: int, frame: object) -> None:
        if told:
            if number == signal.SIGINT and time.monotonic() - told[0] >= REPEAT_S:
                for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    kill_session(int(pid))
            return
        told.append(time.monotonic())
        print(
            f"launch: {signal.Signals(number).name}: the ranks save and stop (Ctrl-C again kills them)",
            file=sys.stderr,
        )
        Agent.tell_to_stop()

    for each in signals:
        signal.signal(each, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""torchrun with manners: `python -m launch.torchrun` takes torchrun's arguments, all of them.

Three things differ, each because of what plain torchrun does (tried with torch 2.13):

* Signals. A third SIGTERM, which Slurm does send, makes torchrun leave at once and abandon the ranks it was
  waiting for, and a SIGUSR1 kills it and leaves them running. Here the first signal asks every rank to save
  and stop, whatever signal it was, and later ones change nothing, except a second Ctrl-C, which kills. One that is
  ignored when the run starts, as SIGHUP is by nohup, stays ignored.
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

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import (
    config_from_args,
    determine_local_world_size,
    parse_args,
    parse_min_max_nnodes,
    run,
)

from data_pipelines.errors import UserError
from launch.environment import count_cores, count_gpus, missing, variables

EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"

MEANINGS = {
    3: "no valid checkpoint, or one of another run",
    4: "the config, the data or the disk needs mending, see the message above",
    5: "too many bad steps",
    7: "the layout does not take the steps of one process",
    8: "another job owns the run's folder now",
    85: "saved what there was; the same command goes on from there",
}


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

    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        exit_code_file = Path(os.environ.setdefault(EXIT_CODE_FILE, f"{folder}/exit-code"))
        stop_once()
        try:
            run(arguments)
            return 0
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code, reason = root_cause(exit_codes), describe(exit_codes)
        except SignalException as error:
            code, reason = 128 + error.sigval, "stopped as asked"
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
    """Make the first signal stop the run in good order, and a second Ctrl-C at once."""
    known = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
    signals = [each for each in known if signal.getsignal(each) != signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        for each in signals:
            signal.signal(each, kill_ranks if each == signal.SIGINT else signal.SIG_IGN)
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
    if code == 128 + signal.SIGTERM:
        return " (stopped before it could save; the newest checkpoint, if there is one, stays)"
    return f" ({MEANINGS[code]})" if code in MEANINGS else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

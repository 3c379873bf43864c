"""`python -m pretrain train|evaluate|checkpoints|doctor`: the command line.

Exit codes: 0 done, 3 no valid checkpoint, or one of another run, 4 configuration, data or disk, 5 too many bad steps, 7
a layout that does not equal one process, 8 another job owns the run's folder now, 85 stopped as asked, and saved what
there was to save.
"""

import argparse
import faulthandler
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from data_pipelines.errors import UserError
from data_pipelines.help_text import HelpFormatter, examples
from data_pipelines.redaction import redacted
from pretrain.errors import StoppedError
from pretrain.screen import forget_unsaid
from pretrain.stopping import Interrupted, Stop

_EXIT_CODE_FILE = "PRETRAIN_EXIT_CODE_FILE"  # set by the launcher, to which torchrun would say 1 whatever happened


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `command` is train, evaluate, checkpoints or doctor."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Trains and evaluates vision-language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train a config; start it with torchrun or `python -m launch local`",
        description="Trains a config on the processes that torchrun started, or on this one. The same command goes on "
        "with a run that was stopped.",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m launch local configs/small.yaml training.steps=1000",
            "torchrun --nproc-per-node 8 -m pretrain train configs/base.yaml",
            "python -m pretrain train configs/demo.yaml engine.zero_stage=0",
        ),
    )
    train.add_argument("config", type=Path, help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")

    evaluate = commands.add_parser(
        "evaluate",
        help="retrieval, zero-shot, matching, masked-LM and captioning accuracy of a run",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m pretrain evaluate runs/base",
            "python -m pretrain evaluate runs/base --split data/flickr/manifest.json --rerank 32",
        ),
    )
    evaluate.add_argument("run", type=Path, help="the run's output folder")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as data.tokenizer=PATH in a moved run"
    )
    evaluate.add_argument("--split", default="heldout", help="heldout (data.heldout), or another manifest")
    evaluate.add_argument("--step", type=int, help="of the checkpoint; without it the newest valid one")
    evaluate.add_argument("--rerank", type=int, default=16, help="candidates that matching ranks again, 0 for none")

    checkpoints = commands.add_parser(
        "checkpoints",
        help="list a run's checkpoints, verify, prune, pin and compare them",
        description="Lists a run's checkpoints; exits with 3 if one of them is not valid.",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m pretrain checkpoints runs/base",
            "python -m pretrain checkpoints runs/base --verify",
            "python -m pretrain checkpoints runs/base --prune --keep 2",
            "python -m pretrain checkpoints runs/base --diff 1000 runs/other/checkpoints/step-000001000",
        ),
    )
    checkpoints.add_argument("run", type=Path, help="the run's output folder")
    action = checkpoints.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="hash every byte; without it, sizes are compared")
    action.add_argument("--prune", action="store_true", help="remove what the run's own rule does not keep")
    action.add_argument("--pin", type=int, metavar="STEP", help="let this one stay whatever comes after it")
    action.add_argument("--unpin", type=int, metavar="STEP", help="no longer")
    action.add_argument("--diff", nargs=2, metavar=("A", "B"), help="in what two differ, each a step or a folder")
    checkpoints.add_argument("--keep", type=int, metavar="N", help="with --prune: instead of the run's checkpoint.keep")

    doctor = commands.add_parser(
        "doctor",
        help="compare a config's layout with one process, and measure ranks and links; start it with torchrun",
        description="Trains a small copy of the config on made-up samples, as the config lays it out and in one "
        "process, compares losses and gradient norms, and measures links and processors. Exits with 7 on a difference.",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m launch local configs/base.yaml --doctor",
            "torchrun --nproc-per-node 8 -m pretrain doctor configs/base.yaml engine.tensor_parallel=2",
        ),
    )
    doctor.add_argument("config", type=Path, help="a YAML file; its data need not exist")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="such as engine.tensor_parallel=2")
    return parser


def main() -> None:
    sys.excepthook = _show_fault
    words = parser()
    arguments, rest = words.parse_known_args()
    takes_overrides = "overrides" in arguments
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or not takes_overrides]:
        words.error(f"unrecognized arguments: {' '.join(unknown)}")
    if takes_overrides:
        arguments.overrides += rest  # argparse takes those behind an option for something else
    elif arguments.keep is not None and (arguments.keep < 1 or not arguments.prune):
        words.error(f"--keep {arguments.keep} is for --prune, and 1 or more")
    try:
        # Imported late: the other command's half of the toolkit, and torch for a wrong argument, are not needed.
        if arguments.command == "train":
            stop = Stop()
            with stop.interrupting():
                from pretrain import train as train_module

            train_module.main(arguments.config, arguments.overrides, stop)
        elif arguments.command == "checkpoints":
            from pretrain import checkpoints as checkpoints_module

            checkpoints_module.main(arguments)
        elif arguments.command == "doctor":
            from pretrain import doctor as doctor_module

            doctor_module.main(arguments.config, arguments.overrides)
        else:
            from pretrain import evaluate as evaluate_module

            evaluate_module.main(
                arguments.run, arguments.split, arguments.rerank, step=arguments.step, overrides=arguments.overrides
            )
    except UserError as error:
        _leave(error)
    except Interrupted:
        _leave(StoppedError("Told to stop before the first step: there is nothing to save. Start again when you like."))
    except Exception:
        # A rank that loses its connection to one that ended with a sentence of its own has nothing to add.
        if (code := _exit_code_of_another_rank()) is None:
            raise
        sys.exit(code)
    finally:
        forget_unsaid()


def _show_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback as Python prints it, without the secrets that a message may repeat."""
    with suppress(OSError):
        print(redacted("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="", flush=True)


def _leave(error: UserError) -> None:
    """Prints one sentence, once, and ends: other ranks may wait for this one in a collective."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on a launcher may end it
    if path := os.environ.get(_EXIT_CODE_FILE):
        Path(path).write_text(str(error.exit_code))
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(2)  # the main rank goes first, if it met an error too
    if _first_to_speak(path):
        with suppress(OSError):
            print(error, file=sys.stderr, flush=True)
    # Exit handlers end the data workers. A communication library that hangs in its own is not waited for.
    faulthandler.dump_traceback_later(20, exit=True)
    sys.exit(error.exit_code)


def _first_to_speak(path: str | None) -> bool:
    try:
        if path:
            Path(f"{path}.said").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _exit_code_of_another_rank() -> int | None:
    path = os.environ.get(_EXIT_CODE_FILE)
    for _ in range(30 if path else 0):
        if path and Path(path).exists() and (text := Path(path).read_text()):
            return int(text)
        time.sleep(0.1)
    return None


if __name__ == "__main__":
    main()

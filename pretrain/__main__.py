"""`python -m pretrain train|evaluate`: the command line.

Exit codes: 0 done, 3 no valid checkpoint, 4 configuration or data, 5 too many bad steps.
"""

import argparse
import os
import sys
import threading
import time
from pathlib import Path

from data_pipelines.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain", description="Trains and evaluates vision-language models."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a config; start it with torchrun or `python -m launch local`")
    train.add_argument("config", type=Path, help="a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")

    evaluate = commands.add_parser("evaluate", help="retrieval, zero-shot, matching and masked-LM accuracy of a run")
    evaluate.add_argument("run", type=Path, help="the run's output folder")
    evaluate.add_argument("--split", default="heldout", help="heldout (data.heldout), or another manifest")
    evaluate.add_argument("--rerank", type=int, default=16, help="candidates that matching ranks again (default 16)")
    arguments = parser.parse_args()

    try:
        # Imported late: the other command's half of the toolkit, and torch for a wrong argument, are not needed.
        if arguments.command == "train":
            from pretrain import train as train_module

            train_module.main(arguments.config, arguments.overrides)
        else:
            from pretrain import evaluate as evaluate_module

            evaluate_module.main(arguments.run, arguments.split, arguments.rerank)
    except UserError as error:
        _leave(error)


def _leave(error: UserError) -> None:
    """Prints one sentence, once, and ends: other ranks may wait for this one in a collective."""
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(2)  # the main rank met the same error, prints it and takes this one down; or it did not
    print(error, file=sys.stderr, flush=True)
    if path := os.environ.get("PRETRAIN_EXIT_CODE_FILE"):
        Path(path).write_text(str(error.exit_code))
    # Exit handlers end the data workers; a communication library that does not end by itself is not waited for.
    last_resort = threading.Timer(10, os._exit, [error.exit_code])
    last_resort.daemon = True
    last_resort.start()
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

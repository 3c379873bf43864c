"""The command line: `python -m launch --help`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.help_text import HelpFormatter, examples


def parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `command` is local or plan."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start a run, or plan one.")
    commands = parser.add_subparsers(dest="command", required=True)

    local = commands.add_parser(
        "local",
        help="train on this machine",
        description="Train on this machine: one process per GPU, or two on the CPU when there is none. The same "
        "command goes on with a run that was stopped.",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m launch local configs/small.yaml data.workers=4 optimizer.learning_rate=1e-4",
            "python -m launch local configs/base.yaml --doctor engine.tensor_parallel=2",
        ),
    )
    local.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML file")
    local.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    local.add_argument("--nproc", type=positive, metavar="N", help="number of processes")
    local.add_argument("--doctor", action="store_true", help="compare the layout with one process, and do not train")
    local.add_argument("--dry-run", action="store_true", help="print the command and stop")

    plan = commands.add_parser(
        "plan",
        help="predict memory, communication and time of a run, and the best layouts",
        description="Predict what a run needs on a cluster and how long it takes, without a GPU. "
        "Exits with 0 if the run is possible and fits, else with 4.",
        formatter_class=HelpFormatter,
        epilog=examples(
            "python -m launch plan configs/base.yaml --gpus-per-node 4 --gpu a100",
            "python -m launch plan configs/huge.yaml --nodes 512 engine.tensor_parallel=4",
            "python -m launch plan --compare runs/base",
        ),
    )
    plan.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="the run's YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    plan.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines")
    plan.add_argument("--gpus-per-node", type=positive, default=8, metavar="M", help="GPUs of a machine")
    plan.add_argument(
        "--gpu",
        default="h100",
        metavar="GPU",
        help="h100, h200, a100, or NAME:TFLOPS:GIB:NVLINK_GB_S:NETWORK_GB_S",
    )
    plan.add_argument("--vocabulary", type=positive, metavar="N", help="tokens, if there is no tokenizer yet")
    plan.add_argument("--compare", type=Path, metavar="RUN", help="output folder of a run to compare with")
    plan.add_argument("--json", action="store_true", help="for a program instead of a person")
    return parser


def main(argv: Sequence[str]) -> int:
    words = parser()
    # argparse gives up on positional arguments that follow an option: `local CONFIG --nproc 4 key=value`.
    arguments, late = words.parse_known_args(argv)
    for word in late:
        if re.match(r"--[a-z_]+\.", word):
            words.error(f"{word} is an override, which has no dashes: write {word.lstrip('-')}")
        if word.startswith("-"):
            words.error(f"unknown option {word}")
    overrides = [*arguments.overrides, *late]

    # Imported this late so that --help need not wait for the config's own imports, nor a run for the planner's.
    from data_pipelines.errors import UserError

    try:
        if arguments.command == "plan":
            from launch.hardware import find_gpu
            from launch.plan import Cluster
            from launch.plan_report import run_plan

            return run_plan(
                arguments.config,
                overrides,
                Cluster(arguments.nodes, arguments.gpus_per_node, find_gpu(arguments.gpu)),
                vocabulary=arguments.vocabulary,
                run=arguments.compare,
                as_json=arguments.json,
            )
        from launch.local import run_local

        command = "doctor" if arguments.doctor else "train"
        run_local(arguments.config, overrides, arguments.nproc, arguments.dry_run, command)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def positive(text: str) -> int:
    """Read a count of processes, machines, GPUs or tokens."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Predict what a run needs on a cluster and how long it takes, without a GPU. Exits with 0 if the run is possible and
fits, else with 4.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from launch.commands import positive

HELP = "predict memory, communication and time of a run, and the best layouts"
EXAMPLES = (
    "configs/base.yaml --gpus-per-node 4 --gpu a100",
    "configs/huge.yaml --nodes 512 engine.tensor_parallel=4",
    "--compare runs/base",
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings laid over the file's")
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="M", help="GPUs per machine")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="GPU",
        help="h100, h200, a100, or NAME:TFLOPS:GIB:NVLINK_GB_S:NETWORK_GB_S",
    )
    parser.add_argument("--vocabulary", type=positive, metavar="N", help="tokens, if there is no tokenizer yet")
    parser.add_argument("--compare", type=Path, metavar="RUN", help="output folder of a run to compare with")
    parser.add_argument("--json", action="store_true", help="for a program instead of a person")


def run(options: Namespace) -> int:
    from launch.hardware import find_gpu
    from launch.plan import Cluster
    from launch.plan_report import run_plan

    return run_plan(
        options.config,
        options.overrides,
        Cluster(options.nodes, options.gpus_per_node, find_gpu(options.gpu)),
        vocabulary=options.vocabulary,
        run=options.compare,
        as_json=options.json,
    )

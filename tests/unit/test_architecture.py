"""The map of who may import whom holds: read from the source, so a new file is bound by it from its first line."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("launch", "pretrain", "data_pipelines")
    for path in sorted((ROOT / package).rglob("*.py"))
}

ENTRY = ("pretrain", "data_pipelines")
ALLOWED = {  # part -> what it may import of ours besides itself; a part stands above all it imports
    "launch": (
        *("pretrain.accounting", "pretrain.models.towers", "pretrain.config"),
        *("data_pipelines.errors", "data_pipelines.command_line", "data_pipelines.text"),
        *("pretrain.heartbeat", "pretrain.stopping", "pretrain.time_limit"),  # what launcher and ranks agree on
    ),
    "pretrain.__main__": ENTRY,
    "pretrain.commands": ENTRY,
    "pretrain.train": ENTRY,
    "pretrain.evaluate": ENTRY,
    "pretrain.doctor": ENTRY,
    "pretrain.checkpoints": (
        *("pretrain.checkpoint", "pretrain.lease", "pretrain.parallel.mesh", "pretrain.screen", "pretrain.errors"),
    ),
    "pretrain.trainer": (  # parallel.engine is the protocol: the trainer does not know which engine it drives
        *("pretrain.checkpoint", "pretrain.saving", "pretrain.metrics", "pretrain.validation", "pretrain.banner"),
        *("pretrain.run_folder", "pretrain.lease"),
        *("pretrain.optim", "pretrain.models.layer", "pretrain.parallel.engine", "pretrain.parallel.mesh"),
        *("pretrain.stopping", "pretrain.screen", "pretrain.config", "pretrain.errors", "data_pipelines"),
        *("pretrain.alarms", "pretrain.health", "pretrain.rollback", "pretrain.batch_spec", "pretrain.journal"),
        *("pretrain.heartbeat", "pretrain.orders", "pretrain.stragglers"),
    ),
    "pretrain.elastic": ("pretrain.parallel.mesh", "pretrain.config", "pretrain.errors"),
    "pretrain.alarms": ("pretrain.parallel.mesh", "pretrain.config", "data_pipelines.batch"),
    "pretrain.health": ("pretrain.config", "pretrain.errors"),
    "pretrain.rollback": ("pretrain.parallel.mesh", "pretrain.errors", "data_pipelines"),
    "pretrain.journal": (
        *("pretrain.alarms", "pretrain.lease", "pretrain.metrics", "pretrain.validation", "pretrain.screen"),
        *("pretrain.parallel.engine", "pretrain.parallel.mesh", "pretrain.config", "data_pipelines.batch"),
    ),
    "pretrain.saving": (
        *("pretrain.checkpoint", "pretrain.journal", "pretrain.parallel.engine", "pretrain.screen"),
        *("pretrain.config", "pretrain.errors"),
    ),
    "pretrain.batch_spec": ("pretrain.models", "pretrain.config", "data_pipelines"),
    "pretrain.validation": (
        *("pretrain.models", "pretrain.parallel.engine", "pretrain.parallel.mesh", "pretrain.retrieval"),
        *("pretrain.figures", "pretrain.stopping", "data_pipelines"),
    ),
    "pretrain.banner": ("pretrain.parallel.mesh", "pretrain.config", "data_pipelines"),
    "pretrain.lease": ("pretrain.screen", "pretrain.errors", "data_pipelines.errors", "data_pipelines.text"),
    "pretrain.metrics": (
        "pretrain.config",
        "pretrain.lease",
        "pretrain.screen",
        "data_pipelines.batch",
        "data_pipelines.errors",
        "data_pipelines.redaction",
        "data_pipelines.text",
    ),
    "pretrain.retrieval": (),
    "pretrain.run_folder": ("pretrain.screen", "data_pipelines.errors", "data_pipelines.shards.manifest"),
    "pretrain.captioning": ("pretrain.models", "pretrain.objectives", "pretrain.collectives"),
    "pretrain.checkpoint": (
        *("pretrain.models.layer", "pretrain.parallel.engine", "pretrain.parallel.mesh", "pretrain.parallel.tensor"),
        *("pretrain.screen", "pretrain.config", "pretrain.errors"),
        *("data_pipelines.errors", "data_pipelines.storage", "data_pipelines.text"),
    ),
    "pretrain.figures": (
        *("pretrain.models.layer", "pretrain.parallel.engine", "pretrain.parallel.mesh", "pretrain.retrieval"),
        *("pretrain.captioning", "pretrain.scores", "pretrain.zero_shot", "data_pipelines"),
    ),
    "pretrain.zero_shot": ("pretrain.scores", "pretrain.screen", "data_pipelines.errors"),
    "pretrain.scores": ("data_pipelines.stream.heldout", "data_pipelines.shards.manifest", "data_pipelines.text"),
    "pretrain.stopping": (),
    "pretrain.heartbeat": (),
    "pretrain.time_limit": (),
    "pretrain.orders": ("pretrain.stopping", "pretrain.screen"),
    "pretrain.stragglers": ("pretrain.parallel.mesh",),
    "pretrain.screen": ("data_pipelines.redaction",),
    "pretrain.parallel": (
        *("pretrain.models", "pretrain.optim", "pretrain.accounting", "pretrain.collectives"),
        *("pretrain.config", "pretrain.errors"),
    ),
    "pretrain.accounting": (  # it takes a step with the real layers, their real parts, and no engine
        *("pretrain.parallel.first_pass", "pretrain.parallel.mesh", "pretrain.parallel.tensor", "pretrain.models"),
        *("pretrain.synthetic", "pretrain.collectives", "pretrain.config", "pretrain.errors"),
    ),
    "pretrain.synthetic": (
        *("pretrain.models", "pretrain.objectives", "pretrain.config", "pretrain.errors"),
        *("data_pipelines.batch", "data_pipelines.samples.masking"),
    ),
    "pretrain.models": (
        *("pretrain.objectives", "pretrain.collectives", "pretrain.config", "pretrain.model_config"),
        *("pretrain.errors", "data_pipelines.batch"),
    ),
    "pretrain.optim": ("pretrain.config",),
    "pretrain.objectives": ("pretrain.collectives", "data_pipelines.batch"),
    "pretrain.collectives": (),
    "pretrain.config": (
        *("pretrain.model_config", "pretrain.run_config", "pretrain.config_text", "pretrain.errors"),
        *("data_pipelines.config", "data_pipelines.redaction"),
    ),
    "pretrain.model_config": ("data_pipelines.config",),
    "pretrain.run_config": ("data_pipelines.config", "data_pipelines.redaction"),
    "pretrain.config_text": ("pretrain.errors",),  # of any schema
    "pretrain.errors": ("data_pipelines.errors",),
    "pretrain": (),
    "data_pipelines": (),
}


# The rooms of data_pipelines, lowest first; what lies beside them is for all.
ROOMS = ("storage", "shards", "order", "samples", "stream", "tools", "demo", "commands")
MAX_LINES = 350


def within(module: str, *parts: str) -> bool:
    return any(module == part or module.startswith(part + ".") for part in parts)


def part_of(module: str) -> str:
    return ".".join(module.split(".")[: 2 if module.startswith("pretrain.") else 1])


def imports(tree: ast.AST) -> Iterator[str]:
    """Name each import; `from a import b` is `a.b` where that is a module of ours, else `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the package's root"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in PATHS or submodule == "torch.distributed" else node.module


TREES = {module: ast.parse(path.read_text()) for module, path in PATHS.items()}
IMPORTS = {module: set(imports(tree)) for module, tree in TREES.items()}


@pytest.mark.parametrize("module", PATHS)
def test_a_module_imports_only_what_stands_below_it(module: str):
    part = part_of(module)
    assert part in ALLOWED, f"{part} has no line in the map"
    ours = {name for name in IMPORTS[module] if within(name, "launch", "pretrain", "data_pipelines")}
    strangers = {name for name in ours if not within(name, part, *ALLOWED[part])}
    assert not strangers, f"{module} may not import {sorted(strangers)}"


TORCHRUN = ("launch.torchrun", "launch.agent")


@pytest.mark.parametrize("module", PATHS)
def test_torch_distributed_and_deepspeed_stay_where_they_belong(module: str):
    for name in IMPORTS[module]:
        if within(name, "deepspeed"):
            assert within(module, "pretrain.parallel")
        if within(name, "torch.distributed"):
            assert not within(module, "pretrain.models", "pretrain.objectives", "data_pipelines")
        if within(name, "torch"):  # launch.torchrun runs in a process of its own, so launch stays instant
            assert not within(module, "launch") or module in TORCHRUN
        assert name not in TORCHRUN or module in TORCHRUN


@pytest.mark.parametrize("module", [name for name in PATHS if within(name, "pretrain.models", "pretrain.objectives")])
def test_a_model_reads_neither_the_environment_nor_its_rank(module: str):
    used = {node.attr for node in ast.walk(TREES[module]) if isinstance(node, ast.Attribute)}
    assert not used & {"environ", "getenv", "distributed", "get_rank", "get_world_size"}


LATE = ("launch.commands", "pretrain.commands", "data_pipelines.commands")  # so that the help comes at once


@pytest.mark.parametrize("module", [name for name in PATHS if not within(name, *LATE)])
def test_our_own_modules_are_imported_at_the_top_where_a_reader_looks(module: str):
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]
    assert not {name for function in functions for name in imports(function)} & PATHS.keys()


@pytest.mark.parametrize("module", [module for module in PATHS if module.startswith("data_pipelines.")])
def test_a_room_of_the_data_imports_only_rooms_below_it(module: str):
    """Above all, no module of a run imports a tool."""
    floors = {f"data_pipelines.{room}": floor for floor, room in enumerate(ROOMS, 1)} | {
        "data_pipelines.__main__": len(ROOMS) + 1
    }

    def floor(name: str) -> int:
        return next((floor for room, floor in floors.items() if within(name, room)), 0)

    above = {name for name in IMPORTS[module] if name.startswith("data_pipelines") and floor(name) > floor(module)}
    assert not above, f"{module} may not import {sorted(above)}"


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    lines = {module: path.read_text().count("\n") for module, path in PATHS.items()}
    assert {module: count for module, count in lines.items() if count > MAX_LINES} == {}


def test_no_module_imports_itself_by_a_detour():
    TopologicalSorter({module: names & PATHS.keys() for module, names in IMPORTS.items()}).prepare()


def test_a_login_node_reads_a_config_and_starts_a_run_without_loading_torch():
    light = [name for name in ("pretrain.config", "launch.local", "launch.__main__") if name in PATHS]
    code = f"import sys, {', '.join(light)}; print(sorted({{'torch', 'deepspeed', 'numpy', 'cv2'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


def test_the_table_of_columns_brings_no_decoder_along():
    """Models are checked against it, and the planner checks models."""
    assert IMPORTS["data_pipelines.batch"] == {"__future__", "dataclasses", "torch"}

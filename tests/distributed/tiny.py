"""A model and batches small enough for equality tests, and plain PyTorch to compare with."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from distributed.layouts import LAYOUTS
from pretrain import model_config as settings
from pretrain.checkpoint.store import CheckpointStore, Saved
from pretrain.config import Config, EngineConfig, parse_config
from pretrain.model_config import SIZES
from pretrain.models.architectures import architecture_of
from pretrain.models.initial import build_layer
from pretrain.models.layer import Flow
from pretrain.models.model import Model
from pretrain.models.towers import Vocabulary
from pretrain.optim import learning_rate
from pretrain.parallel.build import build_engine
from pretrain.parallel.engine import Engine, by_name, totals
from pretrain.parallel.first_pass import prepare
from pretrain.parallel.mesh import ALONE, Axis, Mesh, make_mesh
from pretrain.synthetic import made_up_batch

VOCABULARY = Vocabulary(61)
GRAIN = 4
CLIP = {"model__architecture": "clip"}
BLIP = {"model__architecture": "blip", "model__text__depth": 2}
COCA = {"model__architecture": "coca", "objectives__captioning": {"weight": 2.0, "label_smoothing": 0.1}}
VILT = {
    "model__architecture": "vilt",
    "model__image__depth": 0,
    "model__text__depth": 0,
    "model__joint": {"depth": 2, "heads": 2},
    "model__embed": None,
}


class Architecture(NamedTuple):
    """What the equality suite runs of an architecture."""

    changes: dict[str, Any]
    layouts: Collection[str]


SOME_LAYOUTS = ("ZeRO-3 x dp 2", "ZeRO-1 x tp 2 x dp 2", "ZeRO-1 x pp 2")
ARCHITECTURES = {
    "albef": Architecture({}, LAYOUTS),
    "clip": Architecture(CLIP, LAYOUTS),
    "blip": Architecture(BLIP, SOME_LAYOUTS),
    "coca": Architecture(COCA, SOME_LAYOUTS),
    "vilt": Architecture(VILT, SOME_LAYOUTS),
}
GLOBAL_NEGATIVES = {"objectives__contrastive__negatives": "global_batch"}


def tiny_config(**changes: Any) -> Config:
    """`changes` are keys such as engine__zero_stage=3."""
    tree: dict[str, Any] = {
        "output": "unused",
        "data": {"train": "unused", "tokenizer": "unused", "grain": GRAIN},
        "model": {
            "size": "tiny",
            "image": {"size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2},
            "text": {"length": 12, "width": 32, "depth": 1, "heads": 2},
            "embed": 16,
        },
        "engine": {"precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3, "clip": 0.5},
        "training": {"steps": 20, "global_batch": 32, "accumulation": 2},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = deepcopy(value)  # a later change may lie inside
    architecture = tree["model"].get("architecture", "albef")
    for name, section in settings.ARCHITECTURES[architecture].sections(SIZES["tiny"]).items():
        if name != "text":
            tree["model"].setdefault(name, section | {"depth": 1, "heads": 2})
    if "matching" in settings.ARCHITECTURES[architecture].objectives:
        tree.setdefault("objectives", {}).setdefault("matching", {"pool": GRAIN})
    return parse_config(tree, "tiny")


class Point(NamedTuple):
    """What an optimizer step says of itself."""

    losses: dict[str, float]
    norm: float
    counts: dict[str, tuple[int, int]]  # right answers and questions, by objective


def micro_batches(step: int, config: Config, rank: int = 0, size: int = 1) -> list[Flow]:
    """What one rank gets in one optimizer step: grains `rank, rank + size, ...` of each micro-step."""
    A, G = config.training.accumulation, config.training.global_batch
    grains = torch.arange(step * G, (step + 1) * G).view(A, G // A // GRAIN, GRAIN)
    return [made_up_batch(config, VOCABULARY, grains[a, rank::size].flatten()) for a in range(A)]


@cache
def _mesh(world: Axis, device: torch.device, tp: int, pp: int) -> Mesh:
    return make_mesh(world, device, EngineConfig(zero_stage=0, tensor_parallel=tp, pipeline_parallel=pp))


def mesh_of(mesh: Mesh, config: Config) -> Mesh:
    """The ranks as the config lays them out. Groups are made once: the same processes serve many tests."""
    return _mesh(mesh.world, mesh.device, config.engine.tensor_parallel, config.engine.pipeline_parallel)


def tiny_engine(mesh: Mesh, config: Config) -> Engine:
    mesh = mesh_of(mesh, config)
    micro_batch = config.training.global_batch // config.training.accumulation // mesh.dp.size
    return build_engine(config, mesh, vocabulary=VOCABULARY, micro_batch_per_rank=micro_batch)


def engine_curve(mesh: Mesh, config: Config, steps: int, engine: Engine | None = None, first: int = 0) -> list[Point]:
    """Each step of the configured engine."""
    engine = engine or tiny_engine(mesh, config)
    dp = mesh_of(mesh, config).dp
    curve = []
    for step in range(first, first + steps):
        result = engine.step(
            micro_batches(step, config, dp.rank, dp.size),
            learning_rate(step, config.training.steps, config.optimizer),
        )
        curve.append(Point(result.losses, result.gradient_norm, result.counts))
    return curve


def assert_same_curve(curve: list[Point], reference: list[Point]) -> None:
    for here, expected in zip(curve, reference, strict=True):
        assert here.losses == pytest.approx(expected.losses, abs=1e-5)
        assert here.norm == pytest.approx(expected.norm, rel=1e-4)
        assert here.counts == expected.counts


def build(config: Config, vocabulary: Vocabulary = VOCABULARY) -> Model:
    """All layers in one process, on the CPU."""
    architecture, cpu = architecture_of(config, vocabulary), torch.device("cpu")
    return Model(architecture, {layer.name: build_layer(layer, config.seed, cpu) for layer in architecture.layers})


def commit(store: CheckpointStore, step: int, engine: Engine) -> None:
    """Saves an engine's state, and waits for it."""
    store.save(step, engine.fragments(), {"applied_steps": engine.applied_steps})
    assert isinstance(store.settle(wait=True), Saved)


def plain_curve(config: Config, steps: int) -> list[Point]:
    """The same in plain PyTorch: one process, no engine, torch's own AdamW and clipping."""
    model = build(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    curve = []
    for step in range(steps):
        reports = []
        for have, stand_ins in prepare(model, micro_batches(step, config), ALONE, partial(run_each, model)):
            report = model(have, stand_ins)
            (report.loss / config.training.accumulation).backward()
            reports.append(report)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.training.steps, config.optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses, counts, _ = by_name(model.architecture, *totals(model.architecture, reports, Mesh(torch.device("cpu"))))
        curve.append(Point(losses, float(norm), counts))
    return curve


@torch.no_grad()
def run_each(model: Model, want: Collection[str], batches: Sequence[Flow]) -> list[Flow]:
    return [model.run(want, batch) for batch in batches]

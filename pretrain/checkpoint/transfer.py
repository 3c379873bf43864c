"""Starting a run with the weights of another one: what fits by name and shape, in any layout; no moments, step or data.

Positions are carried over to another grid or length; whatever else has another shape, or is of another tokenizer, keeps
the value that it was initialised with.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.checkpoint.fragments import read_fragments, read_whole
from pretrain.checkpoint.index import Index
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run
from pretrain.errors import CheckpointError, ConfigError
from pretrain.models.layer import Architecture
from pretrain.parallel.engine import Engine, Fragment
from pretrain.parallel.mesh import Axis

Shape = tuple[int, ...]
_IMAGE_POSITION, _TEXT_POSITION = "image_embed.position", "text_embed.position"
_BY_TOKEN_ID = ("embed.token.weight", "head.decode.weight", "head.decode.bias")  # rows are of a tokenizer's pieces


@dataclass(frozen=True)
class Plan:
    """What becomes of each parameter of the model, and of the checkpoint."""

    loaded: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)  # and how
    skipped: dict[str, str] = field(default_factory=dict)  # and why
    missing: list[str] = field(default_factory=list)  # in the checkpoint
    unused: list[str] = field(default_factory=list)  # by the model


def make_plan(here: Mapping[str, Shape], there: Mapping[str, Shape], same_tokenizer: bool) -> Plan:
    """Compares the model with the checkpoint, by the names and shapes of their parameters."""
    plan = Plan(missing=[name for name in here if name not in there], unused=[n for n in there if n not in here])
    for name in here.keys() & there.keys():
        old, new = there[name], here[name]
        shapes = f"{' x '.join(map(str, old))} -> {' x '.join(map(str, new))}"
        if not same_tokenizer and name.endswith(_BY_TOKEN_ID):
            plan.skipped[name] = "of another tokenizer"
        elif old == new:
            plan.loaded.append(name)
        elif name == _IMAGE_POSITION and old[1:] == new[1:]:
            plan.resized[name] = f"{shapes}, interpolated"
        elif name == _TEXT_POSITION and old[1:] == new[1:]:
            rest = f"places from {old[0]} on as initialised" if new[0] > old[0] else "cut"
            plan.resized[name] = f"{shapes}, {rest}"
        else:
            plan.skipped[name] = shapes
    return plan


def start_from(source: Path, engine: Engine, world: Axis, tokenizer: str) -> tuple[dict[str, Any], list[str]]:
    """Gives a fresh engine the weights of another run. All ranks call it together.

    Args:
        source: a run's folder, whose newest valid checkpoint is taken, or one of its checkpoints.
        engine: the model, as it was initialised.
        world: all ranks.
        tokenizer: this run's fingerprint.

    Returns:
        Where the weights are from, and lines that say what was loaded and what was not.

    Raises:
        CheckpointError: there is no valid checkpoint.
        ConfigError: it has nothing in common with the model.
    """
    checkpoint = _checkpoint_of(source, world)
    run = read_run(checkpoint)
    here = shapes_of(engine.architecture)
    there = {name: tuple(parameter.shape) for name, parameter in Index.open(checkpoint).parameters.items()}
    plan = make_plan(here, there, run["tokenizer"] == tokenizer)
    if not any(len(here[name]) > 1 for name in plan.loaded):  # some biases fit any model
        raise ConfigError(
            f"init_from {source} has no matrix of the name and shape of one of this model: name a run of a similar "
            f"model, or remove init_from."
        )
    masters = {f.name: Fragment(f.name, f.part, f.start, {"master": f.tensors["master"]}) for f in engine.fragments()}
    read_fragments(checkpoint, [masters[name] for name in plan.loaded if name in masters])
    for name, old in read_whole(checkpoint, {name: there[name] for name in plan.resized}).items():
        if name in masters:
            _fill(masters[name], resized(name, old, here[name]))
    engine.loaded(0)
    origin = {
        "path": str(checkpoint),
        "step": run["step"],
        "manifest_sha256": (checkpoint / "COMMIT").read_text(encoding="utf-8"),
    }
    return origin, list(report(plan, here, there, origin))


def shapes_of(architecture: Architecture) -> dict[str, Shape]:
    """The whole model's parameters, whatever part of them is on this rank."""
    with torch.device("meta"):
        modules = {layer.name: layer.build() for layer in architecture.layers}
    return {
        f"{layer}.{name}": tuple(parameter.shape)
        for layer, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def resized(name: str, old: Tensor, shape: Shape) -> Tensor:
    """A table of positions for another grid of patches, or another length; what it lacks at the end stays as it is."""
    if name == _TEXT_POSITION:
        return old[: shape[0]]
    # As timm's resample_abs_pos_embed does it.
    side, new_side = math.isqrt(len(old)), math.isqrt(shape[0])
    grid = old.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(shape)


def report(
    plan: Plan, here: Mapping[str, Shape], there: Mapping[str, Shape], origin: Mapping[str, Any]
) -> Iterator[str]:
    """What was loaded and what was not, in lines for a person."""
    yield (
        f"Initial weights from {origin['path']} (step {origin['step']}, manifest {origin['manifest_sha256'][:12]}): "
        f"{len(plan.loaded)} of {len(here)} parameters loaded, {len(plan.resized)} resized, {len(plan.skipped)} "
        f"skipped, {len(plan.missing)} not in it."
    )
    for title, reasons in (("Resized", plan.resized), ("Skipped, and as initialised", plan.skipped)):
        if reasons:
            yield f"{title}: {'; '.join(f'{name} ({why})' for name, why in sorted(reasons.items()))}."
    for title, names, all_names in (
        ("Not in it, and as initialised", plan.missing, here),
        ("In it, and not in this model", plan.unused, there),
    ):
        if names:
            yield f"{title}: {', '.join(_by_layer(names, all_names))}."


def _by_layer(names: Collection[str], all_names: Collection[str]) -> list[str]:
    """Names of parameters, or of a layer of which all are meant, or of layers that are numbered."""
    chosen = set(names)
    found: list[str] = []
    for layer in dict.fromkeys(name.partition(".")[0] for name in names):
        own = {name for name in all_names if name.partition(".")[0] == layer}
        found += [layer] if own <= chosen else sorted(own & chosen)
    numbered = [re.fullmatch(r"(\w+_)(\d+)", name) for name in found]
    stacks: dict[str, list[int]] = {}
    for match in filter(None, numbered):
        stacks.setdefault(match[1], []).append(int(match[2]))
    single = [name for name, match in zip(found, numbered, strict=True) if not match]
    return single + [
        f"{stack}{min(places)} to {max(places)}" if len(places) > 1 else f"{stack}{places[0]}"
        for stack, places in stacks.items()
    ]


def _checkpoint_of(source: Path, world: Axis) -> Path:
    """The checkpoint that is meant, every byte of which is what was written."""
    if match := re.fullmatch(r"step-(\d{9,})", source.name):
        checkpoint = CheckpointStore(source.parent, world).newest_valid(quarantine=False, step=int(match[1]))
    else:
        checkpoint = CheckpointStore(source / "checkpoints", world).newest_valid(quarantine=False)
    if checkpoint is None:
        raise CheckpointError(
            f"init_from {source} has no checkpoint: give the output folder of a run that has saved one, or one of its "
            f"checkpoints (checkpoints/step-...)."
        )
    return checkpoint


def _fill(fragment: Fragment, values: Tensor) -> None:
    """Copies this rank's piece of a parameter that every rank holds whole or in flat slices."""
    assert not fragment.part.is_cut
    piece = values.reshape(-1)[fragment.start : fragment.stop]
    fragment.tensors["master"][: len(piece)].copy_(piece)

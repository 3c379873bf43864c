"""A model and batches small enough for equality tests, and plain PyTorch to compare with."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pretrain.config import Config, EngineConfig, parse_config
from pretrain.models.architectures import layer_specs
from pretrain.models.model import build_model
from pretrain.optim import learning_rate
from pretrain.parallel.build import build_engine
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Axis, Mesh, make_mesh

VOCABULARY, PAD = 61, 0
GRAIN = 4
DUAL_ENCODER = {
    "model__architecture": "dual_encoder",
    "model__fusion": None,
    "objectives__matching": None,
    "objectives__masked_lm": None,
}
ARCHITECTURES = {"cross_attention": {}, "dual_encoder": DUAL_ENCODER}
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
            "fusion": {"depth": 1, "heads": 2},
            "embed": 16,
        },
        "objectives": {"matching": {"pool": GRAIN}},
        "engine": {"precision": "fp32"},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 3, "clip": 0.5},
        "training": {"steps": 20, "global_batch": 32, "accumulation": 2},
    }
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return parse_config(tree, "tiny")


class Point(NamedTuple):
    """What an optimizer step says of itself."""

    losses: list[float]
    norm: float
    counts: list[list[int]]  # right answers and questions, by objective


@dataclass(frozen=True)
class TinyBatch:
    fields: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return self.fields


def samples(positions: Tensor) -> TinyBatch:
    """Made-up samples, each a function of its position alone; captions and images repeat now and then."""
    rows = []
    for position in positions.tolist():
        generator = torch.Generator().manual_seed(position)
        image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator)
        text = torch.randint(5, VOCABULARY, (12,), generator=generator)
        text[0], text[int(torch.randint(6, 12, (1,), generator=generator)) :] = 2, PAD
        masked, slots = text.clone(), torch.tensor([1, 3])
        masked[slots] = 4
        targets = text[slots].clone()
        if position % 3 == 0:  # one slot is not used
            targets[1] = -100
        rows.append(
            (image, text, masked, slots, targets, torch.tensor(position // 2 if position % 8 < 2 else position))
        )
    images, text, masked, slots, targets, image_ids = (torch.stack(column) for column in zip(*rows, strict=True))
    return TinyBatch(
        {
            "images": images,
            "text": text,
            "masked_text": masked,
            "masked_positions": slots,
            "masked_targets": targets,
            "positions": positions,
            "image_ids": image_ids + 10**6,
            "caption_ids": positions,
        }
    )


def micro_batches(step: int, config: Config, rank: int = 0, size: int = 1) -> list[TinyBatch]:
    """What one rank gets in one optimizer step: grains `rank, rank + size, ...` of each micro-step."""
    A, G = config.training.accumulation, config.training.global_batch
    grains = torch.arange(step * G, (step + 1) * G).view(A, G // A // GRAIN, GRAIN)
    return [samples(grains[a, rank::size].flatten()) for a in range(A)]


@cache
def _mesh(world: Axis, device: torch.device, tp: int, pp: int) -> Mesh:
    return make_mesh(world, device, EngineConfig(zero_stage=0, tensor_parallel=tp, pipeline_parallel=pp))


def mesh_of(mesh: Mesh, config: Config) -> Mesh:
    """The ranks as the config lays them out. Groups are made once: the same processes serve many tests."""
    return _mesh(mesh.world, mesh.device, config.engine.tensor_parallel, config.engine.pipeline_parallel)


def tiny_engine(mesh: Mesh, config: Config) -> Engine:
    mesh = mesh_of(mesh, config)
    micro_batch = config.training.global_batch // config.training.accumulation // mesh.dp.size
    return build_engine(config, mesh, vocabulary=VOCABULARY, pad_id=PAD, micro_batch_per_rank=micro_batch)


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
        curve.append(Point(result.losses.tolist(), result.gradient_norm, result.counts.tolist()))
    return curve


def assert_same_curve(curve: list[Point], reference: list[Point]) -> None:
    for here, expected in zip(curve, reference, strict=True):
        assert here.losses == pytest.approx(expected.losses, abs=1e-5)
        assert here.norm == pytest.approx(expected.norm, rel=1e-4)
        assert here.counts == expected.counts


def plain_curve(config: Config, steps: int) -> list[Point]:
    """The same in plain PyTorch: one process, no engine, torch's own AdamW and clipping."""
    model = build_model(layer_specs(config, VOCABULARY), config, PAD, torch.device("cpu"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    curve = []
    for step in range(steps):
        batches = micro_batches(step, config)
        losses, counts = torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)
        for batch in batches:
            output = model(**batch.tensors())
            (output.loss / len(batches)).backward()
            losses += output.losses / len(batches)
            counts += output.counts
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.training.steps, config.optimizer)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(Point(losses.tolist(), float(norm), counts.tolist()))
    return curve

"""What each layer of a model costs a rank, measured on the meta device: the layers run there, on shapes alone.

Matrices are cut as `pretrain.parallel.tensor` cuts them, and other ranks are pretended. Of a row of equal layers the
first and the last run; those between them cost what the first does.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.accounting.meter import Meter, fuse_attention
from pretrain.collectives import Pretended
from pretrain.config import Config
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import COUNTS, LOSS, Call, Flow, Groups
from pretrain.models.model import Model, StandIns, report
from pretrain.models.towers import Vocabulary
from pretrain.parallel.first_pass import evaluate, prepare
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import cut
from pretrain.synthetic import made_up_batch

Place = tuple[str, str]
"""A part of a step (first, together, forward, backward), and the layer that runs."""


@dataclass(frozen=True)
class Layout:
    """How the samples of a step and the layers of the model lie on the ranks."""

    data_parallel: int
    tensor_parallel: int
    pipeline_parallel: int
    micro_batch: int
    """Samples of a micro-step on a rank."""
    micro_steps: int


@dataclass(frozen=True)
class Transfer:
    """What a rank exchanges in an optimizer step for one purpose, along one axis of the mesh."""

    what: str
    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, point-to-point, broadcast
    axis: str  # dp, tp, pp
    size: float
    """Bytes: of all-gathers what comes out, of reduce-scatters what goes in, else what the rank hands over."""
    messages: float
    overlapped: bool = False
    """Runs while the GPU computes."""
    parameters: float = 0
    """Those that DeepSpeed takes apart or puts together on the way, one by one."""


@dataclass(frozen=True)
class LayerCost:
    """One layer on a rank that holds the first part of it. Bytes are those of a micro-step."""

    name: str
    weights: tuple[int, ...]
    """Elements of each parameter that the rank holds."""
    copied: int
    """Elements of those that are not cut: the ranks of a tp axis hold the same."""
    flops: float
    """Of an optimizer step: forward, backward, what is computed again, and the first pass."""
    kept: float
    """What its forward pass adds to what waits for the backward pass."""
    peak_forward: float
    """What there is at its fullest moment, above all that earlier layers keep."""
    peak_backward: float
    crossing: float
    """What a border between pipeline stages behind it passes on."""
    crossing_first: float
    """The same, in the first pass."""
    runs_first: bool
    """The first pass needs it."""
    transfers: tuple[Transfer, ...]
    """What the layer itself exchanges."""


@dataclass(frozen=True)
class StepCost:
    """An optimizer step of a rank that holds the first parts of all layers."""

    layers: tuple[LayerCost, ...]
    columns: float
    """Bytes of what its micro-steps read of the batch."""
    first: float
    """Bytes at the fullest moment of the first pass over a micro-batch."""
    together: float
    """Bytes at the fullest moment of what is done with all micro-batches at once."""
    given: float
    """Bytes that both leave for the training pass."""
    results: float
    """Bytes that the first pass of a micro-step makes."""

    def in_steps(self, times: float) -> "StepCost":
        """The same samples of a step, in so many times as many micro-steps; what they make together stays."""
        layers = [
            replace(
                layer,
                kept=layer.kept / times,
                peak_forward=layer.peak_forward / times,
                peak_backward=layer.peak_backward / times,
                crossing=layer.crossing / times,
                crossing_first=layer.crossing_first / times,
                transfers=tuple(replace(each, messages=each.messages * times) for each in layer.transfers),
            )
            for layer in self.layers
        ]
        return replace(self, layers=tuple(layers), first=self.first / times, results=self.results / times)


class ForwardCost(NamedTuple):
    """A forward pass of the whole model."""

    parameters: int
    """Elements of all weights."""
    flops: dict[str, float]
    """Of a sample, by layer."""


def value_type(config: Config, gpu: bool) -> torch.dtype:
    """Of weights and activations in the forward and backward pass."""
    in_bf16 = config.engine.precision == "bf16" or (config.engine.precision == "auto" and gpu)
    return torch.bfloat16 if in_bf16 else torch.float32


def measure_step(config: Config, vocabulary: Vocabulary, layout: Layout, *, gpu: bool = True) -> StepCost:
    """Takes a step without numbers; `layout.pipeline_parallel` does not matter.

    Args:
        config: the whole config.
        vocabulary: the tokenizer's.
        layout: how samples and layers lie on the ranks.
        gpu: bf16 if the config leaves it open.
    """
    run = _Run(config, vocabulary, layout, gpu)
    with run.meter:
        return run.step()


def measure_forward(config: Config, vocabulary: Vocabulary, without: str | None = None) -> ForwardCost:
    """What holds of a forward pass of training whatever the layout.

    Args:
        config: the whole config.
        vocabulary: the tokenizer's.
        without: an objective that is left out, with all that only it needs.
    """
    samples = config.training.global_batch
    if not any(layer.together for layer in architecture_of(config, vocabulary).layers):
        samples //= config.training.accumulation
    pool = config.objectives.matching.pool if config.objectives.matching else 1
    micro_batch = math.gcd(samples, math.lcm(config.data.grain, pool))
    run = _Run(config, vocabulary, Layout(samples // micro_batch, 1, 1, micro_batch, 1), gpu=True)
    want = [name for name in run.architecture.reports if name not in (f"{LOSS}{without}", f"{COUNTS}{without}")]
    with run.meter:
        evaluate(run.model, want, [run.batch], run.forward)
    return ForwardCost(
        parameters=sum(math.prod(part.shape) for _, same in run.names() for part in run.parts[same]),
        flops={name: run.meter.flops["forward", same] / micro_batch for name, same in run.names()},
    )


class _Run:
    """A model without numbers on a pretended rank."""

    def __init__(self, config: Config, vocabulary: Vocabulary, layout: Layout, gpu: bool) -> None:
        self.layout = layout
        self.meter = Meter()
        sizes = {"dp": layout.data_parallel, "tp": layout.tensor_parallel}
        groups = [Pretended(n, partial(self.meter.note, axis)) if n > 1 else None for axis, n in sizes.items()]
        full = architecture_of(config, vocabulary, Groups(*groups))
        self.rows = [list(row) for _, row in groupby(full.layers, key=lambda layer: layer._replace(name=""))]
        few = [layer for row in self.rows for layer in row[:: max(1, len(row) - 1)]]
        self.architecture = full._replace(layers=few)
        with torch.device("meta"):
            modules = {layer.name: layer.build() for layer in few}
            columns = made_up_batch(config, vocabulary, torch.arange(layout.micro_batch))
        self.parts = {name: cut(name, module, groups[1]).values() for name, module in modules.items()}
        self.model = Model(self.architecture, modules, config.engine.activation_checkpointing)
        self.model.to(value_type(config, gpu))
        for module in modules.values():
            module.forward = partial(fuse_attention, module.forward)
        for weight in self.model.parameters():
            weight.register_post_accumulate_grad_hook(_drop_gradient)
        self.batch = {name: columns[name] for name in self.architecture.columns}
        self.meter.own([*self.model.parameters(), *self.batch.values()])
        self.before, self.kept, self.crossing, self.results = Counter[Place](), Counter[Place](), dict[Place, int](), 0

    def names(self) -> Iterator[tuple[str, str]]:
        """Each layer of the whole list, and which of those that run is as it is."""
        for row in self.rows:
            for layer in row:
                yield layer.name, (row[-1] if layer is row[-1] else row[0]).name

    def forward(self, want: Collection[str], batches: Sequence[Flow], phase: str = "forward") -> list[Flow]:
        """Of equal micro-batches one runs."""
        self.meter.flops.clear()
        with torch.no_grad():
            made = self.run(self.model.calls(want, batches[0]), batches[0], phase)
        self.results = sum(made[name].nbytes for name in want if name in made)
        return [{name: (batches[0] | made)[name] for name in want}] * len(batches)

    def run(self, calls: Sequence[Call], have: Flow, phase: str, stand_ins: StandIns | None = None) -> Flow:
        made: Flow = {}
        for call in calls:
            place = phase, call.layer.name
            self.meter.enter(place)
            self.before[place] = self.meter.held
            made = self.model.run_calls([call], have, made, stand_ins)
            made = {name: tensor for name, tensor in made.items() if name not in have}
            self.kept[place] = self.meter.held - self.before[place]
            self.crossing[place] = sum(made[name].nbytes for name in call.crossing(have))
            for name in call.layer.written(call.kinds):
                if call.reads and name in made and made[name].requires_grad:  # what reads nothing gives parameters
                    made[name].register_hook(partial(self._enter_backward, call.layer.name))
        return made

    def _enter_backward(self, name: str, _: Tensor) -> None:
        self.meter.enter(("backward", name))

    def step(self) -> StepCost:
        steps, meter, model, architecture = self.layout.micro_steps, self.meter, self.model, self.architecture
        for layer in architecture.layers:
            if layer.together:
                model.get_submodule(layer.name).register_forward_pre_hook(
                    lambda *_, name=layer.name: meter.enter(("together", name))
                )
        prepared = prepare(model, [self.batch] * steps, ALONE, partial(self.forward, phase="first"))
        have, stand_ins = prepared[0]
        peaks = {
            phase: max((size for place, size in meter.peak.items() if place[0] == phase), default=0)
            for phase in ("first", "together")
        }
        given = meter.held
        made = self.run(model.calls(architecture.reports, have), have, "forward", stand_ins)
        (report(architecture, have | made).loss / steps).backward()
        return StepCost(
            layers=tuple(self._costs()),
            columns=steps * sum(tensor.nbytes for tensor in self.batch.values()),
            first=peaks["first"],
            together=peaks["together"],
            given=given,
            results=self.results,
        )

    def _costs(self) -> Iterator[LayerCost]:
        steps, meter = self.layout.micro_steps, self.meter
        times = {"first": steps, "together": 1, "forward": steps, "backward": steps}
        crossing, crossing_first = 0, 0
        last_first = [name for phase, name in self.before if phase == "first"][-1:]
        for name, same in self.names():
            before = self.before["forward", same]
            crossing = self.crossing.get(("forward", same), crossing)
            crossing_first = 0 if [same] == last_first else self.crossing.get(("first", same), crossing_first)
            yield LayerCost(
                name=name,
                weights=tuple(math.prod(part.size) for part in self.parts[same]),
                copied=sum(math.prod(part.size) for part in self.parts[same] if not part.is_cut),
                flops=sum(count * meter.flops[phase, same] for phase, count in times.items()),
                kept=self.kept["forward", same],
                peak_forward=max(meter.peak.get(("forward", same), 0) - before, 0),
                peak_backward=max(meter.peak.get(("backward", same), 0) - before, 0),
                crossing=crossing,
                crossing_first=crossing_first,
                runs_first=("first", same) in self.before,
                transfers=tuple(self._transfers(same, times)),
            )

    def _transfers(self, name: str, times: Mapping[str, int]) -> Iterator[Transfer]:
        sent, messages = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for ((phase, layer), axis, kind), size in self.meter.sent.items():
            if layer == name:
                sent[axis, kind] += times[phase] * size
                messages[axis, kind] += times[phase] * self.meter.messages[(phase, layer), axis, kind]
        for (axis, kind), size in sent.items():
            what = name if axis == "dp" else "activations of cut matrices"
            yield Transfer(what, kind, axis, size, messages[axis, kind])


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None

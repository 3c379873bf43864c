"""The model: runs the layers that lead to what is wanted. Knows neither ranks nor what any layer does."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.models.layer import COUNTS, LOSS, Architecture, Call, Flow, Layer, leading_to

StandIns = Mapping[str, Callable[..., tuple[Tensor, ...]]]  # what takes a layer's place in one pass, by its name


class Report(NamedTuple):
    """What one training pass over a micro-batch says."""

    loss: Tensor  # scalar: the weighted sum that is optimised
    figures: Tensor  # (F,) float32, detached: each objective's unweighted loss, then each metric
    counts: Tensor  # (N, 2) int64: right answers and questions of each objective

    def without_graph(self) -> "Report":
        return self._replace(loss=self.loss.detach())


class Model(nn.Module):
    """An architecture, and the modules of those of its layers that are here: all, or one pipeline stage's."""

    def __init__(self, architecture: Architecture, modules: Mapping[str, nn.Module], recompute: bool = False) -> None:
        super().__init__()
        self.architecture = architecture
        self.recompute = recompute
        for name, module in modules.items():
            self.add_module(name, module)
        self._calls: dict[tuple[frozenset[str], frozenset[str]], list[Call]] = {}

    def forward(self, have: Flow, stand_ins: StandIns | None = None) -> Report:
        """One pass for every objective."""
        return report(self.architecture, self.run(self.architecture.reports, have, stand_ins))

    def has(self, layer: Layer) -> bool:
        """Whether a layer of the architecture is here."""
        return layer.name in self._modules

    def calls(self, want: Iterable[str], have: Iterable[str]) -> list[Call]:
        """See `leading_to`."""
        key = frozenset(want), frozenset(have)
        if key not in self._calls:
            self._calls[key] = leading_to(self.architecture.layers, *key)
        return self._calls[key]

    def run(self, want: Iterable[str], have: Flow, stand_ins: StandIns | None = None) -> Flow:
        """What is wanted, and nothing else.

        Args:
            want: names that layers write.
            have: tensors of a batch, and of what layers would write whatever the caller already has.
            stand_ins: what takes a layer's place.
        """
        want = set(want)
        flow = self.run_calls(self.calls(want, have), have, stand_ins=stand_ins)
        return {name: flow[name] for name in want}

    def run_calls(
        self, calls: Sequence[Call], have: Flow, made: Flow | None = None, stand_ins: StandIns | None = None
    ) -> Flow:
        """The flow after `calls`, all of whose layers are here.

        Args:
            calls: a part of a pass.
            have: what the caller keeps.
            made: what earlier layers made; let go of, as all that these layers make, once nothing later reads it.
            stand_ins: see `run`.
        """
        flow = have | (made or {})
        for layer, kinds, reads, after in calls:
            module = (stand_ins or {}).get(layer.name) or self.get_submodule(layer.name)
            if layer.rows:
                module = partial(module, spans=layer.spans(kinds, flow))
            if self.recompute and layer.recompute and torch.is_grad_enabled():
                module = partial(checkpoint, module, use_reentrant=False, preserve_rng_state=False)  # no layer draws
            outcome = module(*(flow[name] for name in layer.read(kinds)))
            names = layer.written(kinds)
            flow |= zip(names, (outcome,) if isinstance(outcome, Tensor) else outcome, strict=True)
            for name in {*names, *reads} - after - have.keys():
                del flow[name]
        return flow


def report(architecture: Architecture, flow: Flow) -> Report:
    """The weighted sum and its parts, of a flow that has them."""
    losses = torch.stack([flow[LOSS + objective.name].float() for objective in architecture.objectives])
    metrics = [flow[name].detach().float().reshape(1) for name in architecture.metrics]
    weights = losses.new_tensor([objective.weight for objective in architecture.objectives])
    return Report(
        loss=(weights * losses).sum(),
        figures=torch.cat([losses.detach(), *metrics]),
        counts=torch.stack([flow[COUNTS + objective.name] for objective in architecture.objectives]),
    )

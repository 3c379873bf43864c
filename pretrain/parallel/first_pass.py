"""What a training pass over a micro-batch has to know of the other micro-batches of its optimizer step."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from pretrain.models.layer import LOSS, TARGETS, Architecture, Flow, Layer
from pretrain.models.model import Model, StandIns
from pretrain.parallel.mesh import Axis

Run = Callable[[Collection[str], Sequence[Flow]], list[Flow]]  # forward passes without gradient over micro-batches


def prepare(model: Model, micro_batches: Sequence[Flow], dp: Axis, run: Run) -> list[tuple[Flow, StandIns]]:
    """Each micro-batch with all that its training pass is given. All ranks call it together.

    Args:
        model: the layers that are here.
        micro_batches: of one optimizer step, on this rank.
        dp: the ranks that read other samples of the step.
        run: gives each micro-batch's tensors of some names, on every rank of a pipeline.
    """
    architecture = model.architecture
    targets = _count_targets(architecture, micro_batches, dp)
    given = [batch | targets for batch in micro_batches]
    if not architecture.first:
        return [(have, {}) for have in given]
    made = run(architecture.first, given)
    given = [
        have | {name: part[name] for name in architecture.handed_on} for have, part in zip(given, made, strict=True)
    ]
    together = [layer for layer in architecture.layers if layer.together and model.has(layer)]
    shares = {layer.name: share(architecture, layer, model.get_submodule(layer.name), made) for layer in together}
    return [(have, {name: parts[i] for name, parts in shares.items()}) for i, have in enumerate(given)]


def evaluate(model: Model, want: Collection[str], batches: Sequence[Flow], run: Run) -> list[Flow]:
    """What is wanted of each batch, without gradient; each is a step of its own. All ranks call it together."""
    architecture = model.architecture
    given = [batch | _count_targets(architecture, [batch], None) for batch in batches]
    handed_on = architecture.handed_on
    if any(call.reads & handed_on for call in model.calls(want, {*given[0], *handed_on})):
        given = [have | part for have, part in zip(given, run(handed_on, given), strict=True)]
    return run(want, given)


def _count_targets(architecture: Architecture, micro_batches: Sequence[Flow], dp: Axis | None) -> Flow:
    """targets/x of an average micro-batch of the step, for each objective that is a mean over target tokens."""
    counted = {}
    for objective in architecture.objectives:
        if objective.targets and "text" in micro_batches[0]:
            numbers = torch.stack([objective.targets(batch["text"]) for batch in micro_batches]).float()
            mean = numbers.mean().reshape(1)
            counted[TARGETS + objective.name] = dp.mean(mean) if dp else mean
    return counted


class Share:
    """Stands in a layer's place: its loss is the whole step's, its gradient that of one micro-batch's part in it."""

    def __init__(self, loss: Tensor, besides: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.loss, self.besides, self.gradients = loss, besides, gradients

    def __call__(self, *reads: Tensor) -> tuple[Tensor, ...]:
        floating = (tensor for tensor in reads if tensor.is_floating_point())
        parts = zip(floating, self.gradients, strict=True)
        surrogate = torch.stack([(tensor.float() * gradient).sum() for tensor, gradient in parts]).sum()
        return self.loss + surrogate - surrogate.detach(), *self.besides


def share(architecture: Architecture, layer: Layer, module: nn.Module, parts: Sequence[Flow]) -> list[Share]:
    """A layer's loss over all micro-batches of a step at once, shared out among them.

    A gradient through what the layer reads needs nothing of the other micro-batches but what it reads of them: so a
    first pass without gradient keeps that, the whole loss gives the gradient with regard to it, and the training pass
    hands it on. Gradients make up for the mean over micro-batches that an engine takes.

    Args:
        architecture: tells which names are of a sample: all but those of layers that read nothing, as parameters do.
        layer: without parameters; the first thing that it writes is its loss.
        module: the layer.
        parts: what the layer reads, one flow per micro-batch of this rank.

    Source: Gao et al., Scaling deep contrastive learning batch size under memory limited setup (2021), section 3.2;
    Pham et al., Combined scaling for zero-shot transfer learning (BASIC, 2021), section 4.
    """
    assert layer.writes[0].startswith(LOSS)
    constant = {name for other in architecture.layers if not other.reads for name in other.writes}
    sizes = [len(next(part[name] for name in layer.reads if name not in constant)) for part in parts]
    whole = {n: parts[0][n] if n in constant else torch.cat([part[n] for part in parts]) for n in layer.reads}
    leaves = {n: t.detach().float().requires_grad_() for n, t in whole.items() if t.is_floating_point()}
    with torch.enable_grad():
        loss, counts, *metrics = module(*(whole | leaves).values())
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    shared = [
        [gradient] * len(parts) if name in constant else [len(parts) * part for part in gradient.split(sizes)]
        for name, gradient in zip(leaves, gradients, strict=True)
    ]
    loss, metrics = loss.detach(), [metric.detach() for metric in metrics]
    # Right answers and questions are added up over micro-batches: they are counted once.
    return [
        Share(loss, [counts if number == 0 else torch.zeros_like(counts), *metrics], own)
        for number, own in enumerate(zip(*shared, strict=True))
    ]

"""Finds parameters that are trained in name only: no loss of a step reaches them."""

from functools import partial

from torch import Tensor, nn

from pretrain.errors import TrainingError
from pretrain.parallel.mesh import Axis


class GradientWatch:
    """Notes which parameters get a gradient, be it zero, between two checks."""

    def __init__(self, model: nn.Module, world: Axis) -> None:
        self.world = world
        self.trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        self.seen: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._saw, name))

    def _saw(self, name: str, _: Tensor) -> None:
        self.seen.add(name)

    def check(self) -> None:
        """All ranks call it together after a step.

        Raises:
            TrainingError: a parameter of any rank had no gradient; on all ranks.
        """
        missing = sorted(set().union(*self.world.gather_objects(self.trainable - self.seen)))
        self.seen.clear()
        if missing:
            raise TrainingError(
                f"{len(missing)} trainable parameters had no gradient in this step, {missing[0]} first: no loss "
                f"reaches them, and momentum and weight decay alone move them. Remove their layers, or let an "
                f"objective read them; training.debug=false trains on as they are."
            )

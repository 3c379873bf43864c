"""Known signatures of a run that learns nothing, each said in a sentence: what it means, and what to do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from pretrain.config import ContrastiveConfig
from pretrain.parallel.mesh import Axis


class Negatives:
    """Looks whether the contrastive objective has anything to compare with. All ranks call it together."""

    def __init__(self, contrastive: ContrastiveConfig, dp: Axis) -> None:
        self.over_the_step = contrastive.negatives == "global_batch"
        self.dp = dp
        self._looked = self._missing = False

    def missing(self, loss: float, micro_batches: Sequence[Batch]) -> str | None:
        """Said once if no negative is left: looked for in the first step, and where a loss of 0 makes it likely."""
        if self._looked and (self._missing or loss != 0):
            return None
        names = ("image_ids", "caption_ids")
        ids = [torch.stack([batch.tensors[name] for name in names]).cpu() for batch in micro_batches]
        if self.over_the_step:
            ids = [torch.cat(ids, dim=1)]
        everyone = [torch.cat(parts, dim=1) for parts in zip(*self.dp.gather_objects(ids), strict=True)]
        self._looked = True
        self._missing = not any(has_negatives(*parts) for parts in everyone)
        if not self._missing:
            return None
        samples = everyone[0].shape[1]
        fix = (
            "all of them share their image or their caption; look at them with `python -m data_pipelines inspect`"
            if samples > 1
            else "lower training.accumulation, or set objectives.contrastive.negatives=global_batch"
        )
        return (
            f"no contrastive negative is left where {samples} samples are compared, so that the contrastive objective "
            f"teaches nothing: {fix}."
        )


def has_negatives(image_ids: Tensor, caption_ids: Tensor) -> bool:
    """Whether any two of G samples differ in both image and caption. (G,), (G,)."""
    # If one differs from the first in its image alone and one in its caption alone, these two differ in both.
    return bool((image_ids != image_ids[0]).any() and (caption_ids != caption_ids[0]).any())

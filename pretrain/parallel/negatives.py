"""The first of two passes over a global batch, when all of it gives contrastive negatives."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pretrain.collectives import Group
from pretrain.models.align import Embeddings, find_pulls
from pretrain.parallel.engine import Inputs


def with_pulls(
    embed: Callable[..., Embeddings], micro_batches: Sequence[Inputs], global_negatives: bool, group: Group
) -> Iterator[tuple[Inputs, dict[str, Tensor]]]:
    """Each micro-batch with what the model needs besides, so that its negatives are those of the global batch.

    Args:
        embed: runs the towers on a micro-batch's tensors.
        micro_batches: of one optimizer step, on this rank.
        global_negatives: else each micro-batch comes as it is, and is its own world.
        group: the ranks whose samples are negatives.
    """
    if not global_negatives:
        return zip(micro_batches, ({} for _ in micro_batches), strict=True)
    with torch.no_grad():
        parts = [embed(**batch.tensors()) for batch in micro_batches]
    return zip(micro_batches, find_pulls(parts, group), strict=True)

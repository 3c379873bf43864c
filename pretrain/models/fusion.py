"""Fusion layers and the two heads on top of them.

Shapes: B samples, R fusion rows (3B for matching, then B masked), L text length, D text width, K masked slots,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group, share_of
from pretrain.config import ModelConfig
from pretrain.models.flow import Flow
from pretrain.models.layers import Block
from pretrain.models.towers import pool_text
from pretrain.objectives.masked_lm import masked_lm_loss
from pretrain.objectives.matching import matching_loss


class FusionBlock(Block):
    """A text block that also looks at the row's image."""

    def __init__(self, config: ModelConfig) -> None:
        assert config.fusion is not None
        super().__init__(config.text.width, config.fusion.heads, memory_width=config.image.width)

    def forward(self, flow: Flow) -> Flow:
        return flow._replace(text=self.transform(flow.text, flow.text_mask, flow.image, flow.image_rows))


class MatchingHead(nn.Module):
    """Says of a fused row whether its caption belongs to its image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 2)

    def logits(self, text: Tensor) -> Tensor:
        """(R, L, D) fused rows -> (R, 2); class 1 means "belongs together"."""
        return self.classify(self.norm(pool_text(text)))

    def forward(self, flow: Flow) -> Flow:
        rows = 3 * len(flow.positions)
        loss, counts = matching_loss(self.logits(flow.text[:rows]), flow.negatives_valid.bool())
        return flow.reporting("matching", loss, counts)


class MaskedLMHead(nn.Module):
    """Names the hidden pieces; sees the masked places only, not all L."""

    def __init__(self, width: int, vocabulary: int, group: Group = None) -> None:
        super().__init__()
        self.group, self.start = group, share_of(vocabulary, group)[0]
        self.norm = nn.LayerNorm(width)
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, vocabulary)

    def logits(self, text: Tensor, masked_positions: Tensor) -> Tensor:
        """(B, L, D) fused masked rows, (B, K) -> (B, K, V), or this rank's share of V."""
        rows = torch.arange(len(text), device=text.device)[:, None]
        hidden = F.gelu(self.transform(self.norm(text[rows, masked_positions])))
        return self.decode(self.transform_norm(hidden))

    def forward(self, flow: Flow) -> Flow:
        masked = flow.text[-len(flow.positions) :]
        logits = self.logits(masked, flow.masked_positions)
        loss, counts = masked_lm_loss(logits, flow.masked_targets, self.group, self.start)
        return flow.reporting("masked_lm", loss, counts)

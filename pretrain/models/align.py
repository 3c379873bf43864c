"""Where the towers meet: the contrastive objective, and the rows that the fusion layers will see.

Shapes: B samples on this rank, L text length, D text width, E embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group
from pretrain.config import ModelConfig
from pretrain.models.flow import Flow
from pretrain.models.towers import pool_image, pool_text
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.objectives.matching import mine_hard_negatives


class Align(nn.Module):
    """Embeds both sides on the unit sphere and computes the contrastive loss."""

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.group = group
        self.image_project = nn.Linear(config.image.width, config.embed, bias=False)
        self.text_norm = nn.LayerNorm(config.text.width)
        self.text_project = nn.Linear(config.text.width, config.embed, bias=False)
        # Log of 1 / temperature. ZeRO takes no 0-dim parameter. In bf16 it is rounded to about 1 %, its master not.
        self.log_scale = nn.Parameter(torch.empty(1))

    def embed_image(self, image: Tensor) -> Tensor:
        """(B, P, D) image tokens -> (B, E) float32, unit length."""
        return F.normalize(self.image_project(pool_image(image)).float(), dim=1)

    def embed_text(self, text: Tensor) -> Tensor:
        """(R, L, D) text tokens -> (R, E) float32, unit length."""
        return F.normalize(self.text_project(self.text_norm(pool_text(text))).float(), dim=1)

    def forward(self, flow: Flow) -> Flow:
        clean = flow.text[: len(flow.image)]
        image_BE, text_BE = self.embed_image(flow.image), self.embed_text(clean)
        identity = Identity(flow.image_ids, flow.caption_ids)
        loss, counts = contrastive_loss(image_BE, text_BE, self.log_scale, identity, self.group)
        flow = flow._replace(image_embeddings=image_BE.detach(), text_embeddings=text_BE.detach())
        return flow.reporting("contrastive", loss, counts)


class AlignAndMine(Align):
    """Also lays out the fusion rows: [match; negative image; negative text; masked], as far as they are wanted.

    Each fusion layer then runs once for matching and masked language modelling together. An architecture that runs
    it once an objective gathers every ZeRO-3 parameter three times as often.
    """

    def __init__(self, config: ModelConfig, group: Group, *, pool: int | None, masked: bool, seed: int) -> None:
        super().__init__(config, group)
        self.pool = pool
        self.masked = masked
        self.seed = seed

    def forward(self, flow: Flow) -> Flow:
        flow = super().forward(flow)
        B = len(flow.image)
        own = torch.arange(B, device=flow.text.device)
        text_rows, image_rows = [], []
        if self.pool is not None:
            negatives = mine_hard_negatives(
                flow.image_embeddings,
                flow.text_embeddings,
                self.log_scale,
                Identity(flow.image_ids, flow.caption_ids),
                flow.positions,
                self.pool,
                self.seed,
            )
            text_rows += [own, own, negatives.text_rows]
            image_rows += [own, negatives.image_rows, own]
            valid = torch.cat([torch.ones_like(negatives.image_valid), negatives.image_valid, negatives.text_valid])
            flow = flow._replace(negatives_valid=valid.long())
        if self.masked:
            text_rows.append(own + B)  # the second half of the text rows
            image_rows.append(own)
        chosen = torch.cat(text_rows)
        return flow._replace(text=flow.text[chosen], text_mask=flow.text_mask[chosen], image_rows=torch.cat(image_rows))

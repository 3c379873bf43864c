"""Where the towers meet: the contrastive objective, and the rows that the fusion layers will see.

Shapes: B samples on this rank, L text length, D text width, E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group
from pretrain.config import ModelConfig
from pretrain.models.flow import Flow
from pretrain.models.towers import pool_image, pool_text
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.objectives.matching import mine_hard_negatives


class Temperature(nn.Module):
    """The learnable temperature; a layer of its own, so that ZeRO-3 gathers it for whoever asks."""

    def __init__(self) -> None:
        super().__init__()
        # Log of 1 / temperature. ZeRO takes no 0-dim parameter. In bf16 it is rounded to about 1 %, its master not.
        self.log_scale = nn.Parameter(torch.empty(1))

    def forward(self) -> Tensor:
        return self.log_scale


class Embeddings(NamedTuple):
    """A micro-batch as the contrastive objective sees it."""

    image: Tensor  # (B, E) float32, unit length
    text: Tensor  # (B, E)
    log_scale: Tensor  # (1,)
    identity: Identity


class Align(nn.Module):
    """Embeds both sides on the unit sphere and computes the contrastive loss."""

    def __init__(self, config: ModelConfig, group: Group) -> None:
        super().__init__()
        self.group = group
        self.image_project = nn.Linear(config.image.width, config.embed, bias=False)
        self.text_norm = nn.LayerNorm(config.text.width)
        self.text_project = nn.Linear(config.text.width, config.embed, bias=False)
        self.temperature = Temperature()

    def embed_image(self, image: Tensor) -> Tensor:
        """(B, P, D) image tokens -> (B, E) float32, unit length."""
        return F.normalize(self.image_project(pool_image(image)).float(), dim=1)

    def embed_text(self, text: Tensor) -> Tensor:
        """(R, L, D) text tokens -> (R, E) float32, unit length."""
        return F.normalize(self.text_project(self.text_norm(pool_text(text))).float(), dim=1)

    def embed(self, flow: Flow) -> Embeddings:
        """Both sides of the micro-batch, and what the contrastive objective needs besides."""
        image, text = self.embed_image(flow.image), self.embed_text(flow.text[: len(flow.image)])
        return Embeddings(image, text, self.temperature(), Identity(flow.image_ids, flow.caption_ids))

    def forward(self, flow: Flow) -> Flow:
        embeddings = self.embed(flow)
        if flow.pulled.numel():
            loss, counts = _pulled_loss(flow, embeddings)
        else:
            loss, counts = contrastive_loss(*embeddings, self.group)
        image, text, log_scale, _ = embeddings
        flow = flow._replace(
            image_embeddings=image.detach(), text_embeddings=text.detach(), log_scale=log_scale.detach()
        )
        return flow.reporting("contrastive", loss, counts)


def _pulled_loss(flow: Flow, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """The global batch's loss, whose gradient here is the one that a first pass found for these embeddings."""
    loss, scale_gradient, right, asked = flow.pulled
    surrogate = (embeddings.image * flow.image_pull).sum() + (embeddings.text * flow.text_pull).sum()
    surrogate = surrogate + (embeddings.log_scale.float() * scale_gradient).sum()
    return loss + surrogate - surrogate.detach(), torch.stack([right, asked]).long()


def find_pulls(parts: Sequence[Embeddings], group: Group) -> list[dict[str, Tensor]]:
    """What the second pass over each micro-batch needs so that together they optimise the global batch's loss.

    A gradient through embeddings needs nothing of the other micro-batches but their embeddings: so a first pass without
    gradient keeps those, the whole loss gives the gradient with regard to each of them, and a second pass hands it on.

    Args:
        parts: the micro-batches of one optimizer step on this rank.
        group: the ranks whose samples are negatives.

    Returns:
        For each micro-batch the fields `image_pull`, `text_pull` and `pulled` of its flow. They make up for the mean
        over micro-batches that an engine takes.

    Source: Gao et al., Scaling deep contrastive learning batch size under memory limited setup (2021), section 3.2;
    Pham et al., Combined scaling for zero-shot transfer learning (BASIC, 2021), section 4.
    """
    image = torch.cat([part.image for part in parts]).requires_grad_()
    text = torch.cat([part.text for part in parts]).requires_grad_()
    log_scale = parts[0].log_scale.detach().float().requires_grad_()
    image_ids = torch.cat([part.identity.image_ids for part in parts])
    caption_ids = torch.cat([part.identity.caption_ids for part in parts])
    with torch.enable_grad():
        loss, counts = contrastive_loss(image, text, log_scale, Identity(image_ids, caption_ids), group)
        gradients = torch.autograd.grad(loss, (image, text, log_scale))
    pulls: list[dict[str, Tensor]] = []
    images, texts = (gradient.split([len(p.image) for p in parts]) for gradient in gradients[:2])
    for number, (image_pull, text_pull) in enumerate(zip(images, texts, strict=True)):
        counted = counts if number == 0 else torch.zeros_like(counts)
        pulled = torch.cat([loss.detach()[None], gradients[2], counted.float()])
        pulls.append({"image_pull": len(parts) * image_pull, "text_pull": len(parts) * text_pull, "pulled": pulled})
    return pulls


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
                flow.log_scale,
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

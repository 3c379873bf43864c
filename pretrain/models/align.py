"""Where the towers meet: the contrastive objective, and the rows that the fusion layers will see.

Shapes: B samples on this rank, L text length, D text width, E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group, fetch, find_route
from pretrain.config import ModelConfig
from pretrain.models.flow import Flow
from pretrain.models.towers import pool_image, pool_text
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.objectives.matching import mine_hard_negatives
from pretrain.objectives.sigmoid import sigmoid_loss


class Temperature(nn.Module):
    """The learnable temperature and the sigmoid loss's bias; a layer of their own, so that ZeRO-3 gathers them."""

    def __init__(self, sigmoid: bool) -> None:
        super().__init__()
        # Log of 1 / temperature. ZeRO takes no 0-dim parameter. In bf16 it is rounded to about 1 %, its master not.
        self.log_scale = nn.Parameter(torch.empty(1))
        self.bias = nn.Parameter(torch.empty(1)) if sigmoid else None  # in bf16, -10 is rounded to 0.03

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.log_scale, self.bias


class Embeddings(NamedTuple):
    """A micro-batch as the contrastive objective sees it."""

    image: Tensor  # (B, E) float32, unit length
    text: Tensor  # (B, E)
    log_scale: Tensor  # (1,)
    bias: Tensor | None  # (1,) of the sigmoid loss; None for the softmax
    identity: Identity

    def loss(self, group: Group) -> tuple[Tensor, Tensor]:
        """The loss, a scalar, and (2,) int64 counts; `group` is the ranks whose samples are negatives."""
        if self.bias is None:
            return contrastive_loss(self.image, self.text, self.log_scale, self.identity, group)
        return sigmoid_loss(self.image, self.text, self.log_scale, self.bias, self.identity, group)

    def scalars(self) -> list[Tensor]:
        """The parameters among them, each (1,)."""
        return [self.log_scale] if self.bias is None else [self.log_scale, self.bias]


class Align(nn.Module):
    """Embeds both sides on the unit sphere and computes the contrastive loss."""

    def __init__(self, config: ModelConfig, group: Group, *, sigmoid: bool) -> None:
        super().__init__()
        self.group = group
        self.image_project = nn.Linear(config.image.width, config.embed, bias=False)
        self.text_norm = nn.LayerNorm(config.text.width)
        self.text_project = nn.Linear(config.text.width, config.embed, bias=False)
        self.temperature = Temperature(sigmoid)

    def embed_image(self, image: Tensor) -> Tensor:
        """(B, P, D) image tokens -> (B, E) float32, unit length."""
        return F.normalize(self.image_project(pool_image(image)).float(), dim=1)

    def embed_text(self, text: Tensor) -> Tensor:
        """(R, L, D) text tokens -> (R, E) float32, unit length."""
        return F.normalize(self.text_project(self.text_norm(pool_text(text))).float(), dim=1)

    def embed(self, flow: Flow) -> Embeddings:
        """Both sides of the micro-batch, and what the contrastive objective needs besides."""
        image, text = self.embed_image(flow.image), self.embed_text(flow.text[: len(flow.image)])
        log_scale, bias = self.temperature()
        return Embeddings(image, text, log_scale, bias, Identity(flow.image_ids, flow.caption_ids))

    def forward(self, flow: Flow) -> Flow:
        embeddings = self.embed(flow)
        loss, counts = _pulled_loss(flow, embeddings) if flow.pulled.numel() else embeddings.loss(self.group)
        flow = flow._replace(
            image_embeddings=embeddings.image.detach(),
            text_embeddings=embeddings.text.detach(),
            log_scale=embeddings.log_scale.detach(),
        )
        return flow.reporting("contrastive", loss, counts)


def _pulled_loss(flow: Flow, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """The global batch's loss, whose gradient here is the one that a first pass found for these embeddings."""
    loss, right, asked, *scalar_pulls = flow.pulled
    surrogate = (embeddings.image * flow.image_pull).sum() + (embeddings.text * flow.text_pull).sum()
    for scalar, pull in zip(embeddings.scalars(), scalar_pulls, strict=True):
        surrogate = surrogate + (scalar.float() * pull).sum()
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
    bias = parts[0].bias
    whole = Embeddings(
        image=torch.cat([part.image for part in parts]).requires_grad_(),
        text=torch.cat([part.text for part in parts]).requires_grad_(),
        log_scale=parts[0].log_scale.detach().float().requires_grad_(),
        bias=None if bias is None else bias.detach().float().requires_grad_(),
        identity=Identity(
            torch.cat([part.identity.image_ids for part in parts]),
            torch.cat([part.identity.caption_ids for part in parts]),
        ),
    )
    with torch.enable_grad():
        loss, counts = whole.loss(group)
        image_pull, text_pull, *scalar_pulls = torch.autograd.grad(loss, (whole.image, whole.text, *whole.scalars()))
    pulls: list[dict[str, Tensor]] = []
    sizes = [len(part.image) for part in parts]
    for image, text in zip(image_pull.split(sizes), text_pull.split(sizes), strict=True):
        counted = torch.zeros_like(counts) if pulls else counts  # once
        pulled = torch.cat([loss.detach()[None], counted.float(), *scalar_pulls])
        pulls.append({"image_pull": len(parts) * image, "text_pull": len(parts) * text, "pulled": pulled})
    return pulls


class AlignAndMine(Align):
    """Also lays out the fusion rows: [match; negative image; negative text; masked], as far as they are wanted.

    Each fusion layer then runs once for matching and masked language modelling together. An architecture that runs
    it once an objective gathers every ZeRO-3 parameter three times as often.
    """

    def __init__(
        self,
        config: ModelConfig,
        group: Group,
        *,
        sigmoid: bool,
        pool: int | None,
        pool_group: Group,
        masked: bool,
        seed: int,
    ) -> None:
        super().__init__(config, group, sigmoid=sigmoid)
        self.pool = pool
        self.pool_group = pool_group  # the ranks that a pool's samples lie on; None if every pool lies on one
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
                self.pool_group,
            )
            negative_images, negative_texts = negatives.image_rows, negatives.text_rows
            if self.pool_group is not None:
                flow, negative_images, negative_texts = self._with_fetched(flow, negative_images, negative_texts)
            text_rows += [own, own, negative_texts]
            image_rows += [own, negative_images, own]
            valid = torch.cat([torch.ones_like(negatives.image_valid), negatives.image_valid, negatives.text_valid])
            flow = flow._replace(negatives_valid=valid.long())
        if self.masked:
            text_rows.append(own + B)  # the second half of the text rows
            image_rows.append(own)
        chosen = torch.cat(text_rows)
        return flow._replace(text=flow.text[chosen], text_mask=flow.text_mask[chosen], image_rows=torch.cat(image_rows))

    def _with_fetched(self, flow: Flow, images: Tensor, texts: Tensor) -> tuple[Flow, Tensor, Tensor]:
        """Appends rows of any rank, (B,) indices each, to this rank's; returns where they are now."""
        B, R = len(flow.image), len(flow.text)
        group = self.pool_group
        by_image, by_text = find_route(images, B, group), find_route(texts, B, group)
        fetched = flow._replace(
            image=torch.cat([flow.image, fetch(flow.image, by_image, group)]),  # (2B, P, D)
            text=torch.cat([flow.text, fetch(flow.text[:B], by_text, group)]),  # (R + B, L, D)
            text_mask=torch.cat([flow.text_mask, fetch(flow.text_mask[:B], by_text, group)]),
        )
        appended = torch.arange(B, device=images.device)
        return fetched, B + appended, R + appended

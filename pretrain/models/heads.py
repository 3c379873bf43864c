"""Layers that end in a loss, and the temperature.

Shapes: B samples on this rank, R rows, L text length, D text width, E embedding width, K masked slots, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.collectives import Group
from pretrain.config import CaptioningConfig, Config, ContrastiveConfig, ObjectivesConfig
from pretrain.models.layer import COUNTS, LOSS, TARGETS, Layer, Objective, WiringError
from pretrain.models.towers import ImageProject, TextProject, Vocabulary
from pretrain.objectives.captioning import captioning_loss
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.objectives.masked_lm import masked_lm_loss
from pretrain.objectives.matching import matching_loss
from pretrain.objectives.sigmoid import sigmoid_loss

IDENTITY = ("image_ids", "caption_ids")


def objectives_of(config: ObjectivesConfig, **targets: Callable[[Tensor], Tensor]) -> list[Objective]:
    """The objectives that are on; `targets` as in Objective, by name."""
    sections = {name: getattr(config, name) for name in type(config).model_fields}
    return [Objective(name, section.weight, targets.get(name)) for name, section in sections.items() if section]


def reports(objective: str) -> tuple[str, str]:
    """The names under which a layer reports an objective."""
    return LOSS + objective, COUNTS + objective


class Temperature(nn.Module):
    """The learnable temperature, and the sigmoid loss's bias."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        # Log of 1 / temperature. ZeRO takes no 0-dim parameter. In bf16 it is rounded to about 1 %, its master not.
        self.log_scale = nn.Parameter(torch.empty(1))
        self.initial_values = {"log_scale": math.log(1 / config.temperature)}
        if config.loss == "sigmoid":
            self.bias = nn.Parameter(torch.empty(1))  # in bf16, -10 is rounded to 0.03
            self.initial_values["bias"] = -10.0  # Zhai et al. (2023), section 3.2

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self.parameters())


class ContrastiveHead(nn.Module):
    """Compares all images with all captions of a micro-step, or of a step."""

    def __init__(self, group: Group) -> None:
        """`group`: the ranks whose samples are negatives."""
        super().__init__()
        self.group = group

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_ids: Tensor,
        caption_ids: Tensor,
        log_scale: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, E) embeddings, (B,) ids, (1,) log of the inverse temperature and, of the sigmoid loss, (1,) bias."""
        identity = Identity(image_ids, caption_ids)
        if bias is not None:
            return sigmoid_loss(image, text, log_scale, bias, identity, self.group)
        return contrastive_loss(image, text, log_scale, identity, self.group)


class MatchingHead(nn.Module):
    """Says of a pair of caption and image whether they belong together."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """(R, L, D) fused rows -> (R, 2) logits; class 1 means "belongs together"."""
        return self.classify(self.norm(tokens[:, 0]))


class MatchingLoss(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """(R, 2), (R,) int64, (R,) bool."""
        return matching_loss(logits, labels, valid)


class MaskedLMHead(nn.Module):
    """Names the hidden pieces; sees the masked places only, not all L."""

    def __init__(self, width: int, vocabulary: int, group: Group) -> None:
        """`group`: the ranks that the vocabulary is cut over."""
        super().__init__()
        self.vocabulary, self.group = vocabulary, group
        self.norm = nn.LayerNorm(width)
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) fused masked rows, (B, K) places to predict, (B, K) what stood there."""
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        hidden = F.gelu(self.transform(self.norm(tokens[rows, positions])))
        logits = self.decode(self.transform_norm(hidden))  # (B, K, V), or this rank's share of V
        return masked_lm_loss(logits, targets, self.vocabulary, self.group)


class CaptionHead(nn.Module):
    """Says of each token of a caption which one follows."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.decode = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(R, L, D) -> (R, L, V) logits, or this rank's share of V."""
        return self.decode(self.norm(tokens))


class CaptionLoss(nn.Module):
    def __init__(self, config: CaptioningConfig, vocabulary: Vocabulary, group: Group) -> None:
        """`group`: the ranks that the vocabulary is cut over."""
        super().__init__()
        self.loss = partial(
            captioning_loss,
            pad=vocabulary.pad,
            vocabulary=vocabulary.size,
            group=group,
            smoothing=config.label_smoothing,
        )

    def forward(self, logits: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(R, L, V) logits or a share of them, (R, L) the captions, (1,) target tokens of an average micro-batch."""
        return self.loss(logits, ids, targets)


def contrast(config: Config, tokens: str, group: Group, image_tokens: str = "image_tokens") -> list[Layer]:
    """From captions' and images' tokens, which are named, to embeddings and the contrastive loss."""
    model, contrastive = config.model, config.objectives.contrastive
    if contrastive is None:
        raise WiringError("its embeddings need objectives.contrastive, which is off: switch it on")
    assert model.embed
    scalars = ("log_scale", "bias") if contrastive.loss == "sigmoid" else ("log_scale",)
    image, text = (model.image.width, model.embed), (model.text.width, model.embed)
    return [
        Layer("image_project", partial(ImageProject, *image), (image_tokens,), ("image_embeddings",)),
        Layer("text_project", partial(TextProject, *text), (tokens,), ("text_embeddings",)),
        Layer("temperature", partial(Temperature, contrastive), (), scalars),
        Layer(
            "contrastive_head",
            partial(ContrastiveHead, group),
            ("image_embeddings", "text_embeddings", *IDENTITY, *scalars),
            reports("contrastive"),
            together=contrastive.negatives == "global_batch",
        ),
    ]


def matching(width: int, tokens: str) -> list[Layer]:
    """The matching objective over pairs, whose fused tokens are named."""
    return [
        Layer("matching_head", partial(MatchingHead, width), (tokens,), ("match_logits",)),
        Layer("matching_loss", MatchingLoss, ("match_logits", "pairs/label", "pairs/valid"), reports("matching")),
    ]


def masked_lm(width: int, vocabulary: int, tokens: str, group: Group) -> Layer:
    """The masked-language-model objective over masked captions, whose fused tokens are named."""
    reads = (tokens, "masked_positions", "masked_targets")
    return Layer("masked_lm_head", partial(MaskedLMHead, width, vocabulary, group), reads, reports("masked_lm"))


def captioning(
    config: CaptioningConfig, width: int, vocabulary: Vocabulary, tokens: str, ids: str, group: Group
) -> list[Layer]:
    """The captioning objective over captions whose decoded tokens and ids are named; see `captioning_loss`."""
    loss = partial(CaptionLoss, config, vocabulary, group)
    return [
        Layer("caption_head", partial(CaptionHead, width, vocabulary.size), (tokens,), ("caption_logits",)),
        Layer("caption_loss", loss, ("caption_logits", ids, TARGETS + "captioning"), reports("captioning")),
    ]

"""The model's part of the config: its sections, what a size fills in, and the table of architectures."""

import difflib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from data_pipelines.config import Section


class ImageTowerConfig(Section):
    """A vision transformer over square patches."""

    size: int = Field(gt=0)
    """Side of the square image, in pixels."""
    patch: int = Field(gt=0)
    """Side of a patch, in pixels; divides `size`."""
    width: int = Field(gt=0)
    depth: int = Field(ge=0)
    heads: int = Field(gt=0)

    @property
    def num_patches(self) -> int:
        return (self.size // self.patch) ** 2


class TextTowerConfig(Section):
    """A transformer over the caption."""

    length: int = Field(ge=3)
    """Tokens a caption is cut or padded to, [CLS] and [SEP] included."""
    width: int = Field(gt=0)
    depth: int = Field(ge=0)
    heads: int = Field(gt=0)


class FusionConfig(Section):
    """Text blocks that also attend to the image; as wide as the text tower."""

    depth: int = Field(gt=0)
    heads: int = Field(gt=0)


class DecoderConfig(Section):
    """Causal text blocks that attend to learned queries of the image, and write captions; as wide as the text tower."""

    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    queries: int = Field(gt=0)
    """What the decoder sees of an image: so many pooled tokens."""


class JointConfig(Section):
    """Blocks over captions and patches in one row; as wide as both towers, which then may have no blocks."""

    depth: int = Field(gt=0)
    heads: int = Field(gt=0)


class Size(NamedTuple):
    """What a size fills in."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    length: int
    embed: int
    queries: int = 256


SIZES = {
    "tiny": Size(64, 8, 128, 4, 4, length=24, embed=64, queries=32),
    "small/16": Size(224, 16, 384, 12, 6, length=32, embed=256),
    "base/16": Size(224, 16, 768, 12, 12, length=32, embed=256),
    "large/16": Size(224, 16, 1024, 24, 16, length=32, embed=512),
}


class Choice(NamedTuple):
    """An architecture, as far as the config knows it."""

    module: str
    """Where its list of layers is made."""
    objectives: tuple[str, ...]
    """What it can be trained with; all of it, unless the config says otherwise."""
    sections: Callable[[Size], dict[str, Any]]
    """Its depths beyond a text tower of none and an image tower of all blocks, by a size."""


ARCHITECTURES = {
    # Half of the text stack is fused (ALBEF, section 3.1).
    "albef": Choice(
        "pretrain.models.albef",
        ("contrastive", "matching", "masked_lm"),
        lambda size: {"text": {"depth": size.depth // 2}, "fusion": {"depth": size.depth // 2, "heads": size.heads}},
    ),
    "clip": Choice("pretrain.models.clip", ("contrastive",), lambda size: {"text": {"depth": size.depth}}),
    "blip": Choice(
        "pretrain.models.blip",
        ("contrastive", "matching", "captioning"),
        lambda size: {"text": {"depth": size.depth}},
    ),
    # Half of the text stack looks at the image, at 256 queries of it (CoCa, section 3.2).
    "coca": Choice(
        "pretrain.models.coca",
        ("contrastive", "captioning"),
        lambda size: {
            "text": {"depth": size.depth // 2},
            "decoder": {"depth": size.depth // 2, "heads": size.heads, "queries": size.queries},
        },
    ),
    "vilt": Choice(
        "pretrain.models.vilt",
        ("matching", "masked_lm"),
        lambda size: {
            "image": {"depth": 0},
            "text": {"depth": 0},
            "joint": {"depth": size.depth, "heads": size.heads},
        },
    ),
}


class ModelConfig(Section):
    """The architecture and its size. `size` fills in whatever is not given."""

    architecture: str = "albef"
    """albef: two towers and a fusion stack. clip: two towers. coca: two towers and a decoder that writes captions.
    blip: an image tower, and one text stack that reads, judges and writes captions. vilt: one stream."""
    size: Literal["tiny", "small/16", "base/16", "large/16"] = "base/16"
    image: ImageTowerConfig
    text: TextTowerConfig
    fusion: FusionConfig | None = None
    decoder: DecoderConfig | None = None
    joint: JointConfig | None = None
    embed: int | None = Field(default=None, gt=0)
    """Width of the space in which images and captions are compared, where the architecture has the contrastive
    objective."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        size = SIZES.get(str(given.get("size")), SIZES["base/16"])
        preset: dict[str, Any] = {
            "image": {"size": size.image, "patch": size.patch, "width": size.width, "depth": size.depth},
            "text": {"length": size.length, "width": size.width},
        }
        preset["image"]["heads"] = preset["text"]["heads"] = size.heads
        choice = ARCHITECTURES.get(str(given.get("architecture")), ARCHITECTURES["albef"])
        for name, section in choice.sections(size).items():
            preset[name] = preset.get(name, {}) | section
        if choice and "contrastive" in choice.objectives:
            preset["embed"] = size.embed
        filled = preset | given
        for name, section in preset.items():
            if isinstance(section, dict) and isinstance(filled[name], dict):
                filled[name] = section | filled[name]
        return filled

    @field_validator("architecture")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ARCHITECTURES:
            near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0)
            raise ValueError(f"{name!r} is none of {', '.join(ARCHITECTURES)}: did you mean {near[0]!r}?")
        return name

    @property
    def towers(self) -> dict[str, Any]:
        """The sections that are stacks of blocks, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: section for name, section in sections.items() if isinstance(section, Section)}

    @model_validator(mode="after")
    def _shapes_fit(self) -> "ModelConfig":
        choice = ARCHITECTURES[self.architecture]
        needed = {"image", "text", *choice.sections(SIZES["tiny"])}
        if "contrastive" in choice.objectives:
            needed.add("embed")
        for name in sorted(needed ^ {*self.towers, *(["embed"] if self.embed else [])}):
            has, change = ("needs", "remove `null`") if name in needed else ("has no", "remove it")
            raise ValueError(f"model.architecture {self.architecture} {has} model.{name}: {change}")
        if self.image.size % self.image.patch:
            raise ValueError(
                f"model.image.size {self.image.size} is not a multiple of model.image.patch "
                f"{self.image.patch}: choose a size that is"
            )
        for name, tower in self.towers.items():
            width = self.image.width if name == "image" else self.text.width
            if tower.depth == 0 and self.joint is None:
                raise ValueError(
                    f"model.{name}.depth is 0, and only blocks of model.joint make up for a tower without blocks: set "
                    f"it to 1 or more"
                )
            if tower.depth and width % tower.heads:
                raise ValueError(
                    f"model.{name}.heads {tower.heads} does not divide the width {width}: choose a number that does"
                )
        if self.joint and self.image.width != self.text.width:
            raise ValueError(
                f"model.image.width {self.image.width} is not model.text.width {self.text.width}, and blocks of "
                f"model.joint see patches and captions in one row: make them equal"
            )
        return self

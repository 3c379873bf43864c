"""The `data:` section of a config, and the strict base that every section shares."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


Weight = Annotated[float, Field(ge=0)]


class SourceConfig(Section):
    """One source of a mixture: a manifest and how much of the run it makes up."""

    manifest: Path
    """Written by `python -m data_pipelines index`, `pack` or `demo`."""

    weight: Weight | dict[Annotated[int, Field(ge=0)], Weight] | None = None
    """Share of the samples, relative to the other sources' weights; or shares by the step from which they hold,
    as in `{0: 3, 20000: 1}`. What was read before a change stays as it was."""

    epochs: float | None = Field(default=None, ge=0)
    """Instead of weights: how often this source is read in the time that the others are read `epochs` times."""

    @model_validator(mode="after")
    def _has_one_share_from_the_first_step_on(self) -> "SourceConfig":
        if self.weight is not None and self.epochs is not None:
            raise ValueError(f"weight {self.weight} and epochs {self.epochs} are both given: remove one of them")
        if isinstance(self.weight, dict) and 0 not in self.weight:
            raise ValueError(f"weight {self.weight} does not say what holds from step 0 on: add `0: ...` to it")
        return self


class AugmentConfig(Section):
    """What is done to a training image after the crop; every draw is keyed by the sample's position."""

    rand_augment: tuple[Annotated[int, Field(ge=0, le=10)], Annotated[int, Field(ge=0, le=10)]] | None = None
    """[operations, magnitude]; ALBEF has [2, 7]. Two of its ten operations stretch each colour by itself."""

    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Brightness, contrast and saturation are each scaled by a factor from 1 - this to 1 + this."""

    gaussian_blur: float = Field(default=0.0, ge=0, le=1)
    """Share of the images that are blurred, by a standard deviation of 0.1 to 2 pixels (at 224; SimCLR's)."""


class CacheConfig(Section):
    """A folder on a local disk where remote shards are kept; all processes of a node share it."""

    folder: Path
    limit_gib: float = Field(gt=0)
    """The shards used longest ago are removed to stay below it. Below the shards that the ranks of a node read at the
    same time, one a lane at most, they are downloaded again and again."""


class DataConfig(Section):
    """Which shards to read, and how one sample becomes tensors."""

    train: Path | dict[Annotated[str, Field(pattern=r"^[\w-]+$")], SourceConfig]
    """A manifest; or a mixture, `{name: {manifest: ..., weight: ...}, ...}`, whose names key the order of the data."""

    heldout: Path | None = None
    """Manifest of the held-out shards; none means no evaluation while training."""

    tokenizer: Path
    """A sentencepiece `.model` file, or the folder of a Hugging Face tokenizer."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a training crop covers, drawn uniformly between the two."""

    flip: bool = False
    """Mirror half of the images, but none whose caption says left or right, which would become false."""

    exif_orientation: bool = True
    """Turn images as their EXIF orientation says, as viewers do; false for shards whose pixels have been turned and
    whose tag stayed."""

    augment: AugmentConfig = AugmentConfig()

    cache: CacheConfig | None = None
    """Where remote shards are kept; without one, samples of remote shards are read by range requests."""

    patience_s: float = Field(300, gt=0)
    """How long a remote read is tried again before the run stops."""

    workers: int = Field(2, ge=0)
    """Decoding processes per rank; 0 decodes in the training process. Never changes the order."""

    grain: int = Field(16, ge=1)
    """Consecutive samples that always travel together. Fixed for the life of a run; it divides the
    micro-batch per rank; a matching pool divides it, or is a multiple of it."""

    lanes: int | None = Field(default=None, ge=1)
    """Parallel lanes the epoch is cut into; by default as many, of 960 and its divisors, as lose at most
    1 % of an epoch."""

    window: int = Field(2048, ge=1)
    """Samples of a lane that are shuffled among themselves."""

    max_bad_samples: int = Field(16, ge=0)
    """Samples that may be replaced because they cannot be read, whatever the length of the run ..."""

    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """... and beyond those, this share of the samples taken. The run stops when both are used up."""

    @field_validator("train")
    @classmethod
    def _has_comparable_sources(cls, value: Path | dict[str, SourceConfig]) -> Path | dict[str, SourceConfig]:
        if isinstance(value, Path):
            return value
        by_epochs = [name for name, source in value.items() if source.epochs is not None]
        if by_epochs and len(by_epochs) < len(value):
            other = next(name for name in value if name not in by_epochs)
            raise ValueError(
                f"data.train.{by_epochs[0]} has epochs and data.train.{other} has not, so that their shares cannot be "
                f"compared: give all of them epochs, or all of them weights"
            )
        if not value:
            raise ValueError("data.train names no source: give a manifest, or `name: {manifest: ...}`")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _is_a_range_of_shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale [{low}, {high}] must be two shares of the area with 0 < low <= high <= 1")
        return value

    def misfit(self, global_batch: int, accumulation: int, data_parallel: int) -> str | None:
        """Why a step does not divide into whole grains, in one sentence; None if it does."""
        share = data_parallel * accumulation * self.grain
        if global_batch % share == 0 and global_batch > 0:
            return None
        below = global_batch // share * share
        fixes = [f"{below:,} or {below + share:,} samples" if below else f"{share:,} samples", "a smaller data.grain"]
        grains = global_batch // (accumulation * self.grain)
        if grains > 0 and global_batch % (accumulation * self.grain) == 0:  # other ranks take the same step
            ranks = [number for number in range(1, min(grains, 2 * data_parallel) + 1) if grains % number == 0]
            near = sorted(sorted(ranks, key=lambda number: abs(number - data_parallel))[:4])
            many = f"{', '.join(f'{number:,}' for number in near[:-1])} or " if near[1:] else ""
            fixes.append(f"{many}{near[-1]:,} data-parallel rank{'s' if near != [1] else ''}")
        s = "s" if data_parallel > 1 else ""
        return (
            f"training.global_batch {global_batch:,} does not divide into whole grains: {data_parallel:,} "
            f"data-parallel rank{s} x training.accumulation {accumulation} x data.grain {self.grain} = {share:,} must "
            f"divide it; use {', '.join(fixes[:-1])}, or {fixes[-1]}."
        )

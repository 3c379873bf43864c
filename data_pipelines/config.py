"""The `data:` section of a config, and the strict base that every section shares."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which shards to read, and how one sample becomes tensors."""

    train: Path
    """Manifest of the training shards, written by `python -m data_pipelines index`, `pack` or `demo`."""

    heldout: Path | None = None
    """Manifest of the held-out shards; none means no evaluation while training."""

    tokenizer: Path
    """A sentencepiece `.model` file, or the folder of a Hugging Face tokenizer."""

    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the image's area that a training crop covers, drawn uniformly between the two."""

    flip: bool = False
    """Mirror half of the images. Off by default: captions that say left or right would become false."""

    workers: int = Field(2, ge=0)
    """Decoding processes per rank; 0 decodes in the training process. Never changes the order."""

    grain: int = Field(16, ge=1)
    """Consecutive samples that always travel together. Fixed for the life of a run; it divides the
    micro-batch per rank, and a matching pool divides it."""

    lanes: int | None = Field(None, ge=1)
    """Parallel lanes the epoch is cut into; by default as many, of 960 and its divisors, as lose at most
    1 % of an epoch."""

    window: int = Field(2048, ge=1)
    """Samples of a lane that are shuffled among themselves."""

    max_bad_samples: int = Field(16, ge=0)
    """Samples that may be replaced because they cannot be read, whatever the length of the run ..."""

    max_bad_fraction: float = Field(0.001, ge=0, le=1)
    """... and beyond those, this share of the samples taken. The run stops when both are used up."""

    @field_validator("crop_scale")
    @classmethod
    def _is_a_range_of_shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale [{low}, {high}] must be two shares of the area with 0 < low <= high <= 1")
        return value

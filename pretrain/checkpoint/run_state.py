"""What a run says of itself in a checkpoint's run.json, as far as going on from it, or evaluating it, relies on it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pretrain.checkpoint.index import Count, first_of
from pretrain.checkpoint.verify import read_run
from pretrain.errors import CheckpointError


class _Config(BaseModel):
    """The whole is checked by the config's own model, where it is used."""

    model_config = ConfigDict(strict=True, extra="allow")

    seed: int
    data: dict[str, Any]
    model: dict[str, Any]
    objectives: dict[str, dict[str, Any] | None]


class _RunState(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    step: Count
    applied_steps: Count
    skipped_steps: Count
    bad_samples: Count
    samples: Count
    data: dict[str, Any]  # checked where it is used
    config: _Config
    tokenizer: str
    layout: dict[str, int]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the run of a checkpoint said of itself as it was saved.

    Raises:
        CheckpointError: something is missing, or is of another type.
    """
    run = read_run(checkpoint)
    try:
        _RunState.model_validate(run)
    except ValidationError as error:
        raise CheckpointError(
            f"The checkpoint {checkpoint} cannot be read: run.json: {first_of(error)}. Restore it from a copy, or go "
            f"on from another one."
        ) from None
    return run

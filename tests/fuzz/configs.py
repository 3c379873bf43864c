"""Configs spoilt in many ways: each is read to the end, or refused in one sentence."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from fuzz.sources import spoilt
from pretrain.config import load_config
from pretrain.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def try_config(folder: Path, seed: int, outcomes: Counter[str], number: int) -> None:
    """Reads one spoilt recipe.

    Raises:
        AssertionError: What was said is no sentence.
    """
    rng = Random(f"{seed}-{number}")
    path = folder / "spoilt.yaml"
    path.write_bytes(spoilt(RECIPES[number % len(RECIPES)].read_bytes(), rng))
    try:
        config = load_config(path)
    except ConfigError as error:
        message = str(error)
        assert message.endswith((".", "?")), message
        assert str(path) in message, message
        outcomes["config: refused"] += 1
    else:
        assert config.training.steps > 0
        outcomes["config: read"] += 1

"""A run on more or fewer ranks takes the same steps: the same global batch, in as many micro-steps as fit.

What a rank holds at once is a micro-batch. Where accumulation is no part of the recipe, because contrastive negatives
are of the whole global batch, it follows the number of ranks, so that no rank holds more samples than before.
"""

import json
from pathlib import Path
from typing import Any

from pretrain.config import Config
from pretrain.errors import ConfigError
from pretrain.parallel.mesh import Mesh


def adapt(config: Config, mesh: Mesh) -> tuple[Config, dict[str, int]]:
    """The config for these ranks, and what a later start has to know of it. All ranks call it together.

    An accumulation that the user has changed since the last start is taken as it is.

    Raises:
        ConfigError: the run has begun with steps that do not divide over these ranks; the message names those that do.
    """
    known = mesh.world.from_first(_of_the_last_start(config.output / "checkpoints") if mesh.is_main else None)
    asked, held = config.training.accumulation, 0
    if known is not None:
        fits = [asked]
        if _is_free(config):
            whole = config.training.global_batch // config.data.grain
            fits = [number for number in range(1, whole + 1) if whole % number == 0]
            if known.get("accumulation") == asked:
                held = known.get("micro_batch_per_rank", 0)
                config = _with_accumulation(config, _smallest(fits, whole, held // config.data.grain, mesh) or asked)
        _check_ranks(config, mesh, fits)
    micro_batch = config.training.global_batch // (config.training.accumulation * mesh.dp.size)
    return config, {"accumulation": asked, "micro_batch_per_rank": max(held, micro_batch)}


def _of_the_last_start(checkpoints: Path) -> dict[str, Any] | None:
    """What `adapt` gave to the newest checkpoint; empty if that cannot be read, None if there is none."""
    folders = sorted(checkpoints.glob("step-*"), reverse=True)
    for folder in folders:
        try:
            return dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))["elastic"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {} if folders else None


def _is_free(config: Config) -> bool:
    """Whether accumulation changes nothing that is optimised."""
    contrastive, matching = config.objectives.contrastive, config.objectives.matching
    pools_fit = matching is None or config.data.grain % matching.pool == 0  # else they are pools of a micro-step
    return contrastive is not None and contrastive.negatives == "global_batch" and pools_fit


def _smallest(accumulations: list[int], grains: int, grains_held: int, mesh: Mesh) -> int | None:
    """The fewest micro-steps in which no rank holds more grains than before."""
    size = mesh.dp.size
    fitting = (n for n in accumulations if grains % (n * size) == 0 and grains // (n * size) <= grains_held)
    return next(fitting, None)


def _with_accumulation(config: Config, accumulation: int) -> Config:
    training = config.training.model_copy(update={"accumulation": accumulation})
    return config.model_copy(update={"training": training})


def _check_ranks(config: Config, mesh: Mesh, accumulations: list[int]) -> None:
    """Refuses a number of processes that would need another batch or grain than a run has begun with."""
    training, grain = config.training, config.data.grain
    grains, rest = divmod(training.global_batch, min(accumulations) * grain)
    if rest or training.global_batch % (training.accumulation * grain * mesh.dp.size) == 0:
        return
    per_replica = mesh.world.size // mesh.dp.size
    *some, last = [str(ranks * per_replica) for ranks in range(1, grains + 1) if grains % ranks == 0]
    raise ConfigError(
        f"The run in {config.output} has begun, and a step of it ({training.global_batch:,} samples / "
        f"training.accumulation {min(accumulations)} = {grains} grains of {grain}) does not divide over "
        f"{mesh.world.size} processes: use {', '.join(some)}{' or ' if some else ''}{last} processes."
    )

"""What makes a checkpoint belong to a run: the same model, seed and tokenizer. The order of the data checks itself."""

from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.config import Config
from pretrain.errors import CheckpointError


def check_same_run(run: dict[str, Any], config: Config, tokenizer: str, where: str) -> None:
    """Compares a checkpoint's `run.json` with the run that wants to go on from it.

    Everything else may change; docs/resume.md has the table, key by key, and a test holds it to this function.

    Args:
        run: what the checkpoint was saved with.
        config: the config of this run.
        tokenizer: fingerprint of this run's tokenizer.
        where: the checkpoint's path, for the message.

    Raises:
        CheckpointError: naming the first key that differs, and both values.
    """
    saved, here = run["config"], config.model_dump(mode="json")
    pairs = [("seed", saved["seed"], here["seed"])]
    pairs += _leaves("model", saved["model"], here["model"])
    for name, section in here["objectives"].items():  # a head more or less is another model
        state = {True: "on", False: "off"}
        pairs.append((f"objectives.{name}", state[bool(saved["objectives"].get(name))], state[bool(section)]))
    loss = [tree["objectives"]["contrastive"].get("loss", "softmax") for tree in (saved, here)]
    pairs.append(("objectives.contrastive.loss", *loss))  # its bias is a parameter
    for key, old, new in pairs:
        if old != new:
            raise CheckpointError(
                f"The checkpoint {where} is of another run: {key} is {old} in it and {new} in the config. Restore the "
                f"config, or choose another output folder."
            )
    if run["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"The checkpoint {where} was trained with another tokenizer than {config.data.tokenizer}: its token ids "
            f"would mean other words. Restore data.tokenizer, or choose another output folder."
        )


def changes(saved: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """ "key: a -> b" for every key of two configs, as trees of plain values, that differs."""
    for key in {**saved, **here}:
        old, new = saved.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    return "null" if value is None else str(value)


def _leaves(key: str, saved: Any, here: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each value of a section here, and what it was."""
    if isinstance(saved, dict) and isinstance(here, dict):
        for name, value in here.items():
            yield from _leaves(f"{key}.{name}", saved.get(name), value)
    else:
        yield key, saved, here

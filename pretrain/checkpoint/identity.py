"""What makes a checkpoint belong to a run: the same model, seed and tokenizer. The order of the data checks itself."""

from typing import Any

from pretrain.config import Config
from pretrain.errors import CheckpointError


def check_same_run(run: dict[str, Any], config: Config, tokenizer: str, where: str) -> None:
    """Compares a checkpoint's `run.json` with the run that wants to go on from it.

    Everything else may change: batch, layout, weights of objectives, learning rate, length.

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
    pairs += [(f"model.{key}", saved["model"].get(key), value) for key, value in here["model"].items()]
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

"""Zero-shot classification by a `prompts.json` beside the shards. Source: CLIP, section 3.1.4.

Shapes: I images, E embedding width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.errors import DataError
from pretrain.scores import Score
from pretrain.screen import say


@dataclass(frozen=True)
class Prompts:
    """Which field of a sample's json names its class, and what is said of each class."""

    path: Path
    field: str
    classes: dict[str, list[str]]


def prompts_beside(manifest: Path) -> Prompts | None:
    """Reads `prompts.json` next to a manifest, if it is there.

    Raises:
        DataError: it is not what it should be.
    """
    path = manifest.with_name("prompts.json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = {name: [said] if isinstance(said, str) else said for name, said in content["classes"].items()}
        if not isinstance(content["field"], str) or not classes:
            raise ValueError("no field, or no classes")
        for name, said in classes.items():
            if not (isinstance(said, list) and said and all(isinstance(prompt, str) and prompt for prompt in said)):
                raise ValueError(f"the prompts of {name!r} are no list of texts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{path} cannot be used ({error}): write {{"field": "label", "classes": {{"cat": ["a photo of a cat"]}}}}.'
        ) from None
    return Prompts(path, content["field"], classes)


def zero_shot_accuracy(
    images: Tensor, metadata: Sequence[Mapping[str, object]], prompts: Prompts, embed: Callable[[list[str]], Tensor]
) -> Score:
    """Each image's class by the nearest mean of its classes' prompts, among the classes that occur.

    Args:
        images: (I, E) unit-length embeddings.
        metadata: each image's json.
        prompts: what is said of each class.
        embed: texts to unit-length embeddings, as many rows.

    Raises:
        DataError: no image has a class.
    """
    truths = [str(fields[prompts.field]) if prompts.field in fields else None for fields in metadata]
    names = [name for name in prompts.classes if name in set(truths)]
    if not names:
        found = ", ".join(sorted({truth for truth in truths if truth is not None})[:5])
        raise DataError(
            f"No zero-shot accuracy: the field {prompts.field!r} of the samples' json "
            + (f"names none of the classes of {prompts.path}, but {found}." if found else "is in none of them.")
        )
    means = torch.stack([F.normalize(embed(prompts.classes[name]).mean(dim=0), dim=0) for name in names])
    guesses = (images @ means.T).argmax(dim=1).tolist()
    right = [names[guess] == truth for guess, truth in zip(guesses, truths, strict=True) if truth in names]
    if len(right) < len(truths):
        say(f"Zero-shot: {len(truths) - len(right)} of {len(truths)} images have no class of {prompts.path}.")
    of_all = f" of {len(prompts.classes)}" if len(names) < len(prompts.classes) else ""
    return Score(f"zero-shot accuracy, {len(names)}{of_all} classes", sum(right) / len(right), 1 / len(names))

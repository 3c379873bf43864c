"""`prompts.json` beside a manifest: what names a sample's class, and what is said of each class."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.errors import DataError
from pretrain.screen import say


@dataclass(frozen=True)
class Prompts:
    """The classes of a zero-shot classification."""

    path: Path
    field: str
    """Of the samples' json."""
    classes: dict[str, list[str]]
    """By name, as the field has it: captions of an image of this class."""

    @classmethod
    def beside(cls, manifest: Path) -> "Prompts | None":
        """Those next to a manifest, if there are any.

        Raises:
            DataError: the file is not what it should be.
        """
        path = manifest.with_name("prompts.json")
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            classes = {name: [said] if isinstance(said, str) else said for name, said in content["classes"].items()}
            if not isinstance(content["field"], str) or not classes:
                raise ValueError("no field, or no classes")
            for name, said in classes.items():
                if not (isinstance(said, list) and said and all(isinstance(prompt, str) and prompt for prompt in said)):
                    raise ValueError(f"the prompts of {name!r} are no list of texts")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path} cannot be used ({error}): write {{"field": "label", "classes": {{"cat": ["a photo of a '
                f'cat"]}}}}.'
            ) from None
        return cls(path, content["field"], classes)

    def classes_of(self, metadata: Sequence[Mapping[str, object]]) -> list[str | None]:
        """Each image's class, None where its json names none of these.

        Raises:
            DataError: no image has a class.
        """
        given = [str(fields[self.field]) if self.field in fields else None for fields in metadata]
        truths = [truth if truth in self.classes else None for truth in given]
        missing = truths.count(None)
        if missing == len(truths):
            found = ", ".join(sorted({truth for truth in given if truth is not None})[:5])
            raise DataError(
                f"No zero-shot accuracy: the field {self.field!r} of the samples' json "
                + (f"names none of the classes of {self.path}, but {found}." if found else "is in none of them.")
            )
        if missing:
            say(f"Zero-shot: {missing} of {len(truths)} images have no class of {self.path}.")
        return truths

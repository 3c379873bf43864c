"""What the folder of a run keeps, so that it is enough to evaluate the run wherever it is moved."""

import shutil
from functools import partial
from itertools import chain, count
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import write_atomically
from pretrain.screen import say

_TOKENIZER_FILES = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # of a Hugging Face folder; weights stay behind


def keep_config(folder: Path, text: str, step: int) -> None:
    """Writes config.yaml; one that held until `step`, and says something else, is kept beside it."""
    path = folder / "config.yaml"
    try:
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            path.replace(_unused(folder / f"config-until-step-{step}.yaml"))
        write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))
    except (OSError, DataError) as error:
        say(f"The config cannot be kept in {folder} ({error}); training goes on.")


def _unused(path: Path) -> Path:
    others = (path.with_stem(f"{path.stem}_{number}") for number in count(2))
    return next(candidate for candidate in chain([path], others) if not candidate.exists())


def keep_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Copies the tokenizer, without which a run cannot be evaluated."""
    try:
        if tokenizer.is_dir():
            for file in tokenizer.iterdir():
                if file.is_file() and file.suffix in _TOKENIZER_FILES:
                    write_atomically(folder / "tokenizer" / file.name, partial(shutil.copyfile, file))
        else:
            write_atomically(folder / "tokenizer.model", partial(shutil.copyfile, tokenizer))
    except (OSError, DataError) as error:
        say(f"The tokenizer cannot be kept in {folder} ({error}); `evaluate` will need data.tokenizer.")


def kept_tokenizers(folder: Path) -> list[Path]:
    """The copies that `keep_tokenizer` has made, if any."""
    return [path for path in (folder / "tokenizer.model", folder / "tokenizer") if path.exists()]

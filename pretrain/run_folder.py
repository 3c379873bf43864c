"""The folder of a run: used by one job at a time, and enough by itself to evaluate the run wherever it is moved."""

import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TextIO

from data_pipelines.errors import DataError, cannot_write
from data_pipelines.shards.manifest import write_atomically
from data_pipelines.text import to_json
from pretrain.errors import StorageError
from pretrain.screen import say

_LOCK = ".lock"
_PATIENCE_S = 5.0  # a job that was told to stop may be on its way out
_TOKENIZER_FILES = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # of a Hugging Face folder; weights stay behind


def claim(folder: Path) -> TextIO:
    """Makes the folder and locks it for as long as the result is open; the system unlocks it however a job ends.

    Raises:
        StorageError: another job uses it.
        DataError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(f"the run's folder {folder} (output)", error) from None
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(_in_use(folder, lock)) from None
            time.sleep(0.2)
        except OSError as error:  # some network file systems have no locks
            say(f"{folder} cannot be locked ({error.strerror}): see to it that no other job writes there.")
            return lock
    with suppress(OSError):  # a full disk: the lock holds, without a name on it
        lock.truncate(0)
        lock.write(to_json({"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%F %T %Z")}))
        lock.flush()
    return lock


def _in_use(folder: Path, lock: TextIO) -> str:
    lock.seek(0)
    try:
        owner = json.loads(lock.read())
        who = f"by process {owner['pid']} on {owner['host']} since {owner['started']}"
    except (ValueError, KeyError, TypeError):
        who = "by another job"
    return f"The run's folder {folder} is in use {who}: stop that job first, or choose another output folder."


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

"""A folder of checkpoints: commit all or nothing, find the newest that is whole, keep a few.

```
checkpoints/step-000012000/     appears only by rename
  rank-00000.safetensors        fragments: fp32 master, moments
  index.json                    parameter -> shape, boxes and their files
  run.json                      step, data state, config, layout, versions
  MANIFEST.json                 file -> bytes, sha256
  COMMIT                        sha256 of MANIFEST.json
checkpoints/.tmp-step-...       in flight; swept at the next start
checkpoints/quarantine/         what failed verification, with the reason
checkpoints/LATEST              a hint for people, never read
```
Only safetensors and JSON: nothing here can run code when it is loaded.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.checkpoint.fragments import Written, merge_index, read_fragments, write_fragments
from pretrain.errors import CheckpointError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import Axis

PREFIX = "step-"


class CheckpointStore:
    """The checkpoints of one run. All ranks of `world` call each method together."""

    def __init__(self, folder: Path, world: Axis, keep: int) -> None:
        self.folder = folder
        self.world = world
        self.is_main = world.rank == 0
        self.keep = keep

    def save(self, step: int, fragments: Iterable[Fragment], run: dict[str, Any]) -> str | None:
        """Writes and commits a checkpoint, on all ranks or not at all.

        Args:
            step: optimizer steps taken.
            fragments: this rank's state.
            run: what the whole run needs to go on: plain JSON values, the same on every rank.

        Returns:
            None, or why there is no checkpoint: a failed save costs that save, not the run.
        """
        fragments = list(fragments)
        bytes_here = sum(4 * t.numel() for f in fragments if f.saved_here for t in f.tensors.values())
        total = sum(self.world.gather_objects(bytes_here))
        temporary, problem = self.world.from_first(self._begin(step, total) if self.is_main else None)
        if problem is not None:
            return problem
        try:
            written, problem = write_fragments(temporary / f"rank-{self.world.rank:05d}.safetensors", fragments), None
        except OSError as error:
            written, problem = None, _in_words(error)
        answers = self.world.gather_objects((written, problem))
        if self.is_main:
            problem = next((f"rank {rank}: {why}" for rank, (_, why) in enumerate(answers) if why), None)
            if problem is None:
                problem = self._commit(temporary, step, [part for part, _ in answers if part], run)
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return self.world.from_first(problem)

    def newest_valid(self, quarantine: bool = True) -> Path | None:
        """The newest checkpoint whose every byte is what was written, or None in a run that has none.

        A bad one is moved to `quarantine/` with the reason, and the next is tried. A reader beside a live run does
        not move anything: what it finds incomplete may just be going.

        Raises:
            CheckpointError: there are checkpoints, and none is valid. Never a silent fresh start.
        """
        names = self.world.from_first(self._names() if self.is_main else None)
        for name in reversed(names):
            problem = self._verify(self.folder / name)
            if problem is None:
                return self.folder / name
            if self.is_main and quarantine:
                self._quarantine(name, problem)
        reasons = self.folder / "quarantine"
        if names or self.world.from_first(reasons.is_dir()):  # also one that an earlier start filled
            raise CheckpointError(
                f"No checkpoint in {self.folder} is valid: the reasons are in {reasons}. Restore a checkpoint from a "
                f"copy, or start a new run with another output folder."
            )
        return None

    def load(self, checkpoint: Path, fragments: Iterable[Fragment]) -> None:
        """Fills this rank's fragments; see `read_fragments`."""
        read_fragments(checkpoint, fragments)

    def sweep(self) -> None:
        """Removes what an interrupted save left behind."""
        if self.is_main and self.folder.is_dir():
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _begin(self, step: int, total: int) -> tuple[Path, str | None]:
        temporary = self.folder / f".tmp-{PREFIX}{step:09d}-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir(parents=True)
            free = shutil.disk_usage(temporary).free
        except OSError as error:
            return temporary, _in_words(error)
        if free < 1.05 * total:
            temporary.rmdir()
            return temporary, (
                f"{self.folder} has {free / 2**30:.2f} GiB free, and a checkpoint takes {total / 2**30:.2f} GiB: make "
                f"space, or lower checkpoint.keep"
            )
        return temporary, None

    def _commit(self, temporary: Path, step: int, parts: list[Written], run: dict[str, Any]) -> str | None:
        final = self.folder / f"{PREFIX}{step:09d}"
        manifest = {part.file: {"bytes": part.bytes, "sha256": part.sha256} for part in parts}
        try:
            for name, content in (("index.json", merge_index(parts)), ("run.json", {**run, "step": step})):
                text = json.dumps(content, indent=1)
                _write_durably(temporary / name, text)
                manifest[name] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            text = json.dumps(manifest, indent=1)
            _write_durably(temporary / "MANIFEST.json", text)
            _write_durably(temporary / "COMMIT", hashlib.sha256(text.encode()).hexdigest())
            _fsync_folder(temporary)
            temporary.rename(final)
            _fsync_folder(self.folder)
        except OSError as error:
            return _in_words(error)
        with contextlib.suppress(OSError):  # it is there already; the hint may be old
            _write_durably(self.folder / "LATEST", final.name)
        for name in self._names()[: -self.keep]:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        return None

    def _verify(self, checkpoint: Path) -> str | None:
        """Why a checkpoint is not whole, or None. Each rank hashes its share of the files."""
        manifest, problem = self.world.from_first(_read_manifest(checkpoint) if self.is_main else None)
        if problem is not None:
            return problem
        share = sorted(manifest)[self.world.rank :: self.world.size]
        problems = [why for name in share if (why := _check_file(checkpoint / name, manifest[name]))]
        return next((why for found in self.world.gather_objects(problems) for why in found), None)

    def _names(self) -> list[str]:
        """Committed checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(entry.name for entry in self.folder.iterdir() if entry.name.startswith(PREFIX))

    def _quarantine(self, name: str, problem: str) -> None:
        target = self.folder / "quarantine" / f"{name}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(target)
        target.with_suffix(".reason.txt").write_text(problem + "\n")
        print(f"The checkpoint {name} is not whole ({problem}); it is now {target}.", flush=True)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `run`, and the step."""
    return json.loads((checkpoint / "run.json").read_text())


def _read_manifest(checkpoint: Path) -> tuple[dict[str, Any], str | None]:
    try:
        text = (checkpoint / "MANIFEST.json").read_bytes()
        commit = (checkpoint / "COMMIT").read_text()
    except (OSError, UnicodeDecodeError) as error:
        return {}, _in_words(error)
    if hashlib.sha256(text).hexdigest() != commit:
        return {}, "COMMIT is not the sha256 of MANIFEST.json"
    return json.loads(text), None


def _check_file(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["bytes"]:
                return f"{path.name} has {size} bytes instead of {expected['bytes']}"
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                return f"{path.name} has other content than was written"
    except OSError as error:
        return _in_words(error)
    return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _in_words(error: Exception) -> str:
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else str(error)

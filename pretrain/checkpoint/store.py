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
A checkpoint is a folder under the name that `save` gives to the step of its own run.json. Whatever else lies there,
copies included, is neither read nor deleted.

Only safetensors and JSON: nothing here can run code when it is loaded.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.fragments import Written, merge_index, read_fragments, write_fragments
from pretrain.checkpoint.retention import Keep
from pretrain.errors import CheckpointError, FencedError, StorageError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import Axis
from pretrain.screen import say

_NAME = re.compile(r"step-(\d{9,})")
_IN_FLIGHT = re.compile(r"\.tmp-step-\d{9,}-[0-9a-f]+")
_OUR_OTHERS = {"quarantine", "LATEST"}


def _name(step: int) -> str:
    return f"step-{step:09d}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there."""

    step: int
    write_s: float  # the slowest rank's writing, hashing and waiting for the disk


@dataclass(frozen=True)
class Failed:
    """A checkpoint that is not there: it costs this save, not the run."""

    step: int
    problem: str


class CheckpointStore:
    """The checkpoints of one run. All ranks of `world` call each method together."""

    def __init__(
        self,
        folder: Path,
        world: Axis,
        keep: Keep | None = None,
        still_owner: Callable[[], str | None] = lambda: None,
    ) -> None:
        """
        Args:
            folder: where they lie.
            world: all ranks of the run.
            keep: which of them stay.
            still_owner: called on the first rank before anything is committed, moved or removed; a sentence says why
                this run may no longer do so.
        """
        self.folder = folder
        self.world = world
        self.is_main = world.rank == 0
        self.keep = keep or Keep()
        self.still_owner = still_owner
        self._outcome: Saved | Failed | None = None

    def save(self, step: int, fragments: Iterable[Fragment], run: dict[str, Any]) -> None:
        """Begins to write a checkpoint; `settle` tells what became of it. One at a time.

        Args:
            step: optimizer steps taken.
            fragments: this rank's state, which may change again as soon as this returns.
            run: what the whole run needs to go on: plain JSON values, the same on every rank.
        """
        assert self._outcome is None, "one save at a time"
        begin = time.perf_counter()
        problem = self._save(step, fragments, run)
        elapsed_s = time.perf_counter() - begin
        self._outcome = Failed(step, problem) if problem else Saved(step, elapsed_s)

    def settle(self, wait: bool) -> Saved | Failed | None:
        """Commits what is written, on all ranks or not at all.

        Args:
            wait: until the save in flight is written; else None while it is.

        Returns:
            What became of the save in flight, once; None while it is being written, or if there is none.

        Raises:
            FencedError: another job owns the folder now.
        """
        outcome, self._outcome = self._outcome, None
        return outcome

    def _save(self, step: int, fragments: Iterable[Fragment], run: dict[str, Any]) -> str | None:
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
        self._check_owner()
        if self.is_main:
            if problem is None:
                problem = self._commit(temporary, step, [part for part, _ in answers if part], run)
            if problem is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return self.world.from_first(problem)

    def has_begun(self) -> bool:
        """Whether the run has saved before."""
        return bool(self._contents()[0])

    def newest_valid(self, quarantine: bool = True, step: int | None = None, before: int | None = None) -> Path | None:
        """The newest checkpoint whose every byte is what was written, or None in a run that has none.

        A bad one is moved to `quarantine/` with the reason, and the next is tried.

        Args:
            quarantine: False for a reader beside a live run, who moves nothing: what it finds incomplete may just be
                going.
            step: only the checkpoint of this step will do.
            before: only those of earlier steps will do.

        Raises:
            CheckpointError: there are checkpoints, and none is valid, or none is of that step. Never a silent fresh
                start.
            FencedError: another job owns the folder now.
        """
        steps, others = self.world.from_first(self._contents() if self.is_main else None)
        if before is not None:
            steps = [there for there in steps if there < before]
        if step is not None and step not in steps:
            there = f"those there are of {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"No checkpoint of step {step} in {self.folder}: {there}.")
        problems: list[str] = []
        for candidate in reversed(steps if step is None else [step]):
            name = _name(candidate)
            problem = self._verify(self.folder / name)
            if problem is None:
                return self.folder / name
            problems.append(f"{name}: {problem}")
            if quarantine:
                self._check_owner()
            if self.is_main and quarantine:
                try:
                    self._quarantine(name, f"is not whole ({problem})")
                except OSError as error:
                    raise StorageError(
                        f"The checkpoint {self.folder / name} is not whole ({problem}), and cannot be "
                        f"moved away ({_in_words(error)}): mend the disk, or remove it."
                    ) from None
        reasons = self.folder / "quarantine"
        if problems or self.world.from_first(reasons.is_dir()):  # also one that an earlier start filled
            why = f"the reasons are in {reasons}" if quarantine or not problems else "; ".join(problems)
            raise CheckpointError(
                f"No checkpoint in {self.folder} is valid: {why}. Restore a checkpoint from a "
                f"copy, or start a new run with another output folder."
            )
        if copies := self.world.from_first([name for name in others if self._is_committed(name)]):
            raise CheckpointError(
                f"{self.folder} holds {', '.join(copies)}, but nothing under the name of a checkpoint: rename one to "
                f"step-NNNNNNNNN, the step of its run.json in nine digits, to go on from it, or choose another output "
                f"folder."
            )
        return None

    def load(self, checkpoint: Path, fragments: Iterable[Fragment]) -> None:
        """Fills this rank's fragments; see `read_fragments`."""
        read_fragments(checkpoint, fragments)

    def sweep(self) -> None:
        """Removes what an interrupted save left behind, and names what is no checkpoint of this run.

        Raises:
            FencedError: another job owns the folder now.
        """
        self._check_owner()
        if not (self.is_main and self.folder.is_dir()):
            return
        for leftover in self.folder.iterdir():
            if _IN_FLIGHT.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        if others := self._contents()[1]:
            say(f"Left alone in {self.folder}, as no checkpoints of this run: {', '.join(others)}.")

    def _check_owner(self) -> None:
        if sentence := self.world.from_first(self.still_owner() if self.is_main else None):
            raise FencedError(sentence)

    def _begin(self, step: int, total: int) -> tuple[Path, str | None]:
        temporary = self.folder / f".tmp-{_name(step)}-{uuid.uuid4().hex[:8]}"
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
        final = self.folder / _name(step)
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
            if final.exists():  # a copy of another step under this one's name
                self._quarantine(final.name, f"is of another step than {step}, which is saved under this name")
            temporary.rename(final)
            _fsync_folder(self.folder)
        except OSError as error:
            return _in_words(error)
        with contextlib.suppress(OSError):  # it is there already; the hint may be old
            _write_durably(self.folder / "LATEST", final.name)
        steps = [saved for saved in self._contents()[0] if saved <= step]
        for saved in self.keep.superfluous(steps, best=None, pinned=[]):
            shutil.rmtree(self.folder / _name(saved), ignore_errors=True)
        return None

    def _verify(self, checkpoint: Path) -> str | None:
        """Why a checkpoint is not whole, or None. Each rank hashes its share of the files."""
        manifest, problem = self.world.from_first(_read_manifest(checkpoint) if self.is_main else None)
        if problem is not None:
            return problem
        share = sorted(manifest)[self.world.rank :: self.world.size]
        problems = [why for name in share if (why := _check_file(checkpoint / name, manifest[name]))]
        return next((why for found in self.world.gather_objects(problems) for why in found), None)

    def _contents(self) -> tuple[list[int], list[str]]:
        """The steps of the committed checkpoints, ascending, and the names of whatever else lies there."""
        steps, others = [], []
        for entry in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            match = _NAME.fullmatch(entry.name)
            if match and _name(int(match[1])) == entry.name and entry.is_dir() and not _is_of_another_step(entry):
                steps.append(int(match[1]))
            elif entry.name not in _OUR_OTHERS and not entry.name.startswith("."):
                others.append(entry.name)
        return sorted(steps), others

    def _is_committed(self, name: str) -> bool:
        return (self.folder / name / "COMMIT").is_file()

    def _quarantine(self, name: str, problem: str) -> None:
        target = self.folder / "quarantine" / f"{name}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(target)
        target.with_suffix(".reason.txt").write_text(problem + "\n")
        say(f"The checkpoint {name} {problem}; it is now {target}.")


def read_run(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `run`, and the step."""
    return json.loads((checkpoint / "run.json").read_text())


def _is_of_another_step(checkpoint: Path) -> bool:
    """Whether its run.json is whole and says another step than its name: someone's copy. Damage is no such thing."""
    try:
        text = (checkpoint / "run.json").read_bytes()
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
        whole = manifest["run.json"]["sha256"] == hashlib.sha256(text).hexdigest()
        return whole and _name(json.loads(text)["step"]) != checkpoint.name
    except (OSError, ValueError, KeyError, TypeError):
        return False


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

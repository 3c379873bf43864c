"""A folder of checkpoints: commit all or nothing, find the newest that is whole, keep a few.

```
checkpoints/step-000012000/     appears only by rename
  node-00000.safetensors        what the ranks of a node hold: fp32 master, moments
  index.json, intervals.bin     parameters, their parts, and where they are stored
  run.json                      step, data state, config, layout, versions
  MANIFEST.json                 file -> bytes and sha256 of its pieces
  COMMIT                        sha256 of MANIFEST.json
  PINNED                        if it is to stay; not part of what is verified
checkpoints/.tmp-step-...       being written or removed; swept at the next start
checkpoints/quarantine/         what failed verification, with the reason
checkpoints/LATEST              a hint for people, never read
checkpoints/scores.json         what held-out data said of checkpoints, for the best to stay
```
A checkpoint is a folder under the name that `save` gives to the step of its own run.json. Whatever else lies there,
copies included, is neither read nor deleted.

Only safetensors, JSON and plain numbers: nothing here can run code when it is loaded.
"""

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.text import to_json
from pretrain.checkpoint import manifest
from pretrain.checkpoint.folder import LATEST, QUARANTINE, contents, leftovers, name_of, temporary_name
from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.index import INTERVALS, TABLE, Index
from pretrain.checkpoint.layout import Holding, Layout
from pretrain.checkpoint.manifest import Piece
from pretrain.checkpoint.retention import Keep, is_pinned, read_scores
from pretrain.checkpoint.verify import verify
from pretrain.checkpoint.writer import HostCopy, Job, Writer, bytes_of, in_words
from pretrain.errors import CheckpointError, FencedError, StorageError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import Axis
from pretrain.screen import say


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


@dataclass
class _Flight:
    """A save that is not committed yet."""

    step: int
    temporary: Path
    problem: str | None  # why nothing is written
    writer: Writer | None = None


class CheckpointStore:
    """The checkpoints of one run. All ranks of `world` call each method together."""

    def __init__(
        self,
        folder: Path,
        world: Axis,
        keep: Keep | None = None,
        still_owner: Callable[[], str | None] = lambda: None,
        node: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        """
        Args:
            folder: where they lie.
            world: all ranks of the run.
            keep: which of them stay.
            still_owner: called on the first rank before anything is committed, moved or removed; a sentence says why
                this run may no longer do so.
            node: the first rank of this rank's machine, whose ranks share a file; None: one file per rank.
            asynchronous: save from a copy, so that the state may change while it is written.
        """
        self.folder = folder
        self.world = world
        self.is_main = world.rank == 0
        self.keep = keep or Keep()
        self.still_owner = still_owner
        self.node = world.rank if node is None else node
        self._copy = HostCopy() if asynchronous else None
        self._layout: Layout | None = None  # of the save before; the next is usually the same
        self._index: Index | None = None
        self._flight: _Flight | None = None
        self._removing = threading.Thread()

    def save(self, step: int, fragments: Iterable[Fragment], run: dict[str, Any]) -> None:
        """Begins to write a checkpoint; `settle` tells what became of it. One at a time.

        Args:
            step: optimizer steps taken.
            fragments: this rank's state. It may change as soon as this returns, or once `settle` has waited if the
                store is not asynchronous.
            run: what the whole run needs to go on: plain JSON values, the same on every rank.
        """
        assert self._flight is None, "one save at a time"
        holding = Holding(fragments, self.node)
        heads = self.world.gather(holding.head)
        if self._layout is None or not torch.equal(heads, self._layout.heads):
            self._layout = Layout(heads)
            self._index = self._layout.gather_index(self.world, holding)
        self._flight = _Flight(step, *self.world.from_first(self._begin(step) if self.is_main else None))
        if self._flight.problem is None:
            self._flight.writer = Writer(self._jobs(holding, {**run, "step": step}))

    def settle(self, wait: bool) -> Saved | Failed | None:
        """Commits what is written, on all ranks or not at all.

        Args:
            wait: until the save in flight is written, and what it makes superfluous is gone.

        Returns:
            What became of the save in flight, once; None while it is being written, or if there is none.

        Raises:
            FencedError: another job owns the folder now.
        """
        if self._flight is None:
            return None
        flight, writer = self._flight, self._flight.writer
        if writer is not None:
            if wait:
                writer.join()
            unfinished = writer.is_alive()
            states = self.world.sum(torch.tensor([unfinished, not unfinished and writer.problem is not None]).long())
            if states[0]:
                return None
            if states[1]:
                problems = self.world.gather_objects(writer.problem)
                flight.problem = next(f"rank {rank}: {why}" for rank, why in enumerate(problems) if why)
        self._flight = None
        write_s = self._commit(flight) if flight.problem is None else 0.0
        if flight.problem is not None and self.is_main:
            shutil.rmtree(flight.temporary, ignore_errors=True)
        if wait and self._removing.is_alive():
            self._removing.join()
        return Saved(flight.step, write_s) if flight.problem is None else Failed(flight.step, flight.problem)

    def has_begun(self) -> bool:
        """Whether the run has saved before."""
        return bool(contents(self.folder)[0])

    def newest_valid(self, quarantine: bool = True, step: int | None = None, before: int | None = None) -> Path | None:
        """The newest checkpoint whose every byte is what was written, or None in a run that has none.

        A bad one is moved to `quarantine/` with the reason, and the next is tried.

        Args:
            quarantine: False for a reader beside a live run, who moves nothing: what it finds incomplete may just be
                going.
            step: only the checkpoint of this step will do.
            before: only those of earlier steps will do; the run goes back, and later ones are moved to `quarantine/`.

        Raises:
            CheckpointError: there are checkpoints, and none is valid, or none is of that step. Never a silent fresh
                start.
            FencedError: another job owns the folder now.
        """
        steps, others = self.world.from_first(contents(self.folder) if self.is_main else None)
        undone = [there for there in steps if before is not None and there >= before]
        steps = steps[: len(steps) - len(undone)]
        if step is not None and step not in steps:
            there = f"those there are of {', '.join(map(str, steps))}" if steps else "there is none"
            raise CheckpointError(f"No checkpoint of step {step} in {self.folder}: {there}.")
        problems: list[str] = []
        for candidate in reversed(steps if step is None else [step]):
            name = name_of(candidate)
            problem = verify(self.folder / name, self.world)
            if problem is None:
                for later in undone:
                    self._set_aside(name_of(later), f"comes after step {candidate}, to which the run goes back")
                return self.folder / name
            problems.append(f"{name}: {problem}")
            if quarantine:
                self._set_aside(name, f"is not whole ({problem})")
        reasons = self.folder / QUARANTINE
        if problems or self.world.from_first(reasons.is_dir()):  # also one that an earlier start filled
            why = f"the reasons are in {reasons}" if quarantine or not problems else "; ".join(problems)
            raise CheckpointError(
                f"No checkpoint in {self.folder} is valid: {why}. Restore a checkpoint from a "
                f"copy, or start a new run with another output folder."
            )
        if copies := self.world.from_first([name for name in others if manifest.is_committed(self.folder / name)]):
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
        if not self.is_main:
            return
        for leftover in leftovers(self.folder):
            shutil.rmtree(leftover, ignore_errors=True)
        if others := contents(self.folder)[1]:
            say(f"Left alone in {self.folder}, as no checkpoints of this run: {', '.join(others)}.")

    def _check_owner(self) -> None:
        if sentence := self.world.from_first(self.still_owner() if self.is_main else None):
            raise FencedError(sentence)

    def _begin(self, step: int) -> tuple[Path, str | None]:
        assert self._layout is not None
        if self._removing.is_alive():
            self._removing.join()
        total = self._layout.bytes
        temporary = self.folder / temporary_name(step)
        try:
            temporary.mkdir(parents=True)
            if shutil.disk_usage(temporary).free < 1.05 * total:  # as where checkpoint.keep was lowered to make space
                self._remove_superfluous(step)
            free = shutil.disk_usage(temporary).free
        except OSError as error:
            return temporary, in_words(error)
        if free < 1.05 * total:
            return temporary, (
                f"{self.folder} has {free / 2**30:.2f} GiB free, and a checkpoint takes {total / 2**30:.2f} GiB: make "
                f"space, or lower checkpoint.keep"
            )
        return temporary, None

    def _jobs(self, holding: Holding, run: dict[str, Any]) -> list[Job]:
        """What this rank writes; the first one also writes what is there once."""
        assert self._layout is not None
        assert self._flight is not None
        folder, share = self._flight.temporary, self._layout.shares[self.world.rank]
        state = self._copy.take(holding.tensors()) if self._copy else map(bytes_of, holding.tensors())
        jobs = [Job(folder / share.file, share.position, chain([memoryview(share.header)], state))]
        if self._index is not None:
            table = self._index.table.model_dump_json().encode()
            numbers = self._index.intervals.reshape(-1).view("uint8").data
            texts = {TABLE: memoryview(table), INTERVALS: numbers, manifest.RUN: memoryview(to_json(run).encode())}
            jobs += [Job(folder / name, 0, [content]) for name, content in texts.items()]
        return jobs

    def _commit(self, flight: _Flight) -> float:
        """Makes a checkpoint of what is written, or says in `flight` why not. Returns the slowest rank's seconds."""
        assert self._layout is not None
        assert flight.writer is not None
        digest = bytes.fromhex(flight.writer.jobs[0].sha256) + np.float64(flight.writer.seconds).tobytes()
        rows = self.world.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8)).numpy()
        self._check_owner()
        if self.is_main:
            written = zip(self._layout.shares, rows, strict=True)
            pieces = [Piece(s.file, s.position, s.bytes, row[:32].tobytes().hex()) for s, row in written if s.bytes]
            pieces += [Piece(job.path.name, 0, job.bytes, job.sha256) for job in flight.writer.jobs[1:]]
            flight.problem = self._publish(flight, pieces)
        flight.problem = self.world.from_first(flight.problem)
        return float(rows[:, 32:].copy().view("float64").max())

    def _publish(self, flight: _Flight, pieces: list[Piece]) -> str | None:
        final = self.folder / name_of(flight.step)
        try:
            manifest.seal(flight.temporary, pieces)
            if final.exists():  # a copy of another step, or what a run has gone back behind
                self._quarantine(final.name, f"makes room for step {flight.step}, which is saved under its name")
            flight.temporary.rename(final)
            manifest.fsync_folder(self.folder)
        except OSError as error:
            return in_words(error)
        with contextlib.suppress(OSError):  # it is there already; the hint may be old
            if self.still_owner() is None:  # a rename may take as long as a job is frozen
                manifest.write_durably(self.folder / LATEST, final.name.encode())
        self._removing = threading.Thread(target=self._remove_superfluous, args=(flight.step,), name="retention")
        self._removing.start()
        return None

    def _remove_superfluous(self, newest: int) -> None:
        """Under another name first, so that a kill leaves nothing incomplete under the name of a checkpoint."""
        steps = [step for step in contents(self.folder)[0] if step <= newest]
        pinned = [step for step in steps if is_pinned(self.folder / name_of(step))]
        for step in self.keep.superfluous(steps, read_scores(self.folder, self.keep.best), pinned):
            if self.still_owner() is not None:
                return  # the next commit says so
            with contextlib.suppress(OSError):  # it is tried again after the next save
                leaving = (self.folder / name_of(step)).rename(self.folder / temporary_name(step))
                shutil.rmtree(leaving, ignore_errors=True)

    def _set_aside(self, name: str, problem: str) -> None:
        self._check_owner()
        why = None
        if self.is_main:
            try:
                self._quarantine(name, problem)
            except OSError as error:
                why = in_words(error)
        if why := self.world.from_first(why):
            raise StorageError(
                f"The checkpoint {self.folder / name} {problem}, and cannot be moved away ({why}): mend the disk, or "
                f"remove it."
            )

    def _quarantine(self, name: str, problem: str) -> None:
        target = self.folder / QUARANTINE / f"{name}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / name).rename(target)
        target.with_suffix(".reason.txt").write_text(problem + "\n")
        say(f"The checkpoint {name} {problem}; it is now {target}.")

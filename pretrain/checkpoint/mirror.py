"""Copies of a run's checkpoints in an object store: made while training goes on, fetched where the disk was lost.

```
s3://bucket/run/step-000012000-1f2e3d4c5b6a/   the step, and the first digits of the checkpoint's COMMIT
  node-00000.safetensors, ...                  each file of the checkpoint
  COMMIT                                       last: a folder without it is no copy
s3://bucket/run/scores.json                    what `checkpoint.best` is chosen by
```
COMMIT is the hash of the hashes of all files, so an object of one name always has the same bytes: an interrupted copy
goes on with the objects that it lacks, and no two checkpoints of one step ever mix.
"""

import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from data_pipelines.errors import DataError, MissingError
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.objects import ObjectFolder
from pretrain.checkpoint.folder import name_of, temporary_name
from pretrain.checkpoint.retention import PIN, SCORES, is_pinned, read_scores
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import verify
from pretrain.errors import CheckpointError, StorageError
from pretrain.screen import say

_NAME = re.compile(r"step-(\d{9,})-[0-9a-f]{12}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # which cannot leave its folder
_COMMIT = "COMMIT"
_POLL_S = 2.0  # between two looks for what the other ranks upload
_BEAT_S = 5.0  # between two signs of life while a run waits for its last copy


class Mirror:
    """All ranks call each method together. Each rank uploads and downloads its share of the files.

    Args:
        url: where the copies of this run go, and of no other.
        store: the checkpoints, in a folder that all ranks see.
        patience_s: how long each request is tried again, and how long the other ranks are waited for.
    """

    def __init__(self, url: str, store: CheckpointStore, patience_s: float = 300.0) -> None:
        self.url = shown(url)
        self._objects = ObjectFolder(url, patience_s)
        self._store, self._world, self._patience_s = store, store.world, patience_s
        self._wanted: int | None = None  # the step to copy next
        self._busy = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def fetch(self, may_resume: bool) -> None:
        """Brings the newest whole copy if the run's folder has no checkpoint.

        Args:
            may_resume: False if there must be no copy.

        Raises:
            CheckpointError: there are copies, and there must be none or none is whole. Never a silent fresh start.
            StorageError: the store or the disk fails, and the folder has no checkpoint.
        """
        begun, copies, problem = self._world.from_first(self._look() if self._store.is_main else None)
        if problem is not None and not begun:
            raise StorageError(f"checkpoint.mirror: {problem}")
        if problem is not None:
            self._say(f"Checkpoints cannot be copied for now, which is tried again with the next one: {problem}")
        if begun:
            return
        if copies and not may_resume:
            raise CheckpointError(
                f"checkpoint.resume is never, and {self.url} holds {next(iter(copies))}: choose another "
                f"checkpoint.mirror, or set checkpoint.resume=auto to go on from it."
            )
        for name, files in copies.items():
            self._say(f"Fetching {name} from {self.url}, as {self._store.folder} has no checkpoint.")
            if (why := self._download(name, files)) is None:
                return
            self._say(f"{name} in {self.url} is not whole ({why}).")
        if copies:
            raise CheckpointError(
                f"{self._store.folder} has no checkpoint, and no copy in {self.url} is whole: restore one, or start a "
                f"new run with another output folder and another checkpoint.mirror."
            )

    def copy(self, step: int) -> None:
        """Begins to copy a checkpoint of the folder. One that still waits for its turn is left out in its favour."""
        with self._changed:
            self._wanted, self._busy = step, True
            if self._thread is None:
                self._thread = threading.Thread(target=self._copy_forever, name="mirror", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def finish(self, limit_s: float = math.inf, beat: Callable[[], None] = lambda: None) -> None:
        """Waits until this rank has copied what it was told to, or has said why not; `beat` is called meanwhile."""
        until = time.monotonic() + limit_s
        with self._changed:
            while self._busy:
                beat()
                if (left_s := until - time.monotonic()) <= 0:
                    self._say(f"The newest copy in {self.url} is not complete; the next start goes on with it.")
                    return
                self._changed.wait(min(left_s, _BEAT_S))

    def _copy_forever(self) -> None:
        while True:
            with self._changed:
                self._busy = self._wanted is not None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted is not None)
                step, self._wanted = self._wanted, None
            assert step is not None
            try:
                self._copy(step)
            except FileNotFoundError:  # it went while it was read
                self._say(f"Step {step} was removed from {self._store.folder} before it was copied to {self.url}.")
            except Exception as error:  # whatever it is costs this copy, and not the run
                why = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}."
                say(f"Rank {self._world.rank} could not copy step {step} to {self.url}: {why} The checkpoint is safe.")

    def _copy(self, step: int) -> None:
        folder = self._store.folder / name_of(step)
        commit = folder / _COMMIT
        name = f"{folder.name}-{commit.read_text()[:12]}"
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name not in (_COMMIT, PIN)}
        share = self._share(list(files))
        if not share and not self._store.is_main:
            return
        there = self._objects.sizes(name)
        if f"{name}/{_COMMIT}" not in there:
            for file in share:
                if there.get(f"{name}/{file}") != files[file]:
                    self._objects.upload(f"{name}/{file}", folder / file)
        if self._store.is_main:
            self._await(name, files)
            if self._store.still_owner():
                return  # the next commit says so
            if f"{name}/{_COMMIT}" not in there:
                self._objects.upload(f"{name}/{_COMMIT}", commit)
                say(f"Copied step {step} to {self.url}.")
            self._tidy(step, name)

    def _share(self, files: list[str]) -> list[str]:
        """This rank's: as many for each, and those of neighbours on different machines."""
        rank, size = self._world.rank, self._world.size
        return [file for number, file in enumerate(files) if number * size // len(files) == rank]

    def _await(self, name: str, files: dict[str, int]) -> None:
        """Waits for what the other ranks upload: no collective may run in this thread, so that the store is asked."""
        lacking, since = len(files) + 1, time.monotonic()
        while True:
            there = self._objects.sizes(name)
            now = [file for file, size in files.items() if there.get(f"{name}/{file}") != size]
            if not now:
                return
            if len(now) < lacking:
                lacking, since = len(now), time.monotonic()
            if time.monotonic() - since > self._patience_s:
                raise DataError(f"no other rank has brought {now[0]} to {self.url} for {self._patience_s:.0f} s.")
            time.sleep(_POLL_S)

    def _tidy(self, step: int, name: str) -> None:
        """Removes the copies that `checkpoint.keep` keeps no longer, and what is left of interrupted ones."""
        there, local = self._folders(), self._store.folder
        if (scores := local / SCORES).exists():
            self._objects.upload(SCORES, scores)
        pinned = []
        for other, files in there.items():
            checkpoint = local / name_of(_step(other))
            if is_pinned(checkpoint) and PIN not in files:
                self._objects.upload(f"{other}/{PIN}", checkpoint / PIN)
            if checkpoint.is_dir() or PIN in files:
                pinned.append(_step(other))
        copied = sorted({_step(other) for other, files in there.items() if _COMMIT in files and _step(other) <= step})
        gone = {step, *self._store.keep.superfluous(copied, read_scores(local, self._store.keep.best), pinned)}
        for other, files in there.items():
            is_left_over = _COMMIT not in files and _step(other) < step
            if other != name and (is_left_over or _step(other) in gone):
                self._objects.remove(f"{other}/{file}" for file in sorted(files, key=lambda file: file != _COMMIT))

    def _look(self) -> tuple[bool, dict[str, dict[str, int]], str | None]:
        """Whether the run's folder has a checkpoint; the copies, the last one first; or why they are not known."""
        begun = self._store.has_begun()
        try:
            copies = {name: files for name, files in self._folders().items() if _COMMIT in files}
            made = {name: self._objects.modified(f"{name}/{_COMMIT}") for name in copies}
            order = sorted(copies, key=lambda name: (made[name], name), reverse=True)  # a run may go back in steps
            return begun, {name: copies[name] for name in order}, None
        except DataError as error:
            return begun, {}, str(error)

    def _folders(self) -> dict[str, dict[str, int]]:
        """The files of each folder that is named as a copy, and their sizes. Whatever else lies there is left alone."""
        found: dict[str, dict[str, int]] = {}
        for path, size in self._objects.sizes().items():
            folder, _, file = path.partition("/")
            if _NAME.fullmatch(folder) and _FILE.fullmatch(file):
                found.setdefault(folder, {})[file] = size
        return found

    def _download(self, name: str, files: dict[str, int]) -> str | None:
        """Puts a copy among the checkpoints if it is whole; else says why it is not."""
        step = _step(name)
        temporary = self._store.folder / self._world.from_first(temporary_name(step))
        missing = failure = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            if self._store.is_main:
                with suppress(MissingError):
                    self._objects.download(SCORES, self._store.folder / SCORES)
            for file in self._share(sorted(files)):
                self._objects.download(f"{name}/{file}", temporary / file)
        except MissingError as error:
            missing = str(error)
        except (DataError, OSError) as error:
            failure = str(error)
        found = self._world.gather_objects((missing, failure))
        if failure := next((failure for _, failure in found if failure), None):
            raise StorageError(f"The copy {name} cannot be brought to {self._store.folder}: {failure}")
        problem = next((missing for missing, _ in found if missing), None) or verify(temporary, self._world)
        if self._store.is_main:
            if problem:
                shutil.rmtree(temporary, ignore_errors=True)
            else:  # not synced to the disk: after a crash of the machine the hashes tell, and it is fetched again
                temporary.rename(self._store.folder / name_of(step))
        return problem

    def _say(self, text: str) -> None:
        if self._store.is_main:
            say(text)


def _step(name: str) -> int:
    return int(name.split("-")[1])

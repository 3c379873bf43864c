"""The one owner of a run's folder: a lease with a fencing number.

`.lease/000000003.json` says which job owns the folder: the one that made the highest number. A number is made by
exclusive creation, which NFS and Lustre keep across nodes (they often do not keep flock), and never comes twice. The
owner touches its file every few seconds. What a new job does depends on the owner:

| the owner                                          | a new job                                         |
|----------------------------------------------------|---------------------------------------------------|
| said that it ended                                 | takes over at once                                |
| is an earlier start of the same job                | takes over at once: its scheduler says it is gone |
| was a process of this machine, which is gone       | takes over at once                                |
| leaves its file untouched for SILENCE_S            | takes over                                        |
| touches its file                                   | is refused                                        |

Silence is measured by the new job's monotonic clock, as the time in which the file did not change: clocks of nodes are
never compared.

An owner that is silent may be frozen or cut off, and come back. The number, not the renewal, makes that harmless:

* It looks at the numbers before it commits, deletes or moves a checkpoint, and at every step once its last look is old;
  a higher number ends it.
* A checkpoint that it had in flight is gone: the new owner sweeps before it chooses where to go on, so that a commit
  which was frozen between look and rename finds nothing to rename. One that commits before the sweep is a valid
  checkpoint of this run, and the new owner goes on from it.
* The metrics.jsonl that it holds open is no longer the run's: the new owner has put a file of its own in its place.
  TensorBoard's files are one job's alone, and nothing is written into them after a look that finds a higher number.

The renewal comes from a thread of the main process. In a process of its own it would outlive a trainer that is stopped
or killed; a thread stops with it. From the main thread alone it would stop during every long start, evaluation and
save. A main thread that is stuck for ever leaves the thread alive: so it is vouched for only VOUCH_S after its last
sign of life, which is longer than ranks wait for each other.
"""

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import cannot_write
from data_pipelines.text import to_json
from pretrain.errors import FencedError, StorageError
from pretrain.screen import say

RENEW_S = 3.0
SILENCE_S = 90.0  # NFS may show a folder as it was 60 s ago
PATIENCE_S = 5.0  # a job that was told to stop may be on its way out
VOUCH_S = 3600.0
_FOLDER = ".lease"


class Lease:
    """This job's ownership of a run's folder, from `take` to `release`."""

    def __init__(self, folder: Path, number: int, text: str) -> None:
        self.folder = folder
        self.number = number
        self._text = text
        self._lost: str | None = None
        self._renewed_at = self._sign_of_life_at = time.monotonic()
        self._over = threading.Event()
        self._renewer = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._renewer.start()

    def lost(self) -> str | None:
        """Looks whether this job still owns the folder: None, or a sentence that says why not.

        None too where the folder cannot be read now: whoever writes there meets the same error.
        """
        self._sign_of_life_at = time.monotonic()
        return self._renew()

    def check(self) -> None:
        """The same at the price of reading a clock, while the last look is recent.

        Raises:
            FencedError: another job owns the folder.
        """
        self._sign_of_life_at = now = time.monotonic()
        if (self._lost or now - self._renewed_at > 2 * RENEW_S) and (why := self._renew()):
            raise FencedError(why)

    def release(self) -> None:
        """Says that this job has ended; the next one need not wait."""
        self._over.set()
        if self.lost():
            return
        with suppress(OSError):
            path = _path(self.folder, self.number)
            ended = path.with_suffix(".tmp")
            ended.write_text(to_json(json.loads(self._text) | {"ended": _now()}), encoding="utf-8")
            ended.replace(path)

    def _renew(self) -> str | None:
        begun_at = time.monotonic()
        if self._lost:
            return self._lost
        try:
            with suppress(FileNotFoundError):  # removed by a new owner
                # Goes to the server of a network file system, which listing a folder need not.
                os.utime(_path(self.folder, self.number))
            newest = _newest(self.folder)
        except OSError:
            return None
        # The same number with another text: someone removed the folder, and a new job began in one of its name.
        if newest is None or (newest.number, newest.text) != (self.number, self._text):
            self._lost = (
                f"The run's folder {self.folder} is now in use {newest.who() if newest else 'by another job'}, which "
                f"took it over from this one: this job ends, and leaves alone what is there."
            )
        self._renewed_at = begun_at
        return self._lost

    def _keep_renewing(self) -> None:
        while not self._over.wait(RENEW_S) and self._lost is None:
            if time.monotonic() - self._sign_of_life_at < VOUCH_S:
                self._renew()


def take(folder: Path) -> Lease:
    """Makes the folder, and this job its owner.

    Raises:
        StorageError: another job uses it.
        DataError: it cannot be made or written to.
    """
    text = to_json(_this_job())
    try:
        (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        while True:
            before = _wait_until_free(folder)
            number = before.number + 1 if before else 1
            try:
                with _path(folder, number).open("x", encoding="utf-8") as file:
                    file.write(text)
                break
            except FileExistsError:  # another job was faster
                continue
        for path in (folder / _FOLDER).iterdir():
            if path.stem.isdecimal() and int(path.stem) < number:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(f"the run's folder {folder} (output)", error) from None
    return Lease(folder, number, text)


class _Seen(NamedTuple):
    """A lease as it was found; another one, or the same renewed, is not equal."""

    number: int
    text: str
    changed_ns: int

    @property
    def owner(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.text)
        except ValueError:  # caught between its creation and its content
            owner = None
        return owner if isinstance(owner, dict) else {}

    def who(self) -> str:
        try:
            return "by process {pid} on {host} since {started}".format_map(self.owner)
        except KeyError:
            return "by another job"

    def is_over(self) -> bool:
        """Whether the owner is known to have ended."""
        owner, here = self.owner, _this_job()
        if "ended" in owner:
            return True
        try:
            if owner["job"] is not None and owner["job"] == here["job"] and owner["start"] < here["start"]:
                return True
            return owner["machine"] == here["machine"] is not None and _began(owner["pid"]) != owner["began"]
        except (KeyError, TypeError):
            return False


def _wait_until_free(folder: Path) -> _Seen | None:
    """The lease to take over from, or None if there is none.

    Raises:
        StorageError: its owner is alive.
    """
    seen, since = _newest(folder), time.monotonic()
    refuse_at, is_alive, has_told = since + PATIENCE_S, False, False
    while seen and not seen.is_over():
        now = time.monotonic()
        if (found := _newest(folder)) != seen:
            seen, since, is_alive = found, now, True
        elif is_alive and now > refuse_at:
            raise StorageError(
                f"The run's folder {folder} is in use {seen.who()}: stop that job first, or choose another output "
                f"folder."
            )
        elif now - since > SILENCE_S:
            say(f"Taking over {folder}, in use {seen.who()}: not a sign of that job for {SILENCE_S:.0f} s.")
            break
        elif now - since > 3 * RENEW_S and not has_told:
            has_told = True
            say(f"{folder} is in use {seen.who()}, of which there is no sign: waiting {SILENCE_S:.0f} s for one.")
        else:
            time.sleep(0.2)
    return seen


def _newest(folder: Path) -> _Seen | None:
    paths = [path for path in (folder / _FOLDER).iterdir() if path.suffix == ".json" and path.stem.isdecimal()]
    for path in sorted(paths, key=lambda path: int(path.stem), reverse=True):
        with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
            # Opened, not merely looked at: only that makes NFS ask its server.
            return _Seen(int(path.stem), file.read(), os.fstat(file.fileno()).st_mtime_ns)
    return None


def _path(folder: Path, number: int) -> Path:
    return folder / _FOLDER / f"{number:09d}.json"


def _now() -> str:
    return time.strftime("%F %T %Z")  # for people


def _this_job() -> dict[str, Any]:
    job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _now(),
        "job": job and f"Slurm {job}",
        "start": [int(word) if word.isdecimal() else 0 for word in (start, again)],
        "machine": _machine(),
        "began": _began(os.getpid()),
    }


def _machine() -> str | None:
    """What processes have in common that see each other in /proc: the boot, and the namespace of their ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return None


def _began(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if it is gone. Tells it from a later one with its id."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])  # proc(5), field 22

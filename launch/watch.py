"""Watches the ranks of this node from outside, by their heartbeats. Imports no torch."""

import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pretrain.heartbeat import DUMP_STACKS, Heartbeat, heartbeat_of, output_of, stacks_of

_LOOK_S = 0.2  # between two looks at the heartbeats
_DUMP_S = 1.0  # in which a rank that can write its stacks has done so
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "D": "waiting in the kernel for a disk or device"}
_WAITING = ("/torch/distributed/", "/deepspeed/comm/")  # a stack that ends here waits for other ranks


class Watch:
    """The heartbeats of one set of ranks."""

    def __init__(self, folder: Path) -> None:
        """Forgets what earlier ranks have written in the folder."""
        self._folder = folder
        for path in folder.glob("rank-*"):
            path.unlink()
        self._heard: dict[int, Heartbeat] = {}
        self._silent_s: dict[int, float] = {}
        self._looked = time.monotonic()

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint that a rank here knows of; -1 if none does."""
        return max((heartbeat.saved_step for heartbeat in self._heard.values()), default=-1)

    def look(self, ranks: Iterable[int], *, at_once: bool = False) -> bool:
        """Whether one of the ranks has been longer in its phase than it may."""
        now = time.monotonic()
        passed_s = now - self._looked
        if passed_s < _LOOK_S and not at_once:
            return False
        self._looked = now
        for rank in ranks:
            heartbeat = Heartbeat.read(heartbeat_of(self._folder, rank))
            if heartbeat is None:
                continue
            # Time in which this process could not look either counts little: a suspended job is not a hung one.
            moved = heartbeat != self._heard.get(rank)
            self._silent_s[rank] = 0.0 if moved else self._silent_s[rank] + min(passed_s, 5 * _LOOK_S)
            self._heard[rank] = heartbeat
        return any(self._silent_s[rank] > heard.limit_s for rank, heard in self._heard.items())

    def report(self, pids: Mapping[int, int]) -> str:
        """Writes the stacks of all threads of all ranks to the run's folder; returns a sentence on who lags."""
        heard = {rank: heartbeat for rank, heartbeat in self._heard.items() if pids.get(rank) == heartbeat.pid}
        states = {rank: _state(pids[rank]) for rank in heard}
        stacks = self._dump({rank: pids[rank] for rank in heard if states[rank] not in _STATES})
        lagging = laggards(heard, states, stacks)
        where = self._keep(heard, states, stacks)
        longest_s = max(self._silent_s[rank] for rank in heard)
        return f"no progress for {longest_s:.0f} s: {_sentence(lagging, heard, states)}; {where}"

    def _dump(self, pids: Mapping[int, int]) -> dict[int, str]:
        """The stacks of ranks that are able to write them, which takes them some milliseconds."""
        for pid in pids.values():
            os.kill(pid, DUMP_STACKS)
        deadline, sizes = time.monotonic() + _DUMP_S, {}
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, sizes = sizes, {rank: stacks_of(self._folder, rank).stat().st_size for rank in pids}
            if sizes == before and all(sizes.values()):
                break
        return {rank: stacks_of(self._folder, rank).read_text(errors="replace") for rank in pids}

    def _keep(self, heard: Mapping[int, Heartbeat], states: Mapping[int, str], stacks: Mapping[int, str]) -> str:
        now, host = time.strftime("%Y%m%d-%H%M%S"), socket.gethostname()
        try:
            folder = Path(output_of(self._folder).read_text(encoding="utf-8")) / "stacks"
            folder.mkdir(exist_ok=True)
            for rank, heartbeat in heard.items():
                silent_s = self._silent_s[rank]
                head = f"rank {rank} (process {heartbeat.pid} on {host}): {heartbeat.place} for {silent_s:.0f} s"
                text = stacks.get(rank) or f"no stacks: {_STATES.get(states[rank], 'it did not answer')}\n"
                (folder / f"{now}-rank-{rank:05d}.txt").write_text(f"{head}\n\n{text}", encoding="utf-8")
        except OSError as error:
            return f"the stacks cannot be kept ({error})"
        return f"the stacks of all threads are in {folder}"


def laggards(heard: Mapping[int, Heartbeat], states: Mapping[int, str], stacks: Mapping[int, str]) -> list[int]:
    """The ranks that the others wait for: stopped ones, else those furthest behind, else those not in a collective."""
    if stopped := [rank for rank in heard if states[rank] in _STATES]:
        return stopped
    furthest_behind = min((heartbeat.step, heartbeat.phase) for heartbeat in heard.values())
    behind = [rank for rank, heartbeat in heard.items() if (heartbeat.step, heartbeat.phase) == furthest_behind]
    if len(behind) < len(heard):
        return behind
    return [rank for rank in heard if not waits_for_others(stacks.get(rank, ""))]


def waits_for_others(stacks: str) -> bool:
    """Whether the main thread, which faulthandler writes last, is in a collective."""
    _, _, main = stacks.rpartition("(most recent call first):\n")
    return any(library in line for line in main.splitlines()[:4] for library in _WAITING)


def _sentence(lagging: list[int], heard: Mapping[int, Heartbeat], states: Mapping[int, str]) -> str:
    if not lagging:
        places = sorted({heartbeat.place for heartbeat in heard.values()})
        return f"all ranks of this node wait for others ({'; '.join(places)})"
    how = [
        f"rank {rank} ({_STATES[states[rank]]}; {heard[rank].place})"
        if states[rank] in _STATES
        else f"rank {rank} ({heard[rank].place})"
        for rank in lagging
    ]
    return f"{', '.join(how)} {'holds' if len(how) == 1 else 'hold'} up the run"


def _state(pid: int) -> str:
    """The letter by which /proc tells what a process does; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""

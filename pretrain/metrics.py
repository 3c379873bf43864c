"""What a run says of itself: a line on the screen, metrics.jsonl, TensorBoard. Units are in the names."""

import json
import os
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.utils.tensorboard import SummaryWriter

from data_pipelines.batch import BadSample
from data_pipelines.errors import cannot_write
from data_pipelines.text import to_json
from pretrain.config import Config
from pretrain.screen import say

# TensorBoard sorts its groups by name: loss, optimizer, progress, scores, system. A curve and its held-out counterpart
# have one name, and so one card.
_CARDS = {
    "loss": "loss/total",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "temperature": "optimizer/temperature",
    "health/skipped_steps": "optimizer/skipped_steps",
    "health/bad_samples": "progress/bad_samples",
}
_GROUPS = {"loss": "", "epoch": "progress/", "time": "system/", "memory": "system/", "checkpoint": "system/"}


class Clock:
    """Measures one step: how long it took, and how much of that was waiting for data."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited_s = 0.0

    @contextmanager
    def waiting(self):
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """(seconds since the clock was made, share of them spent waiting for data)."""
        elapsed_s = time.perf_counter() - self._start
        return elapsed_s, self._waited_s / elapsed_s


class Metrics:
    """Writes a run's metrics. Only the main process has one."""

    def __init__(self, config: Config, first_step: int) -> None:
        """`first_step` is the step the run goes on from: what an interrupted start wrote beyond it goes."""
        self.steps = config.training.steps
        self.folder = config.output
        threading.excepthook = _without_boards
        try:
            self._jsonl = _open_at(self.folder / "metrics.jsonl", first_step)
            # Two runs to TensorBoard, so that curves of one name share a card.
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1)
            self._heldout_board = SummaryWriter(self.folder / "tensorboard" / "heldout", purge_step=first_step + 1)
        except OSError as error:
            raise cannot_write(f"metrics in {self.folder}", error) from None
        self._recent_s: list[float] = []
        self._last_written = self._last_with_checkpoint = first_step  # steps of lines
        self._broken = False

    def describe(self, text: str, facts: Mapping[str, Any]) -> None:
        """Shows the resolved config, and facts about the run, as TensorBoard's text card."""
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        with self._surviving_a_full_disk():
            self._board.add_text("run", f"| | |\n|---|---|\n{rows}\n```yaml\n{text}```", 0)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One optimizer step's values, by name."""
        self._recent_s = [*self._recent_s[-49:], values["time/step_s"]]
        with self._surviving_a_full_disk():
            _append(self._jsonl, _json({"step": step, **values}))
            self._last_written = step
        self._show(self._board, step, {name: value for name, value in values.items() if name != "batch_id"})

    def heldout(self, step: int, values: dict[str, float]) -> None:
        """What evaluation after `step`, the last one, found: `heldout/...` in the line of that step."""
        if self._last_written == step:
            self._add({f"heldout/{name}": value for name, value in values.items()})
        self._show(self._heldout_board, step, values)

    def checkpoint(self, values: dict[str, float]) -> None:
        """What a save took that was done after the last step: `checkpoint/...` in the line of that step."""
        named = {f"checkpoint/{name}": value for name, value in values.items()}
        if self._last_with_checkpoint < self._last_written:  # once per line: a name is in it once
            self._add(named)
        self._last_with_checkpoint = self._last_written
        self._show(self._board, self._last_written, named)

    def _add(self, values: dict[str, float]) -> None:
        """Puts more values into the last line."""
        with self._surviving_a_full_disk():
            _append(self._jsonl, b", " + _json(values).removeprefix(b"{"), instead_of=b"}\n")

    def bad_samples(self, step: int, samples: Sequence[BadSample]) -> None:
        """Lists samples that were replaced in bad_samples.jsonl, which `index --exclude` reads."""
        lines = (to_json({"step": step, **asdict(sample)}) for sample in samples)
        with (
            self._surviving_a_full_disk(),
            (self.folder / "bad_samples.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write("".join(f"{line}\n" for line in lines))

    def line(self, step: int, values: dict[str, float]) -> str:
        """One step's values for a person, with the time that is left."""
        recent_s = sorted(self._recent_s)[len(self._recent_s) // 2]
        minutes, seconds = divmod(round(recent_s * (self.steps - step)), 60)
        parts = [f"{name.removeprefix('loss/')} {v:.3f}" for name, v in values.items() if name.startswith("loss/")]
        return (
            f"step {step}/{self.steps}  loss {values['loss']:.4f} ({', '.join(parts)})  "
            f"lr {values['learning_rate']:.2e}  norm {values['gradient_norm']:.2f}  "
            f"{values['time/samples_per_s']:.0f} samples/s  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
            f"{_epochs(values)}"
        )

    def flush(self) -> None:
        """Makes what was said so far visible in TensorBoard, and safe from a kill."""
        with self._surviving_a_full_disk():
            self._board.flush()
            self._heldout_board.flush()

    def close(self) -> None:
        with self._surviving_a_full_disk():
            self._jsonl.close()
            self._board.close()
            self._heldout_board.close()

    def _show(self, board: SummaryWriter, step: int, values: dict[str, float]) -> None:
        with self._surviving_a_full_disk():
            for name, value in values.items():
                board.add_scalar(card(name), value, step)

    @contextmanager
    def _surviving_a_full_disk(self):
        """A metric that cannot be written costs that metric, not the run."""
        try:
            yield
        except OSError as error:
            if not self._broken:
                say(f"Metrics can no longer be written in {self.folder} ({error}); training goes on.")
            self._broken = True


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU if it drives one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _without_boards(arguments: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread dies of a full disk with a traceback. What is written next raises the error, and is told."""
    if not (isinstance(arguments.exc_value, OSError) and type(arguments.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(arguments)


def card(name: str) -> str:
    """The name of a metric's card on TensorBoard, of which the part before the first slash is the group."""
    return _CARDS.get(name) or f"{_GROUPS.get(name.partition('/')[0], 'scores/')}{name}"


def _epochs(values: Mapping[str, float]) -> str:
    """As in "epoch 1.25", or "epoch web 1.25, books 0.50" where there are several sources."""
    sources = {name.partition("/")[2]: value for name, value in values.items() if name.partition("/")[0] == "epoch"}
    return "  epoch " + ", ".join(f"{name} {value:.2f}".strip() for name, value in sources.items()) if sources else ""


def _json(values: dict[str, float]) -> bytes:
    return to_json(values).encode() + b"\n"


def _append(file: BinaryIO, line: bytes, instead_of: bytes = b"") -> None:
    """Writes a line at the end, over what stands there, whole or not at all."""
    start = file.seek(-len(instead_of), os.SEEK_END)
    try:
        while line:  # unbuffered, so that nothing is left for later; a disk that fills up takes a part
            line = line[file.write(line) :]
    except OSError:
        file.truncate(start)
        file.seek(start)
        file.write(instead_of)
        raise


def _open_at(path: Path, step: int) -> BinaryIO:
    """Opens a file of JSON lines for appending, without the lines of later steps, or one cut off by a kill.

    Lines damaged otherwise are left out, and named.
    """
    damaged: list[int] = []
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as kept:
        for number, line in enumerate(path.open("rb") if path.exists() else (), start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, KeyError, TypeError):
                damaged += [number] if line.endswith(b"\n") else []
    temporary.replace(path)
    if damaged:
        say(f"{path}: left out {len(damaged)} lines that hold no step, line {damaged[0]} first.")
    return path.open("r+b", buffering=0)

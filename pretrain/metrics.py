"""What a run says of itself: a line on the screen, metrics.jsonl, TensorBoard. Units are in the names."""

import json
import resource
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from data_pipelines.batch import BadSample
from data_pipelines.text import to_json
from pretrain.config import Config
from pretrain.errors import StorageError


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
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._jsonl = _open_at(self.folder / "metrics.jsonl", first_step)
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1)
        except OSError as error:
            raise StorageError(
                f"Cannot write metrics in {self.folder} ({error}): make space or mend the disk."
            ) from None
        self._recent_s: list[float] = []
        self._broken = False

    def describe(self, config: Config, facts: dict[str, Any]) -> None:
        """Keeps the resolved config, as a file and as TensorBoard's text card, and facts about the run beside it."""
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        (self.folder / "config.yaml").write_text(text)
        rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
        self._board.add_text("run", f"| | |\n|---|---|\n{rows}\n```yaml\n{text}```", 0)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One optimizer step's values, by name."""
        self._recent_s = [*self._recent_s[-49:], values["time/step_s"]]
        with self._surviving_a_full_disk():
            self._jsonl.write(to_json({"step": step, **values}) + "\n")
            self._jsonl.flush()
        self.scalars(step, {name: value for name, value in values.items() if name != "batch_id"})

    def bad_samples(self, step: int, samples: Sequence[BadSample]) -> None:
        """Lists samples that were replaced in bad_samples.jsonl, which `index --exclude` reads."""
        lines = (to_json({"step": step, **asdict(sample)}) for sample in samples)
        with (
            self._surviving_a_full_disk(),
            (self.folder / "bad_samples.jsonl").open("a", encoding="utf-8") as file,
        ):
            file.write("".join(f"{line}\n" for line in lines))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """TensorBoard alone."""
        with self._surviving_a_full_disk():
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def line(self, step: int, values: dict[str, float]) -> str:
        """One step's values for a person, with the time that is left."""
        recent_s = sorted(self._recent_s)[len(self._recent_s) // 2]
        minutes, seconds = divmod(round(recent_s * (self.steps - step)), 60)
        parts = [f"{name.removeprefix('loss/')} {v:.3f}" for name, v in values.items() if name.startswith("loss/")]
        return (
            f"step {step}/{self.steps}  loss {values['loss']:.4f} ({', '.join(parts)})  "
            f"lr {values['learning_rate']:.2e}  norm {values['gradient_norm']:.2f}  "
            f"{values['time/samples_per_s']:.0f} samples/s  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        )

    def flush(self) -> None:
        """Makes what was said so far visible in TensorBoard, and safe from a kill."""
        with self._surviving_a_full_disk():
            self._board.flush()

    def close(self) -> None:
        with self._surviving_a_full_disk():
            self._jsonl.close()
            self._board.close()

    @contextmanager
    def _surviving_a_full_disk(self):
        """A metric that cannot be written costs that metric, not the run."""
        try:
            yield
        except OSError as error:
            if not self._broken:
                print(f"Metrics can no longer be written in {self.folder} ({error}); training goes on.", flush=True)
            self._broken = True


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU if it drives one, else on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _open_at(path: Path, step: int):
    """Opens a file of JSON lines for appending, without the lines of later steps, or one cut off by a kill."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
    return path.open("a")

"""What a run says, by its main process: lines on the screen, metrics.jsonl and TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipelines.batch import BadSample
from pretrain.alarms import Alarms
from pretrain.config import Config
from pretrain.lease import Lease
from pretrain.metrics import Metrics
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.screen import say
from pretrain.validation import Validation


class Journal:
    """One run's. All ranks call its methods together."""

    def __init__(self, config: Config, mesh: Mesh, engine: Engine, vocabulary: int, lease: Lease | None) -> None:
        self.config = config
        self.mesh = mesh
        self.lease = lease
        self.metrics: Metrics | None = None  # on the main process, while it trains
        self.alarms = Alarms(config, vocabulary)
        self.weights = {objective.name: objective.weight for objective in engine.architecture.objectives}
        # Live view of the temperature's master copy, on the one rank that saves it.
        saved = {fragment.name: fragment for fragment in engine.fragments() if fragment.saved_here}
        temperature = saved.get("temperature.log_scale")
        self._log_scale = temperature.tensors["master"] if temperature else None

    def open(self, step: int) -> None:
        """Begins to write, or begins again: what was written of steps beyond this one goes."""
        self.close()
        if self.mesh.is_main:
            self.metrics = Metrics(self.config, step, self.lease)

    def describe(self, text: str, facts: Mapping[str, Any]) -> None:
        """Shows the resolved config, and facts about the run."""
        if self.metrics:
            self.metrics.describe(text, facts)

    def step(self, step: int, values: dict[str, float]) -> None:
        """One step's values, and the alarms that they raise: the main process's, which alone calls it."""
        assert self.metrics
        self.metrics.step(step, values)
        if self.is_shown(step):
            say(self.metrics.line(step, values))
        for text in self.alarms.raised(step, values):
            self.alarm(step, text)

    def checkpoint(self, values: dict[str, float]) -> None:
        """What the save took that was done last."""
        if self.metrics:
            self.metrics.checkpoint(values)

    def flush(self) -> None:
        if self.metrics:
            self.metrics.flush()

    def heldout(self, step: int, found: Validation, samples: int) -> dict[str, float]:
        """What an evaluation found, under its names."""
        values = self.by_objective(found.losses, found.counts) | found.retrieval
        if self.metrics:
            self.metrics.heldout(step, values)
        figures = [f"{name} accuracy {values[f'accuracy/{name}']:.3f}" for name in self.weights]
        if found.retrieval:
            figures.insert(0, f"text-to-image R@1 {values['text_to_image_R@1']:.3f} of {samples}")
        self.say(f"held out after step {step}: loss {values['loss']:.4f}, {', '.join(figures)}")
        return values

    def bad_samples(self, step: int, bad: Sequence[BadSample]) -> None:
        """Names samples that could not be read, and others that took their places."""
        for sample in bad:
            self.say(f"step {step}: replaced {sample.key} of shard {sample.shard}: {sample.reason}")
        if self.metrics:
            self.metrics.bad_samples(step, bad)

    def alarm(self, step: int, text: str) -> None:
        """Says what asks for a person's eye, and keeps it."""
        self.say(f"step {step}: {text}")
        if self.metrics:
            self.metrics.alarm(step, text)

    def say(self, text: str) -> None:
        if self.mesh.is_main:
            say(text)

    def is_shown(self, step: int) -> bool:
        """Whether a step has a line on the screen."""
        return step % self.config.training.log_every == 0 or step == self.config.training.steps

    def by_objective(self, losses: dict[str, float], counts: dict[str, tuple[int, int]]) -> dict[str, float]:
        """The losses and accuracies of the objectives that are on, and the weighted sum."""
        return {
            "loss": sum(weight * losses[name] for name, weight in self.weights.items()),
            **{f"loss/{name}": loss for name, loss in losses.items()},
            **{f"accuracy/{name}": right / max(asked, 1) for name, (right, asked) in counts.items()},
        }

    def epochs(self, of_sources: Mapping[str, float]) -> dict[str, float]:
        """How often each source was read, or the only one."""
        return {"epoch" if len(of_sources) == 1 else f"epoch/{name}": value for name, value in of_sources.items()}

    def temperature(self) -> dict[str, float]:
        """The contrastive objective's temperature, where there is one."""
        if self.config.objectives.contrastive is None:
            return {}
        here = torch.zeros(1, device=self.mesh.device) if self._log_scale is None else self._log_scale.clone()
        return {"temperature": math.exp(-self.mesh.world.sum(here.to(self.mesh.device)).item())}

    def close(self) -> None:
        if self.metrics:
            self.metrics.close()
        self.metrics = None

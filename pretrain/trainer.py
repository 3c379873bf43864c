"""The trainer: steps, metrics, evaluation and checkpoints. Knows an Engine and an iterator of batches."""

import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.budget import BadSampleBudget
from data_pipelines.heldout import HeldoutData
from data_pipelines.loader import TrainingData
from data_pipelines.mixture import DataState
from pretrain.checkpoint.identity import check_same_run
from pretrain.checkpoint.store import CheckpointStore, read_run
from pretrain.config import Config
from pretrain.errors import CheckpointError, StoppedError, StorageError, TrainingError
from pretrain.metrics import Clock, Metrics, peak_memory_gib
from pretrain.models.flow import OBJECTIVES
from pretrain.optim import learning_rate
from pretrain.parallel.engine import Engine, StepResult
from pretrain.parallel.mesh import Mesh
from pretrain.retrieval import recall

MAX_FAILED_SAVES = 3  # in a row; then the run stops rather than work for nothing


class Trainer:
    """One run, from a fresh start or a checkpoint to its last step."""

    def __init__(
        self, config: Config, mesh: Mesh, engine: Engine, data: TrainingData, heldout: HeldoutData | None
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.engine = engine
        self.data = data
        self.heldout = heldout
        self.store = CheckpointStore(config.output / "checkpoints", mesh.world, config.checkpoint.keep)
        self.metrics: Metrics | None = None  # on the main process, while it trains
        self.step = 0
        self.data_state = data.initial_state()
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.failed_saves = 0
        self.bad_samples = BadSampleBudget(config.data.max_bad_samples, config.data.max_bad_fraction)
        self.stop_requested = False  # a signal handler sets it; all ranks stop after the same step
        sections = {name: getattr(config.objectives, name) for name in OBJECTIVES}
        self.weights = {name: section.weight for name, section in sections.items() if section}
        # Live view of the temperature's master copy, on the one rank that saves it.
        saved = {fragment.name: fragment for fragment in engine.fragments() if fragment.saved_here}
        temperature = saved.get("align.temperature.log_scale")
        self.log_scale = temperature.tensors["master"] if temperature else None

    def resume(self) -> None:
        """Goes on from the newest valid checkpoint, as `checkpoint.resume` says; call it once, before `fit`.

        Raises:
            CheckpointError: none where there must be one, one where there must be none, or one of another run.
        """
        mode = self.config.checkpoint.resume
        self.store.sweep()
        checkpoint = self.store.newest_valid()
        if checkpoint is None:
            if mode == "must":
                raise CheckpointError(
                    f"checkpoint.resume is must, and {self.store.folder} holds no checkpoint: check the output folder, "
                    f"or set checkpoint.resume=auto to start afresh."
                )
            return
        if mode == "never":
            raise CheckpointError(
                f"checkpoint.resume is never, and {checkpoint} exists: choose another output folder, or set "
                f"checkpoint.resume=auto to go on from it."
            )
        run = read_run(checkpoint)
        check_same_run(run, self.config, self.data.tokenizer.fingerprint, str(checkpoint))
        self.data_state = self.data.resumed(DataState.from_dict(run["data"]))
        self.store.load(checkpoint, self.engine.fragments())
        self.engine.loaded(run["applied_steps"])
        self.step = run["step"]
        self.skipped_steps = run["skipped_steps"]
        self.bad_samples.num_bad, self.bad_samples.num_seen = run["bad_samples"], run["samples"]
        ranks = math.prod(run["layout"].get(axis, 1) for axis in ("dp", "tp", "pp"))
        self._say(f"Resumed from {checkpoint}, saved on {ranks} ranks, at step {self.step}.")

    def fit(self) -> None:
        """Trains until `training.steps`, saving, evaluating and reporting on the way.

        Raises:
            StoppedError: told to stop; the state is saved.
            TrainingError: too many steps in a row were not finite.
            StorageError: the last checkpoint, or several in a row, could not be written.
            DataError: a shard cannot be read, or too many samples are bad.
        """
        training, checkpoint = self.config.training, self.config.checkpoint
        if self.step >= training.steps:
            self._say(f"Nothing to do: step {self.step} of training.steps {training.steps} is reached.")
            return
        if self.mesh.is_main:
            self.metrics = Metrics(self.config, self.step)
            self.metrics.describe(self.config, self._facts())

        try:
            batches = self.data.batches(self.data_state)
            while self.step < training.steps:
                stop = self._train_step(batches)
                last = self.step == training.steps
                if self.heldout and not stop and (self.step % training.evaluate_every == 0 or last):
                    self._evaluate(self.heldout)
                if self.step % checkpoint.every == 0 or last or stop:
                    self._save(must=last or stop)
                if stop and not last:
                    raise StoppedError(f"Told to stop: saved step {self.step}. The same command goes on from there.")
        finally:
            if self.metrics:
                self.metrics.close()

    def _train_step(self, batches: Iterator[Batch]) -> bool:
        """One optimizer step and its report. Returns whether any rank was told to stop."""
        training = self.config.training
        clock = Clock()
        with clock.waiting():
            micro_batches = [next(batches).to(self.mesh.device) for _ in range(training.accumulation)]
        rate = learning_rate(self.step, training.steps, self.config.optimizer)
        result = self.engine.step(micro_batches, rate)
        self.step += 1
        self.data_state = self.data.advance(self.data_state)
        batch_id, stop = self._take_stock(micro_batches)
        temperature = self._temperature()
        step_s, data_wait_share = clock.read()
        if self.metrics:
            values = {
                **self._by_objective(result.losses, result.counts),
                "learning_rate": rate,
                "gradient_norm": result.gradient_norm,
                "temperature": temperature,
                **self._epochs(),
                "time/samples_per_s": training.global_batch / step_s,
                "time/step_s": step_s,
                "time/data_wait_share": data_wait_share,
                "memory/peak_gib": peak_memory_gib(self.mesh.device),
                "health/skipped_steps": self.skipped_steps + (not result.applied),
                "health/bad_samples": self.bad_samples.num_bad,
                "batch_id": batch_id,
            }
            self.metrics.step(self.step, values)
            if self.step % training.log_every == 0 or self.step == training.steps:
                self._say(self.metrics.line(self.step, values))
        self._watch_health(result)
        return stop

    def _take_stock(self, micro_batches: Sequence[Batch]) -> tuple[int, bool]:
        """Counts bad samples, with the other ranks.

        Returns:
            The id of the global batch, the same on any layout, and whether any rank was told to stop.
        """
        ids = sum(int(batch.image_ids.sum()) for batch in micro_batches) % 2**63
        bad = [sample for batch in micro_batches for sample in batch.bad]
        total_id, total_bad = self.mesh.dp.sum(torch.tensor([ids, len(bad)], device=self.mesh.device)).tolist()
        stop = self.mesh.world.sum(torch.tensor(int(self.stop_requested), device=self.mesh.device)).item()
        if total_bad:  # rare: every rank learns all of them, so that the one that prints can name them
            bad = [sample for samples in self.mesh.dp.gather_objects(bad) for sample in samples]
            for sample in bad:
                self._say(f"step {self.step}: replaced {sample.key} of shard {sample.shard}: {sample.reason}")
            if self.metrics:
                self.metrics.bad_samples(self.step, bad)
        self.bad_samples.add(bad, self.config.training.global_batch)
        return total_id % 2**53, bool(stop)  # 2**53: what every reader of JSON takes for an integer

    def _epochs(self) -> dict[str, float]:
        epochs = self.data.epochs(self.data_state)
        return {"epoch" if len(epochs) == 1 else f"epoch/{name}": value for name, value in epochs.items()}

    def _temperature(self) -> float:
        here = torch.zeros(1, device=self.mesh.device) if self.log_scale is None else self.log_scale.clone()
        return math.exp(-self.mesh.world.sum(here.to(self.mesh.device)).item())

    def _watch_health(self, result: StepResult) -> None:
        """Counts steps that were skipped, and ends a run that does nothing else."""
        if result.applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self._say(
            f"step {self.step} skipped: the loss or the gradient norm is not finite "
            f"({self.skipped_in_a_row} in a row, {self.skipped_steps} in all)"
        )
        limit = self.config.training.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            raise TrainingError(
                f"The last {self.skipped_in_a_row} steps, up to step {self.step}, had a loss or gradient norm that is "
                f"not finite, and training.max_skipped_steps is {limit}: lower optimizer.learning_rate, and start "
                f"again to go on from the checkpoints in {self.store.folder}."
            )

    def _evaluate(self, heldout: HeldoutData) -> None:
        """Losses, accuracies and retrieval on held-out data, by the forward pass of training.

        Retrieval counts each sample once. Losses and accuracies are means over whole micro-steps, of which the last
        wraps around: `python -m pretrain evaluate` has the figures that depend on no layout.
        """
        losses, counts, rows = torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), []
        for batch in heldout.batches(
            self.data.micro_batch_per_rank, dp_rank=self.mesh.dp.rank, dp_size=self.mesh.dp.size
        ):
            output = self.engine.evaluate(batch.to(self.mesh.device))
            losses, counts = losses + output.losses.cpu(), counts + output.counts.cpu()
            embeddings = (output.image_embeddings.cpu(), output.text_embeddings.cpu())
            rows.append((batch.positions, batch.caption_ids, *embeddings))
        columns = [torch.cat(column) for column in zip(*rows, strict=True)]
        gathered = [torch.cat(parts) for parts in zip(*self.mesh.dp.gather_objects(columns), strict=True)]
        losses, counts = self.mesh.dp.mean(losses / len(rows)), self.mesh.dp.sum(counts)
        if not self.metrics:
            return
        positions, captions, images, texts = gathered
        place = torch.empty(len(heldout), dtype=torch.int64)
        place[positions] = torch.arange(len(positions))  # one row a sample: the last batches wrap around
        captions, similarity = captions[place], images[place] @ texts[place].T  # (image, text)
        relevant = captions[:, None] == captions[None, :]
        values = self._by_objective(losses, counts)
        values |= {f"text_to_image_R@{k}": value for k, value in recall(similarity.T, relevant).items()}
        values |= {f"image_to_text_R@{k}": value for k, value in recall(similarity, relevant).items()}
        self.metrics.scalars(self.step, {f"heldout/{name}": value for name, value in values.items()})
        accuracies = (f"{name} accuracy {values[f'accuracy/{name}']:.3f}" for name in self.weights)
        self._say(
            f"held out after step {self.step}: loss {values['loss']:.4f}, text-to-image R@1 "
            f"{values['text_to_image_R@1']:.3f} of {len(captions)}, {', '.join(accuracies)}"
        )

    def _by_objective(self, losses: Tensor, counts: Tensor) -> dict[str, float]:
        """The losses and accuracies of the objectives that are on, and the weighted sum."""
        loss = dict(zip(OBJECTIVES, losses.tolist(), strict=True))
        count = dict(zip(OBJECTIVES, counts.tolist(), strict=True))
        return {
            "loss": sum(weight * loss[name] for name, weight in self.weights.items()),
            **{f"loss/{name}": loss[name] for name in self.weights},
            **{f"accuracy/{name}": count[name][0] / max(count[name][1], 1) for name in self.weights},
        }

    def _save(self, must: bool) -> None:
        """Saves; a failure ends the run only if this save must succeed, or several in a row did not."""
        if self.metrics:
            self.metrics.flush()
        problem = self.store.save(self.step, self.engine.fragments(), self._run_state())
        if problem is None:
            self.failed_saves = 0
            self._say(f"Saved step {self.step} in {self.store.folder}.")
            return
        self.failed_saves += 1
        self._say(f"Could not save step {self.step}: {problem}. Earlier checkpoints are untouched.")
        if must or self.failed_saves >= MAX_FAILED_SAVES:
            raise StorageError(
                f"Step {self.step} could not be saved in {self.store.folder} ({problem}): make space or mend the disk, "
                f"and start again with the same command to go on from the newest checkpoint."
            )

    def _run_state(self) -> dict[str, Any]:
        return {
            "data": self.data_state.to_dict(),
            "applied_steps": self.engine.applied_steps,
            "skipped_steps": self.skipped_steps,
            "bad_samples": self.bad_samples.num_bad,
            "samples": self.bad_samples.num_seen,
            "config": self.config.model_dump(mode="json"),
            "tokenizer": self.data.tokenizer.fingerprint,
            "layout": {
                "dp": self.mesh.dp.size,
                "tp": self.mesh.tp.size,
                "pp": self.mesh.pp.size,
                "zero_stage": self.config.engine.zero_stage,
            },
            "versions": {"python": platform.python_version(), "torch": version("torch")},
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "ranks": self.mesh.world.size,
            "data x tensor x pipeline parallel": f"{self.mesh.dp.size} x {self.mesh.tp.size} x {self.mesh.pp.size}",
            "micro-batch per rank": self.data.micro_batch_per_rank,
            **{f"samples of {source.name}": source.manifest.samples for source in self.data.sources},
            "device": str(self.mesh.device),
        }

    def _say(self, text: str) -> None:
        if self.mesh.is_main:
            print(text, flush=True)

"""The trainer: steps, metrics, evaluation and checkpoints. Knows an Engine and an iterator of batches."""

import math
import platform
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipelines.batch import Batch
from data_pipelines.order.mixture import DataState
from data_pipelines.stream.budget import BadSampleBudget
from data_pipelines.stream.heldout import HeldoutData
from data_pipelines.stream.loader import TrainingData
from data_pipelines.text import counted
from pretrain.alarms import Negatives
from pretrain.banner import banner, changes, facts
from pretrain.checkpoint.identity import check_same_run
from pretrain.checkpoint.retention import Keep
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import read_run
from pretrain.config import Config
from pretrain.errors import CheckpointError, StoppedError, TrainingError
from pretrain.health import SkippedSteps
from pretrain.heartbeat import Heart
from pretrain.metrics import Clock, Metrics, peak_memory_gib
from pretrain.optim import learning_rate
from pretrain.orders import Orders
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.run_folder import keep_config, keep_tokenizer
from pretrain.saving import Saving
from pretrain.screen import say
from pretrain.stopping import Interrupted
from pretrain.stragglers import Stragglers
from pretrain.validation import AbandonedError, validate


class Trainer:
    """One run, from a fresh start or a checkpoint to its last step."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Engine,
        data: TrainingData,
        heldout: HeldoutData | None,
        orders: Orders,
        heart: Heart,
        elastic: dict[str, int],
    ) -> None:
        self.config = config
        self.orders = orders
        self.heart = heart
        self.elastic = elastic  # what the next start has to know, with another number of ranks
        self.mesh = mesh
        self.engine = engine
        self.data = data
        self.heldout = heldout
        keep = Keep(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.best)
        self.store = CheckpointStore(
            config.output / "checkpoints",
            mesh.world,
            keep,
            node=mesh.node,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.saving = Saving(config.checkpoint, self.store)
        self.metrics: Metrics | None = None  # on the main process, while it trains
        self.step = 0
        self.data_state = data.initial_state()
        self.skipped = SkippedSteps(config.training.max_skipped_steps)
        self.bad_samples = BadSampleBudget(config.data.max_bad_samples, config.data.max_bad_fraction)
        contrastive = config.objectives.contrastive
        self.negatives = Negatives(contrastive, mesh.dp) if contrastive else None
        self.stragglers = Stragglers(mesh)
        self.weights = {objective.name: objective.weight for objective in engine.architecture.objectives}
        # Live view of the temperature's master copy, on the one rank that saves it.
        saved = {fragment.name: fragment for fragment in engine.fragments() if fragment.saved_here}
        temperature = saved.get("temperature.log_scale")
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
        self._restore(checkpoint)

    def _restore(self, checkpoint: Path) -> None:
        """Goes back, or on, to a checkpoint: weights, moments, the data's place and what was counted."""
        run = read_run(checkpoint)
        check_same_run(run, self.config, self.data.tokenizer.fingerprint, str(checkpoint))
        self.data_state = self.data.resumed(DataState.from_dict(run["data"]))
        self.store.load(checkpoint, self.engine.fragments())
        self.engine.loaded(run["applied_steps"])
        self.step = self.saving.saved_step = self.heart.saved_step = run["step"]
        self.skipped.total = run["skipped_steps"]
        self.bad_samples.num_bad, self.bad_samples.num_seen = run["bad_samples"], run["samples"]
        ranks = math.prod(run["layout"].get(axis, 1) for axis in ("dp", "tp", "pp"))
        self._say(f"Resumed from {checkpoint}, saved on {counted(ranks, 'rank')}, at step {self.step}.")
        if changed := list(changes(run["config"], self.config.model_dump(mode="json"))):
            self._say(f"Changed since step {self.step}: {'; '.join(changed)}.")

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
        self._begin()
        try:
            batches = self.data.batches(self.data_state)
            while self.step < training.steps:
                clock = Clock()
                self._train_step(self._next_step(batches, clock), clock)
                last = self.step == training.steps
                self.saving.settle()
                self.heart.saved_step = self.saving.saved_step or -1
                if self.step % checkpoint.every == 0 or last:
                    self._save(must=last)
                if self.heldout and (self.step % training.evaluate_every == 0 or last):
                    self._evaluate(self.heldout)
        except TrainingError:  # on all ranks together
            self.saving.settle(wait=True)
            raise
        finally:
            self.heart.beat("end", self.step)
            if self.metrics:
                self.metrics.close()

    def _begin(self) -> None:
        """Says what will be done, and keeps what the run's folder has to hold."""
        here = sum(f.tensors["master"].numel() for f in self.engine.fragments() if f.saved_here)
        parameters = int(self.mesh.world.sum(torch.tensor(here, device=self.mesh.device)))
        if not self.mesh.is_main:
            return
        for line in banner(self.config, self.mesh, self.data, self.heldout, parameters, self.step):
            say(line)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        keep_config(self.config.output, text, self.step)
        keep_tokenizer(self.config.output, self.config.data.tokenizer)
        self.metrics = self.saving.metrics = Metrics(self.config, self.step)
        self.metrics.describe(text, facts(self.config, self.mesh, self.data, parameters))

    def _next_step(self, batches: Iterator[Batch], clock: Clock) -> list[Batch]:
        """This rank's micro-batches of the next step, once every rank has its own.

        Raises:
            StoppedError: the run was told to stop, be it while it waited for them; the state is saved.
            Interrupted: the same, before there was any.
        """
        micro_batches: list[Batch] = []
        self.heart.beat("data", self.step)
        try:
            with clock.waiting(), self.orders.stop.interrupting():
                micro_batches = [next(batches) for _ in range(self.config.training.accumulation)]
        except Interrupted:
            pass
        self.heart.beat("agree", self.step)
        save, leave = self.orders.pending()
        wishes = torch.tensor([save or self.saving.is_time(), leave], device=self.mesh.device).long()
        save, leave = self.mesh.world.sum(wishes).tolist()
        if leave and self.step == 0:
            raise Interrupted
        if save or leave:
            self._save(must=bool(leave))
        if leave:
            reason = self.mesh.world.from_first(self.orders.reason)
            raise StoppedError(f"{reason}: saved step {self.step}. The same command goes on from there.")
        self.heart.beat("step", self.step)
        return [batch.to(self.mesh.device) for batch in micro_batches]

    def _train_step(self, micro_batches: Sequence[Batch], clock: Clock) -> None:
        """One optimizer step and its report."""
        training = self.config.training
        rate = learning_rate(self.step, training.steps, self.config.optimizer)
        self.stragglers.begin()
        result = self.engine.step([batch.tensors for batch in micro_batches], rate)
        self.step += 1
        self.data_state = self.data.advance(self.data_state)
        batch_id = self._take_stock(micro_batches)
        objectives = self._by_objective(result.losses, result.counts)
        if self.negatives and (problem := self.negatives.missing(objectives["loss/contrastive"], micro_batches)):
            self._say(f"step {self.step}: {problem}")
        temperature = {"temperature": self._temperature()} if self.negatives else {}
        step_s, data_wait_share = clock.read()
        self.stragglers.end(data_wait_share * step_s, step_s)
        shown = self.step % training.log_every == 0 or self.step == training.steps
        slowest = self.stragglers.compare() if shown else None
        if self.metrics:
            values = {
                **objectives,
                **{f"metric/{name}": value for name, value in result.metrics.items()},
                "learning_rate": rate,
                "gradient_norm": result.gradient_norm,
                **temperature,
                **self._epochs(),
                "time/samples_per_s": training.global_batch / step_s,
                "time/step_s": step_s,
                "time/data_wait_share": data_wait_share,
                **(slowest.metrics() if slowest else {}),
                "memory/peak_gib": peak_memory_gib(self.mesh.device),
                "health/skipped_steps": self.skipped.total + (not result.applied),
                "health/bad_samples": self.bad_samples.num_bad,
                "batch_id": batch_id,
            }
            self.metrics.step(self.step, values)
            if shown:
                self._say(self.metrics.line(self.step, values))
        if slowest and slowest.confirmed:
            self._say(f"step {self.step}: {slowest}")
        if said := self.skipped.watch(self.step, result.applied):
            self._say(said)

    def _take_stock(self, micro_batches: Sequence[Batch]) -> int:
        """Counts bad samples, with the other ranks. Returns the id of the global batch, the same on any layout."""
        ids = sum(int(batch.tensors["image_ids"].sum()) for batch in micro_batches) % 2**63
        bad = [sample for batch in micro_batches for sample in batch.bad]
        total_id, total_bad = self.mesh.dp.sum(torch.tensor([ids, len(bad)], device=self.mesh.device)).tolist()
        if total_bad:  # rare: every rank learns all of them, so that the one that prints can name them
            bad = [sample for samples in self.mesh.dp.gather_objects(bad) for sample in samples]
            for sample in bad:
                self._say(f"step {self.step}: replaced {sample.key} of shard {sample.shard}: {sample.reason}")
            if self.metrics:
                self.metrics.bad_samples(self.step, bad)
        self.bad_samples.add(bad, self.config.training.global_batch)
        return total_id % 2**53  # 2**53: what every reader of JSON takes for an integer

    def _epochs(self) -> dict[str, float]:
        epochs = self.data.epochs(self.data_state)
        return {"epoch" if len(epochs) == 1 else f"epoch/{name}": value for name, value in epochs.items()}

    def _temperature(self) -> float:
        here = torch.zeros(1, device=self.mesh.device) if self.log_scale is None else self.log_scale.clone()
        return math.exp(-self.mesh.world.sum(here.to(self.mesh.device)).item())

    def _evaluate(self, heldout: HeldoutData) -> None:
        """Scores on held-out data. Whatever is wrong there costs this evaluation, and not the run."""
        try:
            found = validate(
                self.engine,
                self.mesh,
                heldout,
                self.data.micro_batch_per_rank,
                self.orders.stop,
                beat=lambda: self.heart.beat("evaluate", self.step),
            )
        except AbandonedError as error:
            why = str(error) or "told to stop."
            self._say(f"The evaluation after step {self.step} was given up: {why}")
            return
        if not self.metrics:
            return
        values = self._by_objective(found.losses, found.counts) | found.retrieval
        self.metrics.heldout(self.step, values)
        self.saving.rate(self.step, values)
        figures = [f"{name} accuracy {values[f'accuracy/{name}']:.3f}" for name in self.weights]
        if found.retrieval:
            figures.insert(0, f"text-to-image R@1 {values['text_to_image_R@1']:.3f} of {len(heldout)}")
        self._say(f"held out after step {self.step}: loss {values['loss']:.4f}, {', '.join(figures)}")

    def _by_objective(self, losses: dict[str, float], counts: dict[str, tuple[int, int]]) -> dict[str, float]:
        """The losses and accuracies of the objectives that are on, and the weighted sum."""
        return {
            "loss": sum(weight * losses[name] for name, weight in self.weights.items()),
            **{f"loss/{name}": loss for name, loss in losses.items()},
            **{f"accuracy/{name}": right / max(asked, 1) for name, (right, asked) in counts.items()},
        }

    def _save(self, must: bool) -> None:
        self.heart.beat("save", self.step)
        begin = time.monotonic()
        self.saving.save(self.step, self.engine.fragments(), self._run_state(), must)
        self.heart.saved_step = self.saving.saved_step or -1
        self.orders.saved(time.monotonic() - begin)

    def _run_state(self) -> dict[str, Any]:
        return {
            "data": self.data_state.to_dict(),
            "elastic": self.elastic,
            "applied_steps": self.engine.applied_steps,
            "skipped_steps": self.skipped.total,
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

    def _say(self, text: str) -> None:
        if self.mesh.is_main:
            say(text)

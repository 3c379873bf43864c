"""The trainer: steps, metrics, evaluation and checkpoints. Knows an Engine and an iterator of batches."""

import math
import platform
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
from pretrain.banner import banner, facts
from pretrain.batch_spec import vocabulary_of
from pretrain.checkpoint.identity import changes, check_same_run
from pretrain.checkpoint.retention import Keep
from pretrain.checkpoint.run_state import read_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.transfer import start_from
from pretrain.config import Config
from pretrain.errors import CheckpointError, StoppedError, TrainingError
from pretrain.health import Health
from pretrain.heartbeat import Heart
from pretrain.journal import Journal
from pretrain.lease import Lease
from pretrain.metrics import Clock, peak_memory_gib
from pretrain.optim import learning_rate
from pretrain.orders import Orders
from pretrain.parallel.engine import Engine
from pretrain.parallel.mesh import Mesh
from pretrain.rollback import Rollbacks
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
        lease: Lease | None,
        elastic: dict[str, int],
    ) -> None:
        self.config = config
        self.orders = orders
        self.heart = heart
        self.lease = lease  # on the main process
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
            still_owner=lease.lost if lease else lambda: None,
            node=mesh.node,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.journal = Journal(config, mesh, engine, vocabulary_of(data.tokenizer).size, lease)
        self.saving = Saving(config.checkpoint, self.store, self.journal, self._note_save)
        self.step = 0
        self.data_state = data.initial_state()
        self.health = Health(config.training)
        self.rollbacks = Rollbacks(config.output, mesh.world)
        self.bad_samples = BadSampleBudget(config.data.max_bad_samples, config.data.max_bad_fraction)
        self.origin: dict[str, Any] | None = None  # of the initial weights, where another run made them
        contrastive = config.objectives.contrastive
        self.negatives = Negatives(contrastive, mesh.dp) if contrastive else None
        self.stragglers = Stragglers(mesh)

    def resume(self) -> None:
        """Goes on from the newest valid checkpoint, as `checkpoint.resume` says; call it once, before `fit`.

        Raises:
            CheckpointError: none where there must be one, one where there must be none, or one of another run.
        """
        mode = self.config.checkpoint.resume
        self.store.sweep()
        self.saving.fetch()
        checkpoint = self.store.newest_valid()
        if checkpoint is None:
            if mode == "must":
                raise CheckpointError(
                    f"checkpoint.resume is must, and {self.store.folder} holds no checkpoint: check the output folder, "
                    f"or set checkpoint.resume=auto to start afresh."
                )
            if self.config.init_from:
                fingerprint = self.data.tokenizer.fingerprint
                self.origin, said = start_from(self.config.init_from, self.engine, self.mesh.world, fingerprint)
                for line in said:
                    self.journal.say(line)
            return
        if mode == "never":
            raise CheckpointError(
                f"checkpoint.resume is never, and {checkpoint} exists: choose another output folder, or set "
                f"checkpoint.resume=auto to go on from it."
            )
        run = self._restore(checkpoint)
        ranks = math.prod(run["layout"].get(axis, 1) for axis in ("dp", "tp", "pp"))
        self.journal.say(f"Resumed from {checkpoint}, saved on {counted(ranks, 'rank')}, at step {self.step}.")
        if changed := list(changes(run["config"], self.config.model_dump(mode="json"))):
            self.journal.say(f"Changed since step {self.step}: {'; '.join(changed)}.")

    def _restore(self, checkpoint: Path) -> dict[str, Any]:
        """Goes to a checkpoint: weights, moments, the data's place, and what was counted. Returns what it says."""
        run = read_state(checkpoint)
        check_same_run(run, self.config, self.data.tokenizer.fingerprint, str(checkpoint))
        state = self.data.resumed(DataState.from_dict(run["data"]))
        self.data_state = self.data.leave_out(state, self.rollbacks.load() or state.left_out)
        self.store.load(checkpoint, self.engine.fragments())
        self.engine.loaded(run["applied_steps"])
        self.step = self.heart.saved_step = run["step"]
        self.saving.note_newest(self.step)
        self.origin = run.get("init_from")
        self.health.restore(run["health"])
        self.bad_samples.num_bad, self.bad_samples.num_seen = run["bad_samples"], run["samples"]
        return run

    def fit(self) -> None:
        """Trains until `training.steps`, saving, evaluating and reporting on the way.

        Raises:
            StoppedError: told to stop; the state is saved.
            TrainingError: too many steps were skipped, or the loss jumped after too many rollbacks.
            StorageError: the last checkpoint, or several in a row, could not be written.
            DataError: a shard cannot be read, or too many samples are bad.
        """
        training, checkpoint = self.config.training, self.config.checkpoint
        if self.step >= training.steps:
            self.journal.say(f"Nothing to do: step {self.step} of training.steps {training.steps} is reached.")
            return
        self._begin()
        try:
            batches = self.data.batches(self.data_state)
            while self.step < training.steps:
                clock = Clock()
                problem = self._train_step(self._next_step(batches, clock), clock)
                if problem and self._roll_back(problem):
                    batches = self.data.batches(self.data_state)  # ends the workers of those before
                    continue
                last = self.step == training.steps
                self.saving.settle()
                if self.step % checkpoint.every == 0 or last:
                    self._save(must=last)
                if self.heldout and (self.step % training.evaluate_every == 0 or last):
                    self._evaluate(self.heldout)
            self.saving.finish(beat=lambda: self.heart.beat("end", self.step))
        except TrainingError:  # on all ranks together
            self.saving.settle(wait=True)
            raise
        finally:
            self.heart.beat("end", self.step)
            self.journal.close()

    def _begin(self) -> None:
        """Says what will be done, and keeps what the run's folder has to hold."""
        here = sum(f.tensors["master"].numel() for f in self.engine.fragments() if f.saved_here)
        parameters = int(self.mesh.world.sum(torch.tensor(here, device=self.mesh.device)))
        if not self.lease:
            return
        self.lease.check()
        for line in banner(self.config, self.mesh, self.data, self.heldout, parameters, self.step, self.origin):
            say(line)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        keep_config(self.config.output, text, self.step)
        keep_tokenizer(self.config.output, self.config.data.tokenizer)
        self.journal.open(self.step)
        self.journal.describe(text, facts(self.config, self.mesh, self.data, parameters))

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
        saving, leaving = self.mesh.world.sum(wishes).tolist()
        if leaving and self.step == 0:
            raise Interrupted
        if leaving or (saving and self.step > 0):
            self._save(must=bool(leaving))
        if leaving:
            reason = self.mesh.world.from_first(self.orders.reason)
            raise StoppedError(f"{reason}: saved step {self.step}. The same command goes on from there.")
        self.heart.beat("step", self.step)
        return [batch.to(self.mesh.device) for batch in micro_batches]

    def _train_step(self, micro_batches: Sequence[Batch], clock: Clock) -> str | None:
        """One optimizer step and its report. Returns why the run has to go back, if it has to."""
        training = self.config.training
        rate = learning_rate(self.step, training.steps, self.config.optimizer)
        limit = self.health.limit() if training.spikes == "skip" else math.inf
        self.stragglers.begin()
        result = self.engine.step([batch.tensors for batch in micro_batches], rate, limit)
        self.step += 1
        self.data_state = self.data.advance(self.data_state)
        batch_id = self._take_stock(micro_batches)
        objectives = self.journal.by_objective(result.losses, result.counts)
        if self.negatives and (problem := self.negatives.missing(objectives["loss/contrastive"], micro_batches)):
            self.journal.alarm(self.step, problem)
        temperature = self.journal.temperature()
        step_s, data_wait_share = clock.read()
        self.stragglers.end(data_wait_share * step_s, step_s)
        slowest = self.stragglers.compare() if self.journal.is_shown(self.step) else None
        if self.mesh.is_main:
            values = {
                **objectives,
                **{f"metric/{name}": value for name, value in result.metrics.items()},
                "learning_rate": rate,
                "gradient_norm": result.gradient_norm,
                **temperature,
                **self.journal.epochs(self.data.epochs(self.data_state)),
                "time/samples_per_s": training.global_batch / step_s,
                "time/step_s": step_s,
                "time/data_wait_share": data_wait_share,
                **(slowest.metrics() if slowest else {}),
                "memory/peak_gib": peak_memory_gib(self.mesh.device),
                "health/skipped_steps": self.health.skipped_steps + (not result.applied),
                "health/bad_samples": self.bad_samples.num_bad,
                "batch_id": batch_id,
            }
            self.journal.step(self.step, values)
        if slowest and slowest.confirmed:
            self.journal.alarm(self.step, str(slowest))
        verdict = self.health.judge(self.step, objectives["loss"], result.applied)
        if verdict.said:
            self.journal.alarm(self.step, verdict.said)
        return verdict.go_back

    def _roll_back(self, problem: str) -> bool:
        """Goes back to the newest checkpoint, and leaves out what was read since. False if there is none.

        Raises:
            TrainingError: the run went back too often.
        """
        self.saving.settle(wait=True)
        checkpoint = self.store.newest_valid()  # older than this step, which saves after it is judged
        if checkpoint is None:
            if self.health.skips_too_many:
                raise self.health.too_many_skipped()
            self.journal.alarm(self.step, f"{problem}; there is no checkpoint to go back to: training goes on.")
            return False
        most, before = self.config.training.max_rollbacks, len(self.data_state.left_out)
        if before >= most:
            raise TrainingError(
                f"At step {self.step}, {problem}, and the run has gone back {counted(before, 'time')} already "
                f"(training.max_rollbacks {most}): lower optimizer.learning_rate, look at the data behind "
                f"{checkpoint}, or raise training.max_rollbacks, and start again."
            )
        step, behind = self.step, self.data_state
        self._restore(checkpoint)
        spans = [*self.data_state.left_out, self.data.span(self.data_state, behind)]
        self.rollbacks.keep(spans)
        self.data_state = self.data.leave_out(self.data_state, spans)
        self.journal.open(self.step)
        self.journal.alarm(
            self.step,
            f"{problem} at step {step}: back to {checkpoint}, rollback {before + 1} of {most}; the "
            f"{(step - self.step) * self.config.training.global_batch:,} samples read since are left out.",
        )
        return True

    def _take_stock(self, micro_batches: Sequence[Batch]) -> int:
        """Counts bad samples, with the other ranks. Returns the id of the global batch, the same on any layout."""
        ids = sum(int(batch.tensors["image_ids"].sum()) for batch in micro_batches) % 2**63
        bad = [sample for batch in micro_batches for sample in batch.bad]
        total_id, total_bad = self.mesh.dp.sum(torch.tensor([ids, len(bad)], device=self.mesh.device)).tolist()
        if total_bad:  # rare: every rank learns all of them, so that the one that prints can name them
            bad = [sample for samples in self.mesh.dp.gather_objects(bad) for sample in samples]
            self.journal.bad_samples(self.step, bad)
        self.bad_samples.add(bad, self.config.training.global_batch)
        return total_id % 2**53  # 2**53: what every reader of JSON takes for an integer

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
            self.journal.say(f"The evaluation after step {self.step} was given up: {why}")
            return
        values = self.journal.heldout(self.step, found, len(heldout))
        if self.mesh.is_main:
            self.saving.rate(self.step, values)

    def _save(self, must: bool) -> None:
        self.heart.beat("save", self.step)
        self.saving.save(self.step, self.engine.fragments(), self._run_state(), must)

    def _note_save(self, step: int, took_s: float) -> None:
        self.heart.saved_step = step
        self.orders.saved(took_s)

    def _run_state(self) -> dict[str, Any]:
        return {
            "data": self.data_state.to_dict(),
            "elastic": self.elastic,
            "applied_steps": self.engine.applied_steps,
            "health": self.health.state(),
            "bad_samples": self.bad_samples.num_bad,
            "samples": self.bad_samples.num_seen,
            "config": self.config.model_dump(mode="json"),
            "init_from": self.origin,
            "tokenizer": self.data.tokenizer.fingerprint,
            "layout": {
                "dp": self.mesh.dp.size,
                "tp": self.mesh.tp.size,
                "pp": self.mesh.pp.size,
                "zero_stage": self.config.engine.zero_stage,
            },
            "versions": {"python": platform.python_version(), "torch": version("torch")},
        }

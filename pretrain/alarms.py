"""Known signatures of a run that learns nothing, each said in a sentence: what it means, and what to do."""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from pretrain.config import Config, ContrastiveConfig
from pretrain.parallel.mesh import Axis

PATIENCE = 500  # steps behind the warmup in which an objective should have learnt something
SHORT = 100  # steps that are no accident
TOLERANCE = 0.01  # relative, of a mean over half of PATIENCE
RISE = 5.0  # of the share of bad samples

Values = Mapping[str, float]  # a step's metrics, by name


class Signature(NamedTuple):
    """One way for a run to go wrong that its metrics show."""

    name: str
    shows: Callable[[Sequence[Values]], bool]
    """Whether the last steps, PATIENCE of them at most, the newest last, look like it."""
    sentence: str
    after_warmup: bool = False
    """It is usual in a run that has hardly begun."""


class Alarms:
    """Looks for every signature after each step, and says each once per occurrence."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        self.warmup = config.optimizer.warmup_steps
        self.signatures = signatures(config, vocabulary)
        self._steps: deque[Values] = deque(maxlen=PATIENCE)
        self._trained: deque[Values] = deque(maxlen=PATIENCE)  # of these, those behind the warmup
        self._showing: set[str] = set()

    def raised(self, step: int, values: Values) -> list[str]:
        """The sentences of signatures that show now and did not show a step ago."""
        self._steps.append(values)
        if step > self.warmup:
            self._trained.append(values)
        steps, trained = list(self._steps), list(self._trained)
        showing = {s.name for s in self.signatures if s.shows(trained if s.after_warmup else steps)}
        new, self._showing = showing - self._showing, showing
        return [signature.sentence for signature in self.signatures if signature.name in new]


def chance(config: Config, vocabulary: int) -> dict[str, float]:
    """The loss of each objective of a model that has learnt how often each answer is right, and nothing else."""
    objectives, levels = config.objectives, {}
    if contrastive := objectives.contrastive:
        compared = config.training.global_batch
        if contrastive.negatives == "micro_batch":
            compared //= config.training.accumulation
        if compared > 1:
            share = 1 / compared
            levels["contrastive"] = math.log(compared)
            if contrastive.loss == "sigmoid":
                levels["contrastive"] = compared * _entropy(share)
    if matching := objectives.matching:
        # One true pair and two wrong ones; vilt shows a true one or a wrong one.
        true = matching.pool // 2 / matching.pool if config.model.architecture == "vilt" else 1 / 3
        levels["matching"] = _entropy(true)
    for name in ("masked_lm", "captioning"):
        if getattr(objectives, name):
            levels[name] = math.log(vocabulary)
    return levels


def _entropy(share: float) -> float:
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


_MEANING = {
    "contrastive": "embeddings of all samples are alike",
    "matching": "the model answers every pair alike (collapsed)",
    "masked_lm": "every word looks equally likely",
    "captioning": "every word looks equally likely",
}


def signatures(config: Config, vocabulary: int) -> list[Signature]:
    """Those that a run of this config can show."""
    table = [
        Signature(
            f"{name} at chance",
            lambda steps, name=name, level=level: _stays_at(steps, f"loss/{name}", level),
            f"loss/{name} has been at {level:.4f}, what guessing gives, for {PATIENCE} steps: {_MEANING[name]}. Look "
            f"at pairs of the data with `python -m data_pipelines inspect`, and lower optimizer.learning_rate or "
            f"lengthen optimizer.warmup_steps.",
            after_warmup=True,
        )
        for name, level in chance(config, vocabulary).items()
    ]
    if config.objectives.masked_lm:
        table.append(
            Signature(
                "no masked word right",
                lambda steps: _all_last(steps, lambda values: values["accuracy/masked_lm"] == 0),
                f"accuracy/masked_lm has been 0 for {SHORT} steps: not even frequent words are named. Look at captions "
                f"with `python -m data_pipelines inspect`: tokenizer and language may not fit.",
                after_warmup=True,
            )
        )
    if contrastive := config.objectives.contrastive:
        for end in ("min", "max"):
            bound = getattr(contrastive, f"{end}_temperature")
            table.append(
                Signature(
                    f"temperature at its {end}imum",
                    lambda steps, bound=bound: _all_last(
                        steps, lambda values: math.isclose(values["temperature"], bound, rel_tol=1e-4)
                    ),
                    f"the temperature has been at objectives.contrastive.{end}_temperature {bound} for {SHORT} steps: "
                    + (
                        "usual late in a long run; early in one the loss rewards mere scale, so look for duplicates "
                        "and lower optimizer.learning_rate."
                        if end == "min"
                        else "the model gives up telling samples apart; lower optimizer.learning_rate, and look at "
                        "pairs of the data with `python -m data_pipelines inspect`."
                    ),
                )
            )
    return [
        *table,
        Signature(
            "no gradient",
            lambda steps: steps[-1]["gradient_norm"] == 0,
            "the gradient norm is 0: no weight learns. Every objective may be without a question to answer, or the "
            "precision too low for its gradients (engine.precision).",
        ),
        Signature(
            "data do not move",
            lambda steps: len(steps) > 1 and steps[-1]["batch_id"] == steps[-2]["batch_id"],
            "this step has the same samples as the one before: the data do not move. data.train may hold no more than "
            "training.global_batch samples, or many copies of the same.",
        ),
        Signature(
            "bad samples rise",
            lambda steps: _bad_samples_rise(steps, config.training.global_batch),
            f"the share of bad samples in the last {SHORT} steps is above 1 % and {RISE:g} times that of the steps "
            f"before: a part of the data is broken. bad_samples.jsonl names them; `python -m data_pipelines verify` "
            f"checks shards.",
        ),
    ]


def _stays_at(steps: Sequence[Values], name: str, level: float) -> bool:
    """Both halves of PATIENCE steps are at it on average: single losses scatter, and a curve may pass through it."""
    losses = [values[name] for values in steps]
    half = PATIENCE // 2
    means = [sum(part) / half for part in (losses[:half], losses[half:])]
    return len(losses) == PATIENCE and all(abs(mean - level) <= TOLERANCE * level for mean in means)


def _all_last(steps: Sequence[Values], holds: Callable[[Values], bool]) -> bool:
    """Whether something holds for the last SHORT steps."""
    return len(steps) >= SHORT and all(holds(values) for values in islice(steps, len(steps) - SHORT, None))


def _bad_samples_rise(steps: Sequence[Values], global_batch: int) -> bool:
    if len(steps) < 2 * SHORT:
        return False
    first, border, last = (steps[i]["health/bad_samples"] for i in (0, -SHORT - 1, -1))
    before = (border - first) / ((len(steps) - SHORT - 1) * global_batch)
    lately = (last - border) / (SHORT * global_batch)
    return lately > 0.01 and lately > RISE * before


class Negatives:
    """Looks whether the contrastive objective has anything to compare with. All ranks call it together."""

    def __init__(self, contrastive: ContrastiveConfig, dp: Axis) -> None:
        self.over_the_step = contrastive.negatives == "global_batch"
        self.dp = dp
        self._looked = self._missing = False

    def missing(self, loss: float, micro_batches: Sequence[Batch]) -> str | None:
        """Said once if no negative is left: looked for in the first step, and where a loss of 0 makes it likely."""
        if self._looked and (self._missing or loss != 0):
            return None
        names = ("image_ids", "caption_ids")
        ids = [torch.stack([batch.tensors[name] for name in names]).cpu() for batch in micro_batches]
        if self.over_the_step:
            ids = [torch.cat(ids, dim=1)]
        everyone = [torch.cat(parts, dim=1) for parts in zip(*self.dp.gather_objects(ids), strict=True)]
        self._looked = True
        self._missing = not any(has_negatives(*parts) for parts in everyone)
        if not self._missing:
            return None
        samples = everyone[0].shape[1]
        fix = (
            "all of them share their image or their caption; look at them with `python -m data_pipelines inspect`"
            if samples > 1
            else "lower training.accumulation, or set objectives.contrastive.negatives=global_batch"
        )
        return (
            f"no contrastive negative is left where {samples} samples are compared, so that the contrastive objective "
            f"teaches nothing: {fix}."
        )


def has_negatives(image_ids: Tensor, caption_ids: Tensor) -> bool:
    """Whether any two of G samples differ in both image and caption. (G,), (G,)."""
    # If one differs from the first in its image alone and one in its caption alone, these two differ in both.
    return bool((image_ids != image_ids[0]).any() and (caption_ids != caption_ids[0]).any())

"""Each alarm is raised by what it is about, once, and not by what looks like it."""

import math
from functools import partial

import pytest
import torch

from distributed.tiny import ARCHITECTURES, GLOBAL_NEGATIVES, VOCABULARY, build, micro_batches, run_each, tiny_config
from pretrain.alarms import PATIENCE, SHORT, Alarms, chance, has_negatives
from pretrain.parallel.first_pass import prepare
from pretrain.parallel.mesh import ALONE

WARMUP, BATCH = 3, 32
HEALTHY = {
    "loss/contrastive": 0.5,
    "loss/matching": 0.3,
    "loss/masked_lm": 2.0,
    "accuracy/masked_lm": 0.3,
    "temperature": 0.05,
    "gradient_norm": 1.0,
    "health/bad_samples": 0,
}


def raised(of_step, steps, **changes):
    """step -> the sentences after it. `of_step` changes the metrics of a healthy run."""
    alarms = Alarms(tiny_config(**changes), VOCABULARY.size)
    said = {step: alarms.raised(step, HEALTHY | {"batch_id": step} | of_step(step)) for step in range(1, steps + 1)}
    return {step: sentences for step, sentences in said.items() if sentences}


def constant(**values):
    return lambda step: {name.replace("__", "/"): value for name, value in values.items()}


LEARNS = WARMUP + PATIENCE  # the first step at which an objective should have learnt something
H = 0.6365  # of 1/3
COLLAPSED = "loss/matching has been at 0.6365, what guessing gives, for 500 steps: the model answers every pair alike"


@pytest.mark.parametrize(
    ("of_step", "at", "sentence"),
    [
        (constant(loss__matching=H), LEARNS, COLLAPSED),
        (lambda step: {"loss/matching": H + 0.05 * math.sin(step)}, LEARNS, COLLAPSED),  # single steps scatter
        (constant(loss__contrastive=math.log(16)), LEARNS, "loss/contrastive has been at 2.7726"),
        (constant(loss__masked_lm=math.log(VOCABULARY.size)), LEARNS, "loss/masked_lm has been at 4.1109"),
        (constant(accuracy__masked_lm=0.0), WARMUP + SHORT, "accuracy/masked_lm has been 0 for 100 steps"),
        (constant(temperature=0.01), SHORT, "at objectives.contrastive.min_temperature 0.01 for 100 steps"),
        (constant(temperature=0.5), SHORT, "at objectives.contrastive.max_temperature 0.5 for 100 steps"),
        (lambda step: {"gradient_norm": float(step < 7)}, 7, "the gradient norm is 0"),
        (lambda step: {"batch_id": min(step, 7)}, 8, "the data do not move"),
        # one sample of a hundred is bad, and from step 301 on ten
        (lambda step: {"health/bad_samples": BATCH * (step + 9 * max(0, step - 300)) // 100}, 345, "the share of bad"),
    ],
)
def test_it_is_raised_once(of_step, at, sentence):
    ((step, (said,)),) = raised(of_step, PATIENCE + 100).items()
    assert (step, sentence in said) == (at, True), said


@pytest.mark.parametrize(
    "of_step",
    [
        constant(),
        constant(loss__matching=0.62),
        lambda step: {"loss/matching": 0.8 - 0.0006 * step},  # it passes through
        lambda step: {"loss/matching": H if step < 400 else 0.5},
        lambda step: {"loss/contrastive": math.log(16) * (0.9 if step % 250 < 100 else 1.0)},
        constant(temperature=0.0102),
        lambda step: {"temperature": 0.01 if step % SHORT else 0.011},
        lambda step: {"accuracy/masked_lm": float(step % (SHORT - 1) == 0)},
        lambda step: {"gradient_norm": 1e-12},
        lambda step: {"batch_id": step % 2},
        lambda step: {"health/bad_samples": BATCH * step // 10},  # many all along
        lambda step: {"health/bad_samples": 5 * (step > 300)},  # a few at once
    ],
)
def test_what_looks_like_it_raises_nothing(of_step):
    assert raised(of_step, PATIENCE + 100) == {}


def test_the_first_steps_of_a_run_and_its_warmup_are_not_judged():
    assert raised(constant(loss__matching=H), 400 + PATIENCE, training__steps=2000, optimizer__warmup_steps=401) == {}


def test_what_shows_again_is_said_again():
    assert list(raised(lambda step: {"gradient_norm": float(step % 10 > 1)}, 25)) == [1, 10, 20]


def test_an_objective_that_is_off_raises_nothing():
    alarms = Alarms(tiny_config(objectives__contrastive=None, **ARCHITECTURES["vilt"].changes), VOCABULARY.size)
    for step in range(PATIENCE + 100):
        values = {name: value for name, value in HEALTHY.items() if name not in ("loss/contrastive", "temperature")}
        assert alarms.raised(step, values | {"batch_id": step}) == []


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("clip", "coca")])
def test_chance_is_the_matching_loss_of_a_model_that_answers_every_pair_alike(architecture):
    config = tiny_config(**ARCHITECTURES[architecture].changes)
    level, model = chance(config, VOCABULARY.size)["matching"], build(config)
    batch = micro_batches(0, config)[0]
    batch["image_ids"] = batch["caption_ids"] = torch.arange(16)  # so that every sample has negatives
    ((have, stand_ins),) = prepare(model, [batch], ALONE, partial(run_each, model))
    found = []
    for share in (0.2, 1 / 3, 0.5, 0.6):
        logits = torch.tensor([1 - share, share]).log()
        model.matching_head.forward = lambda tokens, logits=logits: logits.expand(len(tokens), 2)
        found.append(float(model.run(["loss/matching"], have, stand_ins)["loss/matching"]))
    assert min(found) == pytest.approx(level, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, 1.0),
        (GLOBAL_NEGATIVES, 1.0),
        ({"objectives__contrastive__loss": "sigmoid"}, 0.0),
    ],
)
def test_chance_is_the_contrastive_loss_of_embeddings_that_are_alike(changes, alike):
    config = tiny_config(**changes)
    samples = BATCH if changes is GLOBAL_NEGATIVES else BATCH // 2
    head, ids = build(config).contrastive_head, torch.arange(samples)
    rows = torch.full((samples, 4), 0.5)
    bias = () if alike else (torch.tensor([math.log(1 / (samples - 1))]),)  # of a sigmoid, how rare a pair is
    loss, _ = head(rows * alike, rows * alike, ids, ids, torch.zeros(1), *bias)
    assert float(loss) == pytest.approx(chance(config, VOCABULARY.size)["contrastive"], rel=1e-5)


@pytest.mark.parametrize(
    ("images", "captions", "left"),
    [
        ([1, 2, 3], [7, 7, 7], False),
        ([4, 4, 4], [1, 2, 3], False),
        ([5], [5], False),
        ([1, 2, 1], [7, 7, 8], True),  # the second and the third
        ([1, 2], [1, 2], True),
    ],
)
def test_negatives_are_left_where_two_samples_differ_in_image_and_caption(images, captions, left):
    by_hand = any(a != c and b != d for a, b in zip(images, captions) for c, d in zip(images, captions))  # noqa: B905
    assert has_negatives(torch.tensor(images), torch.tensor(captions)) is by_hand is left

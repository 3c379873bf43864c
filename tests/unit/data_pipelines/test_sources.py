"""Several sources in one run: shares by config, epochs of their own, changes that leave the past alone."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from corpus import Corpus, Members, caption, jpeg, make_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.order.mixture import DataState
from data_pipelines.stream.loader import TrainingData

CLEAN, SMALL = 1000, 2000  # numbers of the samples in these two sources begin here


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> dict[str, Path]:
    """Two more sources: one of some size, and one smaller than a lane of the others."""

    def numbered(first: int):
        return lambda index, sample: sample | {"jpg": jpeg(first + index), "txt": caption(first + index).encode()}

    clean = make_corpus(tmp_path_factory.mktemp("clean"), tokenizer_path, (40, 60), numbered(CLEAN))
    small = make_corpus(tmp_path_factory.mktemp("small"), tokenizer_path, (5,), numbered(SMALL))
    return {"clean": clean.manifest, "small": small.manifest}


def mixture(corpus: Corpus, others: dict[str, Path], **settings: dict[str, object]) -> dict[str, object]:
    manifests = {"web": corpus.manifest, **others}
    return {name: {"manifest": str(manifests[name])} | how for name, how in settings.items()}


def taken(data: TrainingData, state: DataState, steps: int) -> list[list[int]]:
    """Image ids of each step."""
    return [batch.tensors["image_ids"].tolist() for batch in islice(data.batches(state), steps)]


def source_of(corpus: Corpus, others: dict[str, Path]) -> dict[int, str]:
    """The source of each image, by its id."""
    found: dict[int, str] = {}
    for name, manifest in {"web": corpus.manifest, **others}.items():
        data = replace(corpus).training(train=manifest, lanes=1, global_batch=4)
        samples = data.sources[0].manifest.samples // 4
        found |= {image: name for step in taken(data, data.initial_state(), samples) for image in step}
    return found


def test_each_source_has_its_share_and_its_own_epochs(corpus: Corpus, others: dict[str, Path]):
    train = mixture(corpus, others, web={"weight": 3}, clean={"weight": 1}, small={"weight": 0.25})
    data = corpus.training(train=train, lanes=1)
    state, steps = data.initial_state(), taken(data, data.initial_state(), 170)
    names = source_of(corpus, others)
    flat = [names[image] for step in steps for image in step]  # 4,080 samples in grains of 4
    assert {name: round(flat.count(name) / len(flat), 2) for name in set(flat)} == {
        "web": 0.71,
        "clean": 0.24,
        "small": 0.06,
    }
    for _ in range(170):
        state = data.advance(state)
    assert data.epochs(state) == {
        "web": pytest.approx(flat.count("web") / 164),
        "clean": pytest.approx(flat.count("clean") / 100),
        "small": pytest.approx(flat.count("small") / 4),
    }
    for name, size in {"web": 164, "clean": 100}.items():
        images = [image for step in steps for image in step if names[image] == name]
        epochs = [images[start : start + size] for start in range(0, len(images) - size, size)]
        assert len(epochs) > 5
        assert all(len(set(epoch)) == size for epoch in epochs)


def test_epochs_instead_of_weights_read_each_source_as_often_as_they_say(corpus: Corpus, others: dict[str, Path]):
    data = corpus.training(train=mixture(corpus, others, web={"epochs": 1}, clean={"epochs": 3}), lanes=1)
    state = data.initial_state()
    while data.epochs(state)["web"] < 5:
        state = data.advance(state)
    assert data.epochs(state)["clean"] / data.epochs(state)["web"] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(("dp_size", "accumulation"), [(2, 1), (3, 2), (1, 6)])
def test_a_mixture_is_the_same_on_any_layout(corpus: Corpus, others: dict[str, Path], dp_size: int, accumulation: int):
    train = mixture(corpus, others, web={"weight": {0: 2, 5: 1}}, clean={"weight": 1})
    whole = corpus.training(train=train)
    expected = [sorted(step) for step in taken(whole, whole.initial_state(), 12)]
    layout = {"dp_size": dp_size, "accumulation": accumulation}
    ranks = [corpus.training(train=train, dp_rank=rank, **layout) for rank in range(dp_size)]
    streams = [data.batches(data.initial_state()) for data in ranks]
    for step in expected:
        batches = [next(stream) for stream in streams for _ in range(accumulation)]
        assert sorted(image for batch in batches for image in batch.tensors["image_ids"].tolist()) == step


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 30), st.integers(1, 30))
def test_weights_that_change_at_a_step_leave_the_steps_before_it_as_they_were(
    corpus: Corpus, others: dict[str, Path], change: int, resume: int
):
    before = corpus.training(train=mixture(corpus, others, web={"weight": 2}, clean={"weight": 1}))
    schedule = {0: 2, change: 0.5} if change else {0: 0.5}
    after = corpus.training(train=mixture(corpus, others, web={"weight": schedule}, clean={"weight": 1}))
    old, new = (taken(data, data.initial_state(), 34) for data in (before, after))
    assert new[:change] == old[:change]
    assert new[change:] != old[change:]
    # No grain is lost or read twice at the change: the first epoch of each source has each sample once.
    names = source_of(corpus, others)
    for name, size in {"web": 160, "clean": 96}.items():
        epoch = [image for step in new for image in step if names[image] == name][:size]
        assert len(set(epoch)) == len(epoch)
    # A resume goes on through it, and so does editing the weights of a run that was stopped there.
    state = after.initial_state()
    for _ in range(resume):
        state = after.advance(state)
    assert taken(after, after.resumed(DataState.from_dict(state.to_dict())), 34 - resume) == new[resume:]
    state = before.initial_state()
    for _ in range(change):
        state = before.advance(state)
    edited = corpus.training(train=mixture(corpus, others, web={"weight": 0.5}, clean={"weight": 1}))
    assert taken(edited, edited.resumed(state), 34 - change) == new[change:]


def test_a_source_added_to_a_run_leaves_the_others_where_they_stood(corpus: Corpus, others: dict[str, Path]):
    alone = corpus.training(train=mixture(corpus, others, web={}), lanes=1)
    state = alone.initial_state()
    for _ in range(3):
        state = alone.advance(state)
    both = corpus.training(train=mixture(corpus, others, clean={"weight": 1}, web={"weight": 1}), lanes=1)
    names = source_of(corpus, others)
    first = [image for step in taken(alone, alone.initial_state(), 3) for image in step]
    later = [image for step in taken(both, both.resumed(state), 6) for image in step]
    web = first + [image for image in later if names[image] == "web"]
    assert 100 < len(web) == len(set(web)) < len(first) + len(later)
    with pytest.raises(DataError, match=r"data\.train has no clean \(give it back, with weight 0"):
        alone.resumed(both.initial_state())


def test_the_order_of_the_lines_in_a_config_changes_nothing(corpus: Corpus, others: dict[str, Path]):
    parts = {"web": {"weight": 2}, "clean": {"weight": 1}}
    one = corpus.training(train=mixture(corpus, others, **parts))
    other = corpus.training(train=mixture(corpus, others, **dict(reversed(parts.items()))))
    assert one.initial_state() == other.initial_state()
    assert taken(one, one.initial_state(), 5) == taken(other, other.initial_state(), 5)


def test_positions_are_unique_over_the_run(corpus: Corpus, others: dict[str, Path]):
    data = corpus.training(train=mixture(corpus, others, web={"weight": {0: 1, 3: 5}}, small={"weight": 1}), lanes=1)
    positions = torch.cat([batch.tensors["positions"] for batch in islice(data.batches(data.initial_state()), 60)])
    assert positions.tolist() == list(range(60 * 24))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"a": {"manifest": "m", "weight": 1, "epochs": 2}}, r"weight 1\.0 and epochs 2\.0 are both given: remove one"),
        ({"a": {"manifest": "m", "weight": {5: 1}}}, r"does not say what holds from step 0 on: add `0: \.\.\.`"),
        (
            {"a": {"manifest": "m", "epochs": 2}, "b": {"manifest": "m"}},
            r"data\.train\.a has epochs and data\.train\.b has",
        ),
        ({}, r"data\.train names no source"),
    ],
)
def test_shares_that_mean_nothing_are_refused(train: dict[str, object], words: str):
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate({"train": train, "tokenizer": "t"})


def after(data: TrainingData, state: DataState, steps: int) -> DataState:
    for _ in range(steps):
        state = data.advance(state)
    return state


@pytest.mark.parametrize(
    "weights", [{"weight": 1}, {"weight": {0: 1, 5: 4}}], ids=["same shares", "shares that change"]
)
def test_a_run_that_leaves_out_a_span_reads_all_other_samples_once(corpus: Corpus, others: dict[str, Path], weights):
    """Steps 4 to 6 are left out, in which the shares may change; from step 4 on they are those of its number."""
    data = corpus.training(train=mixture(corpus, others, web=weights, clean={"weight": 1}), global_batch=16)
    start = data.initial_state()
    back, spike = after(data, start, 3), after(data, start, 6)
    given = [image for step in taken(data, start, 6) for image in step]
    state = data.leave_out(back, [data.span(back, spike)])
    assert (state.step, state.grains, state.segment.taken_before(state.grains)) == (
        3,
        spike.grains,
        spike.segment.taken_before(spike.grains),
    )
    rest = [image for step in taken(data, state, 6) for image in step]
    epoch = {"web": 160, "clean": 100}
    names = source_of(corpus, others)
    for name, samples in epoch.items():
        read = [image for image in given + rest if names[image] == name]
        assert len(set(read[:samples])) == min(len(read), samples)


@given(st.integers(0, 3), st.sampled_from([(0, 8), (0, 16), (0, 32), (1, 8), (1, 16), (2, 16), (2, 32)]))
@settings(deadline=None, max_examples=10)
def test_a_run_resumed_before_a_span_that_is_left_out_jumps_over_it_again(
    corpus: Corpus, steps: int, resumed_at: tuple[int, int]
):
    """From any checkpoint, also an older one, and with another batch, if a step of it begins where the span does."""
    checkpoint, global_batch = resumed_at
    data, other = corpus.training(global_batch=16), corpus.training(global_batch=global_batch, accumulation=2)
    start = data.initial_state()
    spans = [data.span(after(data, start, 2), after(data, start, 4 + steps))]
    spans.append(data.span(data.leave_out(after(data, start, 2), spans), after(data, start, 5 + steps)))
    state = data.leave_out(after(data, start, checkpoint), spans)
    expected = taken(data, state, 4)
    state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    resumed = [image for step in taken(other, other.resumed(state), 8 * 16 // global_batch) for image in step]
    assert resumed == [image for step in expected for image in step]
    whole = [image for step in taken(data, start, 9 + steps) for image in step]
    left = whole[16 * checkpoint : 32] + whole[16 * (5 + steps) :]
    assert resumed == left[: len(resumed)]


def test_a_step_at_which_every_source_rests_is_refused_before_the_run(corpus: Corpus, others: dict[str, Path]):
    train = mixture(corpus, others, web={"weight": {0: 1, 4: 0}}, clean={"weight": 0})
    with pytest.raises(
        DataError, match=r"At step 4 every source of data\.train has the weight 0: give one of them more"
    ):
        corpus.training(train=train)


def test_a_source_too_small_for_a_grain_is_named(corpus: Corpus, others: dict[str, Path]):
    with pytest.raises(DataError, match=r"manifest\.json: 5 samples are too few for 1 lanes .* grain of 8"):
        corpus.training(train=mixture(corpus, others, small={}), grain=8, lanes=1)


# Several captions ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Corpus:
    def with_captions(index: int, sample: Members) -> Members:
        captions = json.dumps({"captions": ["red", " green ", "", "large"]}).encode()
        return sample | {"json": captions} if index % 2 else sample

    return make_corpus(tmp_path_factory.mktemp("several"), tokenizer_path, (64,), with_captions)


def captions_of(batches: list[Batch], data: TrainingData) -> list[str]:
    pieces = {tuple(data.tokenizer.encode(word, 12)[0].tolist()): word for word in ("red", "green", "large")}
    return [pieces.get(tuple(row), "its own") for batch in batches for row in batch.tensors["text"].tolist()]


def test_one_of_several_captions_is_chosen_by_position(several: Corpus):
    data = several.training(lanes=1, global_batch=4)
    batches = list(islice(data.batches(data.initial_state()), 64))  # four epochs
    chosen = captions_of(batches, data)
    assert set(chosen) == {"red", "green", "large", "its own"}
    assert chosen.count("its own") == 128
    assert all(20 < chosen.count(word) < 70 for word in ("red", "green", "large"))
    again = several.training(lanes=1, global_batch=16, accumulation=2)
    assert captions_of(list(islice(again.batches(again.initial_state()), 32)), again) == chosen
    by_image: dict[int, set[str]] = {}
    for image, word in zip(torch.cat([batch.tensors["image_ids"] for batch in batches]).tolist(), chosen, strict=True):
        by_image.setdefault(image, set()).add(word)
    assert sum(len(words) > 1 for words in by_image.values()) > 20  # another one in another epoch


def test_held_out_data_takes_the_first_of_several_captions(several: Corpus):
    (batch,) = several.heldout().batches(64, records=True)
    assert {record.caption for record in batch.records[1::2]} == {"red"}

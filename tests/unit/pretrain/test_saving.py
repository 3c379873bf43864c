"""Saving behind training: when, from a copy, one at a time; which checkpoints stay; what becomes of failed saves."""

import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.checkpoint.retention import Keep, add_score, pin, read_scores
from pretrain.checkpoint.store import CheckpointStore, Failed, Saved
from pretrain.config import CheckpointConfig
from pretrain.errors import StorageError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole
from pretrain.saving import MAX_FAILED_SAVES, Saving


def state(value):
    return [Fragment("bias", whole(torch.empty(9)), 0, {"master": torch.full((9,), float(value))})]


def steps(store):
    return sorted(int(path.name.removeprefix("step-")) for path in store.folder.glob("step-*"))


def saving(folder, said=None, **config):
    """Behind a journal that prints what it is told, and puts a save's metrics into `said`."""
    note = [] if said is None else said
    journal: Any = SimpleNamespace(flush=lambda: None, checkpoint=note.append, say=print)
    store = CheckpointStore(folder, ALONE, Keep(2))
    return Saving(CheckpointConfig(**config), store, journal, on_saved=lambda step, took_s: None)


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that waits for a word."""
    gate, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (gate.wait(20), fsync(handle))[1])
    yield gate
    gate.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_what_it_changes_is_not_in_it(tmp_path, slow_disk):
    store, fragments = CheckpointStore(tmp_path, ALONE), state(1)
    store.save(1, fragments, {})
    fragments[0].tensors["master"].fill_(2)
    assert store.settle(wait=False) is None
    assert steps(store) == []
    slow_disk.set()
    assert store.settle(wait=True).step == 1
    assert store.settle(wait=False) is None
    loaded = state(0)
    store.load(store.newest_valid(), loaded)
    assert loaded[0].tensors["master"].tolist() == [1.0] * 9


def test_the_next_save_waits_for_the_one_in_flight_and_the_wait_is_measured(tmp_path, slow_disk):
    said = []
    behind = saving(tmp_path, said)
    behind.save(1, state(1), {}, must=False)
    threading.Timer(0.3, slow_disk.set).start()
    behind.save(2, state(2), {}, must=True)
    assert steps(behind.store) == [1, 2]
    assert said[0]["stall_s"] > 0.25
    assert said[0]["write_s"] > 0.25
    assert said[1]["write_s"] < 0.25


def test_a_save_that_is_not_asynchronous_is_done_when_it_returns(tmp_path):
    behind = saving(tmp_path, asynchronous=False)
    behind.save(1, state(1), {}, must=False)
    assert behind.saved_step == 1


def test_what_is_saved_already_is_not_saved_again(tmp_path, capsys):
    behind = saving(tmp_path)
    for _ in range(2):
        behind.save(1, state(1), {}, must=True)
    assert capsys.readouterr().out.count("Saved step 1 in") == 1


def test_it_is_time_after_so_many_minutes_and_again_after_as_many_more(tmp_path):
    behind = saving(tmp_path, every_minutes=0.001)
    assert not saving(tmp_path, every_minutes=60).is_time()
    assert not saving(tmp_path).is_time()
    threading.Event().wait(0.1)
    assert behind.is_time()
    behind.config = CheckpointConfig(every_minutes=60)
    behind.save(1, state(1), {}, must=True)
    assert not behind.is_time()


def test_a_failed_save_is_said_and_tried_again_and_the_third_in_a_row_ends_the_run(tmp_path, monkeypatch, capsys):
    behind = saving(tmp_path)
    behind.save(1, state(1), {}, must=True)

    def full(handle):
        raise OSError(28, "No space left on device")

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    behind.save(2, state(2), {}, must=False)
    behind.settle(wait=True)
    assert "Could not save step 2: rank 0: No space left on device: " in capsys.readouterr().out
    monkeypatch.setattr(os, "fsync", fsync)
    behind.save(3, state(3), {}, must=True)
    assert steps(behind.store) == [1, 3]
    monkeypatch.setattr(os, "fsync", full)
    for step in range(4, 3 + MAX_FAILED_SAVES):
        behind.save(step, state(step), {}, must=False)
        behind.settle(wait=True)
    behind.save(9, state(9), {}, must=False)
    with pytest.raises(StorageError, match=r"Step 9 could not be saved in .*No space left.*same command"):
        behind.settle(wait=True)
    assert steps(behind.store) == [1, 3]
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_save_that_must_succeed_ends_the_run_if_it_does_not(tmp_path):
    behind = saving(tmp_path / "file" / "checkpoints")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="Step 1 could not be saved in"):
        behind.save(1, state(1), {}, must=True)


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Keep(2), [8, 9]),
        (Keep(3, every=4), [4, 7, 8, 9]),
        (Keep(2, best="text_to_image_R@1"), [3, 8, 9]),
        (Keep(2, best="loss"), [5, 8, 9]),
        (Keep(2, best="loss/matching"), [5, 8, 9]),
        (Keep(2, every=6, best="loss"), [5, 6, 8, 9]),
    ],
)
def test_which_checkpoints_stay(keep, stay):
    gone = keep.superfluous(range(1, 10), {3: 0.9, 5: 0.1, 7: 0.5, 99: 7.0}, pinned=[])
    assert [step for step in range(1, 10) if step not in gone] == stay


def test_a_pinned_checkpoint_and_the_best_stay(tmp_path):
    store = CheckpointStore(tmp_path, ALONE, Keep(2, best="loss"))
    for step in range(1, 8):
        store.save(step, state(step), {})
        assert isinstance(store.settle(wait=True), Saved)
        if step == 2:
            pin(store.folder / "step-000000002")
        add_score(store.folder, "loss", step, {3: 0.1}.get(step, 0.5))
    assert steps(store) == [2, 3, 6, 7]
    assert store.newest_valid(step=2) is not None


def test_scores_of_another_metric_or_that_cannot_be_read_count_as_none(tmp_path):
    add_score(tmp_path, "loss", 5, 0.5)
    add_score(tmp_path, "loss", 6, float("nan"))
    assert read_scores(tmp_path, "loss") == {5: 0.5}
    assert read_scores(tmp_path, "accuracy/matching") == {}
    assert read_scores(tmp_path / "nowhere", "loss") == {}
    for text in ("", "[]", '{"loss": 3}', '{"loss": {"x": 1}}', '{"loss": {"1": null}}'):
        (tmp_path / "scores.json").write_text(text)
        assert read_scores(tmp_path, "loss") == {}


def test_a_checkpoint_that_is_removed_is_first_no_checkpoint_any_more(tmp_path, monkeypatch):
    """So that a kill in between leaves a temporary folder, and nothing incomplete."""
    store = CheckpointStore(tmp_path, ALONE, Keep(2))
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: None)
    for step in (1, 2, 3):
        store.save(step, state(step), {})
        store.settle(wait=True)
    assert steps(store) == [2, 3]
    assert len(list(tmp_path.glob(".tmp-step-000000001-*"))) == 1
    monkeypatch.undo()
    store.sweep()
    assert not list(tmp_path.glob(".tmp-*"))


def test_whatever_ends_the_thread_is_a_failed_save(tmp_path):
    fragments = state(1)
    fragments[0].tensors["master"] = torch.zeros(9, dtype=torch.float64)
    store = CheckpointStore(tmp_path, ALONE, asynchronous=False)
    store.save(1, fragments, {})
    outcome = store.settle(wait=True)
    assert isinstance(outcome, Failed)
    assert "AssertionError" in outcome.problem

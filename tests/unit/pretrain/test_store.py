"""Checkpoints: whole or not there, found only when every byte is what was written."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.retention import Keep
from pretrain.checkpoint.store import CheckpointStore, Failed
from pretrain.checkpoint.verify import read_run
from pretrain.errors import CheckpointError, FencedError, StorageError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole


def state(seed=0, shape=(40, 30)):
    generator = torch.Generator().manual_seed(seed)
    numel = torch.Size(shape).numel()
    tensors = {kind: torch.randn(numel, generator=generator) for kind in ("master", "exp_avg", "exp_avg_sq")}
    return [Fragment("layer.weight", whole(torch.empty(shape)), 0, tensors)]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", ALONE, Keep(2))


def save(store, step, fragments, run):
    """Why there is no checkpoint, or None."""
    store.save(step, fragments, run)
    outcome = store.settle(wait=True)
    assert outcome.step == step
    return outcome.problem if isinstance(outcome, Failed) else None


def values(store, checkpoint):
    fragments = state(seed=99)
    store.load(checkpoint, fragments)
    return fragments[0].tensors["master"]


def test_what_was_saved_is_loaded(store):
    assert save(store, 5, state(), {"note": "x"}) is None
    checkpoint = store.newest_valid()
    assert checkpoint.name == "step-000000005"
    assert read_run(checkpoint) == {"note": "x", "step": 5}
    assert torch.equal(values(store, checkpoint), state()[0].tensors["master"])


def test_the_file_is_safetensors_as_the_library_reads_it(store):
    save(store, 5, state(), {})
    tensors = load_file(store.newest_valid() / "node-00000.safetensors")
    assert torch.equal(tensors["0/trained"], torch.stack(list(state()[0].tensors.values())))


def test_only_the_newest_stay(store):
    for step in (1, 2, 3, 4):
        save(store, step, state(step), {})
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-000000003", "step-000000004"]


def test_any_flipped_byte_is_found_and_the_one_before_is_taken(store):
    """One byte in each 256 of every file, COMMIT and MANIFEST included."""
    save(store, 1, state(1), {})
    save(store, 2, state(2), {})
    sound = store.folder / "sound"
    shutil.copytree(store.folder / "step-000000002", sound)
    for file in sorted(path.name for path in sound.iterdir()):
        content = (sound / file).read_bytes()
        for place in range(0, len(content), 256):
            broken = store.folder / "step-000000002"
            if not broken.exists():
                shutil.copytree(sound, broken)
            (broken / file).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert store.newest_valid().name == "step-000000001", f"{file}, byte {place}"
    assert len(list((store.folder / "quarantine").glob("*.reason.txt"))) > 50


@pytest.mark.parametrize(
    "file", ["node-00000.safetensors", "index.json", "intervals.bin", "run.json", "MANIFEST.json", "COMMIT"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_missing_or_cut_file_is_found(store, file, damage, capsys):
    save(store, 1, state(1), {})
    save(store, 2, state(2), {})
    path = store.folder / "step-000000002" / file
    match damage:
        case "missing":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "empty":
            path.write_bytes(b"")
    assert store.newest_valid().name == "step-000000001"
    assert "step-000000002 is not whole" in capsys.readouterr().out


def test_no_valid_checkpoint_is_an_error_and_never_a_fresh_start(store):
    assert store.newest_valid() is None
    save(store, 1, state(), {})
    (store.folder / "step-000000001" / "COMMIT").unlink()
    for _ in range(2):  # also the second time, when all that is left is the quarantine
        with pytest.raises(
            CheckpointError, match=r"No checkpoint in .* is valid: the reasons are in .*quarantine"
        ) as e:
            store.newest_valid()
        assert e.value.exit_code == 3


def test_a_save_that_cannot_be_written_costs_that_save_alone(store):
    save(store, 1, state(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        problem = save(store, 2, state(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in problem
    assert [path.name for path in store.folder.iterdir() if path.is_dir()] == ["step-000000001"]
    assert torch.equal(values(store, store.newest_valid()), state(1)[0].tensors["master"])
    assert save(store, 3, state(3), {}) is None


def test_too_little_space_is_seen_before_a_byte_is_written(store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    problem = save(store, 1, state(), {})
    assert "GiB free, and a checkpoint takes" in problem
    assert "make space, or lower checkpoint.keep" in problem
    assert list(store.folder.iterdir()) == []


def test_what_an_interrupted_save_left_is_swept_and_never_loaded(store):
    save(store, 1, state(1), {})
    shutil.copytree(store.folder / "step-000000001", store.folder / ".tmp-step-000000002-abc")
    assert store.newest_valid().name == "step-000000001"
    store.sweep()
    assert not list(store.folder.glob(".tmp-*"))


def test_a_checkpoint_of_another_model_names_the_parameter_and_both_shapes(store):
    save(store, 1, state(), {})
    checkpoint = store.newest_valid()
    with pytest.raises(CheckpointError, match=r"layer.weight has shape \(40, 30\) in it, and shape \(40, 31\) here"):
        read_fragments(checkpoint, state(shape=(40, 31)))
    other = [Fragment("layer.bias", whole(torch.empty(3)), 0, {"master": torch.zeros(3)})]
    with pytest.raises(CheckpointError, match=r"layer.bias is not in it, and shape \(3,\) here. Restore the model"):
        read_fragments(checkpoint, other)


def test_nothing_in_a_checkpoint_is_pickled(store):
    save(store, 1, state(), {})
    kinds = {path.suffix for path in store.newest_valid().iterdir()}
    assert kinds == {".safetensors", ".json", ".bin", ""}
    json.loads((store.newest_valid() / "index.json").read_text())


@pytest.mark.parametrize(
    "name",
    ["step-backup", "step-000000002-best", "step-best", "step-old", "step-2", "step-0000000002", "step-000000009"],
)
def test_a_copy_of_a_checkpoint_is_neither_read_nor_deleted_and_is_named(store, name, capsys):
    for step in (1, 2, 4):
        save(store, step, state(step), {})
        if step == 2:
            shutil.copytree(store.folder / "step-000000002", store.folder / name)
    (store.folder / "notes.txt").write_text("mine")
    store.sweep()
    assert f"Left alone in {store.folder}, as no checkpoints of this run: notes.txt, {name}." in capsys.readouterr().out
    assert store.newest_valid().name == "step-000000004"
    for step in (6, 8):
        save(store, step, state(step), {})
    there = {path.name for path in store.folder.iterdir()} - {"LATEST"}
    assert there == {"step-000000006", "step-000000008", name, "notes.txt"}
    assert torch.equal(values(store, store.folder / name), state(2)[0].tensors["master"])


def test_a_copy_under_the_name_of_a_step_to_come_makes_room_for_it_and_is_kept(store, capsys):
    save(store, 1, state(1), {})
    shutil.copytree(store.folder / "step-000000001", store.folder / "step-000000002")
    assert save(store, 2, state(2), {}) is None
    assert store.newest_valid().name == "step-000000002"
    assert torch.equal(values(store, store.newest_valid()), state(2)[0].tensors["master"])
    assert "step-000000002 makes room for step 2" in capsys.readouterr().out
    (copy,) = [path for path in (store.folder / "quarantine").iterdir() if path.is_dir()]
    assert torch.equal(values(store, copy), state(1)[0].tensors["master"])


def test_copies_alone_are_an_error_that_says_how_to_go_on_from_them(store):
    save(store, 1, state(1), {})
    (store.folder / "step-000000001").rename(store.folder / "step-best")
    with pytest.raises(CheckpointError, match=r"holds step-best, but nothing under the name .*rename one to step-N"):
        store.newest_valid()


def test_steps_are_ordered_as_numbers(store):
    for step in (999_999_999, 1_000_000_000):
        save(store, step, state(), {})
    assert store.newest_valid().name == "step-1000000000"


def test_the_checkpoint_of_one_step_is_found_or_those_there_are_named(store):
    save(store, 1, state(1), {})
    save(store, 2, state(2), {})
    assert store.newest_valid(step=1).name == "step-000000001"
    with pytest.raises(CheckpointError, match=r"No checkpoint of step 3 in .*: those there are of 1, 2\."):
        store.newest_valid(step=3)


def test_a_reader_beside_a_live_run_moves_nothing_and_says_what_is_wrong(store):
    save(store, 1, state(1), {})
    (store.folder / "step-000000001" / "COMMIT").unlink()
    with pytest.raises(CheckpointError, match=r"is valid: step-000000001: No such file .*COMMIT"):
        store.newest_valid(quarantine=False)
    assert (store.folder / "step-000000001").is_dir()


def test_what_is_swept_is_what_a_save_left_and_nothing_that_resembles_it(store):
    save(store, 1, state(1), {})
    mine = store.folder / ".tmp-notes"
    mine.mkdir()
    store.sweep()
    assert mine.is_dir()


def test_a_checkpoint_that_is_damaged_and_cannot_be_moved_away_is_one_sentence(store):
    save(store, 1, state(1), {})
    (store.folder / "step-000000001" / "COMMIT").write_text("x")
    (store.folder / "quarantine").touch()
    with pytest.raises(
        StorageError, match=r"step-000000001 is not whole \(COMMIT is not .*\), and cannot be moved away"
    ):
        store.newest_valid()


def test_a_job_that_no_longer_owns_the_folder_changes_nothing_in_it(store):
    save(store, 1, state(1), {})
    (store.folder / "step-000000001" / "COMMIT").write_text("x")
    (store.folder / ".tmp-step-000000009-abc").mkdir()
    before = sorted(store.folder.rglob("*"))
    stale = CheckpointStore(store.folder, ALONE, still_owner=lambda: "Job 7 owns it now.")
    for change in (lambda: save(stale, 2, state(2), {}), stale.newest_valid, stale.sweep):
        with pytest.raises(FencedError, match="Job 7 owns it now") as e:
            change()
        assert e.value.exit_code == 8
    after = [path for path in sorted(store.folder.rglob("*")) if ".tmp-step-000000002" not in str(path)]
    assert after == before


def test_going_back_before_a_step_sets_aside_what_came_after(store, capsys):
    for step in (1, 2, 3):
        save(store, step, state(step), {})
    assert store.newest_valid(before=1) is None
    assert store.newest_valid(before=3).name == "step-000000002"
    assert store.newest_valid().name == "step-000000002"
    assert "step-000000003 comes after step 2, to which the run goes back; it is now" in capsys.readouterr().out


def test_every_nth_stays(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, Keep(2, every=3))
    for step in range(1, 9):
        save(store, step, state(step), {})
    assert sorted(path.name[-1] for path in store.folder.glob("step-*")) == ["3", "6", "7", "8"]

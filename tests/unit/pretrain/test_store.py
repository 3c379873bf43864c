"""Checkpoints: whole or not there, found only when every byte is what was written."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.store import CheckpointStore, read_run
from pretrain.errors import CheckpointError
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
    return CheckpointStore(tmp_path / "checkpoints", ALONE, keep=2)


def values(store, checkpoint):
    fragments = state(seed=99)
    store.load(checkpoint, fragments)
    return fragments[0].tensors["master"]


def test_what_was_saved_is_loaded(store):
    assert store.save(5, state(), {"note": "x"}) is None
    checkpoint = store.newest_valid()
    assert checkpoint.name == "step-000000005"
    assert read_run(checkpoint) == {"note": "x", "step": 5}
    assert torch.equal(values(store, checkpoint), state()[0].tensors["master"])


def test_the_file_is_safetensors_as_the_library_reads_it(store):
    store.save(5, state(), {})
    tensors = load_file(store.newest_valid() / "rank-00000.safetensors")
    assert torch.equal(tensors["exp_avg/layer.weight/0,0"].flatten(), state()[0].tensors["exp_avg"])


def test_only_the_newest_stay(store):
    for step in (1, 2, 3, 4):
        store.save(step, state(step), {})
    assert sorted(path.name for path in store.folder.glob("step-*")) == ["step-000000003", "step-000000004"]


def test_any_flipped_byte_is_found_and_the_one_before_is_taken(store):
    """One byte in each 256 of every file, COMMIT and MANIFEST included."""
    store.save(1, state(1), {})
    store.save(2, state(2), {})
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


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "index.json", "run.json", "MANIFEST.json", "COMMIT"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_missing_or_cut_file_is_found(store, file, damage, capsys):
    store.save(1, state(1), {})
    store.save(2, state(2), {})
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
    store.save(1, state(), {})
    (store.folder / "step-000000001" / "COMMIT").unlink()
    for _ in range(2):  # also the second time, when all that is left is the quarantine
        with pytest.raises(
            CheckpointError, match=r"No checkpoint in .* is valid: the reasons are in .*quarantine"
        ) as e:
            store.newest_valid()
        assert e.value.exit_code == 3


def test_a_save_that_cannot_be_written_costs_that_save_alone(store):
    store.save(1, state(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        problem = store.save(2, state(2), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in problem
    assert [path.name for path in store.folder.iterdir() if path.is_dir()] == ["step-000000001"]
    assert torch.equal(values(store, store.newest_valid()), state(1)[0].tensors["master"])
    assert store.save(3, state(3), {}) is None


def test_too_little_space_is_seen_before_a_byte_is_written(store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    problem = store.save(1, state(), {})
    assert "GiB free, and a checkpoint takes" in problem
    assert "make space, or lower checkpoint.keep" in problem
    assert list(store.folder.iterdir()) == []


def test_what_an_interrupted_save_left_is_swept_and_never_loaded(store):
    store.save(1, state(1), {})
    shutil.copytree(store.folder / "step-000000001", store.folder / ".tmp-step-000000002-abc")
    assert store.newest_valid().name == "step-000000001"
    store.sweep()
    assert not list(store.folder.glob(".tmp-*"))


def test_a_checkpoint_of_another_model_names_the_parameter_and_both_shapes(store):
    store.save(1, state(), {})
    checkpoint = store.newest_valid()
    with pytest.raises(CheckpointError, match=r"layer.weight has shape \(40, 30\) in it, and shape \(40, 31\) here"):
        read_fragments(checkpoint, state(shape=(40, 31)))
    other = [Fragment("layer.bias", whole(torch.empty(3)), 0, {"master": torch.zeros(3)})]
    with pytest.raises(CheckpointError, match=r"layer.bias is not in it, and shape \(3,\) here. Restore the model"):
        read_fragments(checkpoint, other)


def test_nothing_in_a_checkpoint_is_pickled(store):
    store.save(1, state(), {})
    kinds = {path.suffix for path in store.newest_valid().iterdir()}
    assert kinds == {".safetensors", ".json", ""}
    json.loads((store.newest_valid() / "index.json").read_text())

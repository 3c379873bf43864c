"""A checkpoint that is not what was written is set aside with the reason, and the newest whole one is taken."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from faults.harness import assert_intact, resumed_at
from faults.injector import Fault
from pretrain.checkpoint.store import CheckpointStore
from pretrain.errors import CheckpointError
from pretrain.parallel.mesh import ALONE

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well

KEPT = "checkpoint.keep=20"
FLIPS = 1000
LARGE = "node-00000.safetensors"


def flip(path: Path, place: int) -> None:
    """Changes one bit of one byte where it lies."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << place % 8]))


def edit_manifest(checkpoint: Path, seal: bool) -> None:
    """Says another hash of a file; sealed, as someone would who knows how."""
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest[LARGE][0][1] = "0" * 64
    path.write_text(json.dumps(manifest))
    if seal:
        (checkpoint / "COMMIT").write_text(hashlib.sha256(path.read_bytes()).hexdigest())


# What is done to a checkpoint, and what is said of it. The newest comes first.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of the weights": (lambda folder: flip(folder / LARGE, 100_000), f"{LARGE} has other content"),
    "a flipped bit of the header": (lambda folder: flip(folder / LARGE, 20), f"{LARGE} has other content"),
    "a flipped bit of run.json": (lambda folder: flip(folder / "run.json", 50), "run.json has other content"),
    "weights cut short": (lambda folder: os.truncate(folder / LARGE, 100_000), f"{LARGE} has 100000 bytes instead of"),
    "weights that are gone": (lambda folder: (folder / LARGE).unlink(), f"No such file or directory: {{}}/{LARGE}"),
    "an index that is gone": (lambda folder: (folder / "index.json").unlink(), "No such file or directory"),
    "an edited manifest": (lambda folder: edit_manifest(folder, seal=False), "COMMIT is not the sha256 of MANIFEST"),
    "an edited manifest that is sealed again": (
        lambda folder: edit_manifest(folder, seal=True),
        f"{LARGE} has other content",
    ),
    "no seal": (lambda folder: (folder / "COMMIT").unlink(), "No such file or directory: {}/COMMIT"),
}


@pytest.fixture(scope="module")
def run(make_run):
    """A run that was told to stop and has more checkpoints than there are damages."""
    run = make_run()
    ended = run.live(KEPT, faults=[Fault(0, "forward", "SIGTERM launcher", step=2 * len(DAMAGES) + 3)])
    assert ended.code == 85, ended.err
    return run


def checkpoints(run) -> list[Path]:
    return sorted(run.checkpoints.glob("step-*"), reverse=True)


def test_a_thousand_flipped_bits_at_random_places_are_found_before_anything_is_used(run, tmp_path):
    original = checkpoints(run)[0]
    copy = tmp_path / original.name
    shutil.copytree(original, copy)
    store, step, rng = CheckpointStore(tmp_path, ALONE), int(original.name.removeprefix("step-")), Random(1)
    assert store.newest_valid(quarantine=False, step=step) == copy
    files = sorted(copy.iterdir())
    sizes = [file.stat().st_size for file in files]
    # Half of them anywhere, half in the small files.
    chosen = rng.choices(files, weights=sizes, k=FLIPS // 2) + rng.choices(files, k=FLIPS // 2)
    for file in chosen:
        place = rng.randrange(file.stat().st_size)
        flip(file, place)
        with pytest.raises(CheckpointError, match="No checkpoint"):
            store.newest_valid(quarantine=False, step=step)
        flip(file, place)
    assert store.newest_valid(quarantine=False, step=step) == copy


def test_the_newest_whole_one_is_taken_past_every_damage_and_the_run_is_the_undisturbed_one(run, undisturbed):
    damaged = checkpoints(run)
    sound = damaged[len(DAMAGES)]
    for checkpoint, (damage, _) in zip(damaged, DAMAGES.values(), strict=False):
        damage(checkpoint)
    (run.checkpoints / "LATEST").write_text("")
    stale = run.checkpoints / ".tmp-step-000000099-0123abcd"
    stale.mkdir()
    (stale / LARGE).write_bytes(b"half of it")
    shutil.copytree(sound, run.checkpoints / "step-before-the-change")
    (run.checkpoints / "notes.txt").write_text("mine")
    (sound / "notes.txt").write_text("mine")
    ended = run.live(KEPT)
    assert ended.code == 0, ended.err
    assert resumed_at(ended) == int(sound.name.removeprefix("step-"))
    for checkpoint, (name, (_, said)) in zip(damaged, DAMAGES.items(), strict=False):
        words = f"The checkpoint {checkpoint.name} is not whole ({said.format(checkpoint)}"
        assert words in ended.out, name
        (reason,) = (run.checkpoints / "quarantine").glob(f"{checkpoint.name}-*.reason.txt")
        assert said.format(checkpoint) in reason.read_text()
        assert reason.with_name(reason.name.removesuffix(".reason.txt")).is_dir()  # it is moved, and not lost
    assert "Left alone in" in ended.out
    assert "notes.txt, step-before-the-change." in ended.out
    assert run.leftovers() == []
    assert (run.checkpoints / "LATEST").read_text() == checkpoints(run)[1].name
    assert run.steps() == undisturbed
    shutil.rmtree(run.checkpoints / "step-before-the-change")
    assert_intact(run, undisturbed)


def test_where_none_is_whole_the_run_ends_with_a_sentence_and_nothing_is_lost(run):
    whole = checkpoints(run)
    before = {*run.checkpoints.glob("quarantine/*.reason.txt")}
    for checkpoint in whole:
        flip(checkpoint / "run.json", 10)
    ended = run.live()
    assert ended.code == 3
    assert f"No checkpoint in {run.checkpoints} is valid: the reasons are in" in ended.err
    assert "Traceback" not in ended.err
    reasons = {*run.checkpoints.glob("quarantine/*.reason.txt")} - before
    assert {reason.name[: len(whole[0].name)] for reason in reasons} == {checkpoint.name for checkpoint in whole}
    again = run.live()  # never a silent fresh start
    assert again.code == 3

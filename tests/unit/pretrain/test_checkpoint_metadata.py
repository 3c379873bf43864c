"""What a checkpoint says of itself is checked before anything of it is used, whatever its hashes say."""

import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch

from pretrain.checkpoint.fragments import read_fragments
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.verify import verify
from pretrain.errors import CheckpointError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import Part, whole

DATA, TABLE, INTERVALS, RUN = "node-00000.safetensors", "index.json", "intervals.bin", "run.json"


def state(seed=0):
    """A parameter cut in two, one that is whole, and a frozen one, which has no moments."""
    generator = torch.Generator().manual_seed(seed)

    def fragment(name, part, kinds=("master", "exp_avg", "exp_avg_sq")):
        numel = torch.Size(part.size).numel()
        return Fragment(name, part, 0, {kind: torch.randn(numel, generator=generator) for kind in kinds})

    halves = [Part((4, 6), (0, start), (4, 3), is_cut=True) for start in (0, 3)]
    return [
        fragment("patches.mean", whole(torch.empty(3)), kinds=("master",)),
        *(fragment("mlp.weight", half) for half in halves),
        fragment("mlp.bias", whole(torch.empty(5))),
    ]


def assert_same(these, those):
    for one, other in zip(these, those, strict=True):
        assert {kind: t.tolist() for kind, t in one.tensors.items()} == {
            k: t.tolist() for k, t in other.tensors.items()
        }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    store = CheckpointStore(folder, ALONE)
    for step in (1, 2):
        store.save(step, state(step), {"note": "x"})
        store.settle(wait=True)
    return folder


@pytest.fixture
def store(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints", ALONE)


def reseal(checkpoint, edit=lambda manifest: manifest):
    """Writes a manifest with the hashes of what is there now, and edits that too."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    for name in manifest:
        if (path := checkpoint / name).exists():
            manifest[name] = [[path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]]
    edited = edit(manifest)
    text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
    (checkpoint / "MANIFEST.json").write_bytes(text)
    (checkpoint / "COMMIT").write_text(hashlib.sha256(text).hexdigest())


def edit_table(**changes):
    def edit(checkpoint):
        table = json.loads((checkpoint / TABLE).read_text())
        for path, value in changes.items():
            *keys, last = [int(key) if key.isdigit() else key for key in path.split("__")]
            target = table
            for key in keys:
                target = target[key]
            target[last] = value
        (checkpoint / TABLE).write_text(json.dumps(table))

    return edit


def edit_intervals(change):
    def edit(checkpoint):
        rows = np.fromfile(checkpoint / INTERVALS, "<i8").reshape(-1, 2)
        change(rows).astype("<i8").tofile(checkpoint / INTERVALS)

    return edit


def row(number, *values):
    def change(rows):
        rows[number] = values
        return rows

    return change


def content(name, text):
    return lambda checkpoint: (checkpoint / name).write_bytes(text)


# The line: mlp.weight's halves [0, 12) and [12, 24), mlp.bias [24, 29), patches.mean [29, 32).
EDITS = {
    "index is no JSON": (content(TABLE, b"\x00"), "index.json: Invalid JSON"),
    "index is a list": (content(TABLE, b"[]"), "index.json: Input should be an object"),
    "index is nested without end": (content(TABLE, b"[" * 10**6), "index.json: Invalid JSON: recursion limit"),
    "index lacks a part": (content(TABLE, b'{"parameters": []}'), "index.json: streams: Field required"),
    "another shape": (edit_table(parameters__0__shape=[4, 5]), "parts of mlp.weight do not make it up"),
    "a dim too few": (edit_table(parameters__0__shape=[24]), r"cannot have shape \[24\] and be cut along dim 1"),
    "no shape": (edit_table(parameters__0__shape=[]), "parameters.0.shape: List should have at least 1 item"),
    "a negative dim": (edit_table(parameters__0__dim=-1), "parameters.0.dim: Input should be greater"),
    "a negative size": (edit_table(parameters__0__shape=[-4, 6]), "parameters.0.shape.0: Input should be greater"),
    "a huge size": (edit_table(parameters__0__shape=[10**30, 6]), "parameters.0.shape.0: Input should be less"),
    "sizes that multiply to a huge one": (
        edit_table(parameters__0__shape=[2**50, 2**50], parameters__0__cuts=[0, 2**50]),
        "mlp.weight cannot have shape",
    ),
    "a size that is a string": (edit_table(parameters__0__shape=["4", 6]), "Input should be a valid integer"),
    "a size that is true": (edit_table(parameters__2__shape=[True]), "Input should be a valid integer"),
    "a name that is a number": (edit_table(parameters__0__name=7), "parameters.0.name: Input should be a valid string"),
    "a parameter twice": (edit_table(parameters__1__name="mlp.weight"), "a parameter is in it twice"),
    "parts that overlap": (edit_table(parameters__0__cuts=[0, 4, 3, 6]), "parts of mlp.weight do not make it up"),
    "a part is missing": (edit_table(parameters__0__cuts=[3, 6]), "parts of mlp.weight do not make it up"),
    "other parts": (edit_table(parameters__0__cuts=[0, 2, 6]), "an interval reaches from one part into the next"),
    "the frozen one is trained": (edit_table(parameters__2__trained=True), "trained in one place and frozen in ano"),
    "a trained one is frozen": (edit_table(parameters__0__trained=False), "frozen parameters are not the last"),
    "a file outside of the folder": (edit_table(streams__0__file="../elsewhere"), "'../elsewhere', which is no file"),
    "an absolute file": (edit_table(streams__0__file="/etc/passwd"), "'/etc/passwd', which is no file"),
    "behind the end of the file": (edit_table(streams__0__position=10**6), "describes other contents of node-00000"),
    "streams that overlap": (edit_table(streams__1__position=300), "describes other contents of node-00000"),
    "a negative position": (edit_table(streams__0__position=-1), "streams.0.position: Input should be greater"),
    "more elements": (edit_table(streams__0__elements=30), "a stream holds other elements than its intervals"),
    "more intervals": (edit_table(streams__0__intervals=30), "4 intervals are there, and the streams hold 31"),
    "no intervals": (content(INTERVALS, b""), "0 intervals are there, and the streams hold 4"),
    "half a pair": (content(INTERVALS, b"12345678"), "intervals.bin is not a list of pairs of numbers"),
    "an interval twice": (edit_intervals(row(1, 0, 12)), "elements are missing, or stored twice"),
    "a gap": (edit_intervals(row(1, 13, 11)), "elements are missing, or stored twice"),
    "a negative start": (edit_intervals(row(0, -1, 12)), "an interval lies outside of all parameters"),
    "a start behind the end": (edit_intervals(row(0, 2**62, 12)), "an interval lies outside of all parameters"),
    "a huge length": (edit_intervals(row(0, 0, 2**62)), "an interval lies outside of all parameters"),
    "an empty interval": (edit_intervals(row(0, 0, 0)), "an interval lies outside of all parameters"),
    "run is a list": (content(RUN, b"[]"), "run.json does not say of which step it is"),
    "run is no JSON": (content(RUN, b"{"), "run.json is not JSON"),
    "run is nested without end": (content(RUN, b"[" * 10**5), "run.json is not JSON"),
    "run has a number without end": (content(RUN, b'{"step": ' + b"9" * 10**4 + b"}"), "run.json is not JSON"),
    "run has no step": (content(RUN, b"{}"), "run.json does not say of which step it is"),
    "run has a step that is text": (content(RUN, b'{"step": "2"}'), "run.json does not say of which step it is"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_checkpoint_with_consistent_hashes_is_not_used(store, name):
    edit, reason = EDITS[name]
    checkpoint = store.folder / "step-000000002"
    edit(checkpoint)
    reseal(checkpoint)
    assert store.newest_valid().name == "step-000000001"
    (said,) = store.folder.glob("quarantine/*.reason.txt")
    with pytest.raises(AssertionError, match=f"^is not whole .*{reason}"):
        raise AssertionError(said.read_text().rstrip("\n"))
    assert said.read_text().count("\n") == 1


MANIFESTS = {
    "no JSON": (lambda manifest: b"nonsense", "MANIFEST.json: Invalid JSON"),
    "a list": (lambda manifest: [], "MANIFEST.json: Input should be an object"),
    "a number": (lambda manifest: 7, "MANIFEST.json: Input should be an object"),
    "nothing": (lambda manifest: {}, "MANIFEST.json does not list index.json"),
    "no run.json": (lambda manifest: {k: v for k, v in manifest.items() if k != RUN}, "does not list run.json"),
    "no weights": (lambda manifest: {k: v for k, v in manifest.items() if k != DATA}, f"{DATA}', which is no file"),
    "a file of another folder": (lambda manifest: manifest | {"../x": []}, "String should match pattern"),
    "an absolute file": (lambda manifest: manifest | {"/etc/passwd": []}, "String should match pattern"),
    "a name with a line end": (lambda manifest: manifest | {"x\n": []}, "String should match pattern"),
    "a hidden file": (lambda manifest: manifest | {".x": []}, "String should match pattern"),
    "a file that is not there": (lambda manifest: manifest | {"x": [[1, "0" * 64]]}, "No such file"),
    "a negative size": (lambda manifest: manifest | {DATA: [[-1, "0" * 64]]}, "Input should be greater than"),
    "a huge size": (lambda manifest: manifest | {DATA: [[10**300, "0" * 64]]}, "Input should be less than"),
    "a size that is text": (lambda manifest: manifest | {DATA: [["1", "0" * 64]]}, "should be a valid integer"),
    "a hash that is none": (lambda manifest: manifest | {DATA: [[1, "x"]]}, "String should match pattern"),
    "a piece that is none": (lambda manifest: manifest | {DATA: [7]}, "should be a valid"),
    "no pieces": (lambda manifest: manifest | {DATA: None}, "should be a valid array"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_edited_manifest_with_a_consistent_commit_is_not_used(store, name):
    edit, reason = MANIFESTS[name]
    reseal(store.folder / "step-000000002", edit)
    assert store.newest_valid().name == "step-000000001"
    (said,) = store.folder.glob("quarantine/*.reason.txt")
    assert said.read_text().startswith("is not whole")
    assert reason in said.read_text()


def test_a_file_that_belongs_to_nobody_is_left_alone(store):
    (store.folder / "step-000000002" / "notes.txt").write_text("mine")
    assert store.newest_valid().name == "step-000000002"


def test_each_of_a_thousand_flipped_bytes_is_found(store):
    """At places drawn evenly from all bytes of all files, and some more of each file, so that none is left out."""
    generator, checkpoint = random.Random(0), store.folder / "step-000000002"
    sound = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}
    assert sorted(sound) == sorted([DATA, TABLE, INTERVALS, RUN, "MANIFEST.json", "COMMIT"])
    places = [(name, place) for name, content in sound.items() for place in range(len(content))]
    places = generator.sample(places, 900) + [
        (name, generator.randrange(len(content))) for name, content in sound.items() for _ in range(20)
    ]
    for name, place in places:
        flipped = bytearray(sound[name])
        flipped[place] ^= 1 << generator.randrange(8)
        (checkpoint / name).write_bytes(flipped)
        assert verify(checkpoint, ALONE), f"{name}, byte {place}"
        (checkpoint / name).write_bytes(sound[name])
    assert verify(checkpoint, ALONE) is None


def test_frozen_parameters_and_buffers_are_saved_without_moments(store):
    loaded = state(seed=99)
    store.load(store.newest_valid(), loaded)
    assert_same(loaded, state(2))
    size = (store.folder / "step-000000002" / DATA).stat().st_size
    header = int.from_bytes((store.folder / "step-000000002" / DATA).read_bytes()[:8], "little")
    assert size == 8 + header + 4 * (3 * 29 + 3)


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        (("patches.mean", (3,)), "patches.mean is frozen in it, without the optimizer's moments"),
        (("mlp.bias", (6,)), r"mlp.bias has shape \(5,\) in it, and shape \(6,\) here"),
        (("mlp.other", (3,)), "mlp.other is not in it"),
    ],
)
def test_nothing_is_loaded_of_a_checkpoint_that_lacks_something(store, fragment, said):
    name, shape = fragment
    tensors = {kind: torch.zeros(shape) for kind in ("master", "exp_avg", "exp_avg_sq")}
    wanted = [*state(seed=99), Fragment(name, whole(torch.empty(shape)), 0, tensors)]
    with pytest.raises(CheckpointError, match=said):
        read_fragments(store.newest_valid(), wanted)
    assert_same(wanted[:-1], state(seed=99))

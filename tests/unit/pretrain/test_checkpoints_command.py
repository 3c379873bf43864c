"""`python -m pretrain checkpoints`: what it lists, and that it keeps away from what a live job owns."""

import json
import shutil

import pytest
import torch

from pretrain import lease as lease_module
from pretrain.__main__ import main
from pretrain.checkpoint.retention import Keep, add_score, is_pinned
from pretrain.checkpoint.store import CheckpointStore
from pretrain.lease import take
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole

LAYOUT = {"dp": 2, "tp": 1, "pp": 1, "zero_stage": 3}


def save(store: CheckpointStore, step: int, values: dict[str, torch.Tensor], rate: float = 1e-3) -> None:
    fragments = []
    for name, value in values.items():
        tensors = {kind: value.flatten().clone() for kind in ("master", "exp_avg", "exp_avg_sq")}
        fragments.append(Fragment(name, whole(value), 0, tensors))
    config = {
        "checkpoint": {"keep": 2, "keep_every": None, "best": "accuracy/matching"},
        "optimizer": {"learning_rate": rate},
    }
    store.save(step, fragments, {"layout": LAYOUT, "config": config})
    store.settle(wait=True)


@pytest.fixture
def run(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, Keep(100))
    for step in (10, 20, 30, 40):
        save(store, step, {"layer.weight": torch.full((4, 3), float(step)), "layer.bias": torch.zeros(4)})
    return tmp_path


@pytest.fixture
def command(run, monkeypatch, capsys):
    """Runs the command on the run; returns exit code, output and error."""

    def call(*words: object, folder=run):
        monkeypatch.setattr("sys.argv", ["pretrain", "checkpoints", str(folder), *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.0)
    monkeypatch.setattr(lease_module, "RENEW_S", 0.1)
    return call


def names(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_the_list_says_step_size_layout_time_and_validity(command):
    code, out, _ = command()
    assert code == 0
    for step in (10, 20, 30, 40):
        (line,) = [line for line in out.splitlines() if line.split(" ")[1:2] and f" {step} " in line]
        for word in ("0.0 MiB", "dp 2 x tp 1 x pp 1, ZeRO 3", "20", "yes"):
            assert word in line


@pytest.mark.parametrize("words", [(), ("--verify",)])
def test_a_checkpoint_that_is_cut_is_named_with_the_reason_and_ends_with_3(run, command, words):
    path = run / "checkpoints" / "step-000000020" / "node-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, err = command(*words)
    assert code == 3
    assert "bytes instead of" in out
    assert err == "Not valid: step-000000020. A start passes over them, and moves them to quarantine.\n"


def test_a_flipped_byte_is_found_by_verify_alone(run, command):
    path = run / "checkpoints" / "step-000000020" / "node-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert command()[0] == 0
    code, out, _ = command("--verify")
    assert code == 3
    assert "other content than was written" in out


def test_quarantine_leftovers_and_copies_are_told(run, command):
    folder = run / "checkpoints"
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "step-000000005-ab.reason.txt").write_text("is not whole (COMMIT)\n")
    (folder / ".tmp-step-000000050-abc").mkdir()
    (folder / "step-best").mkdir()
    _, out, _ = command()
    assert "In quarantine: step-000000005-ab is not whole (COMMIT)." in out
    assert "No checkpoints of this run: step-best." in out
    assert "left over from that: .tmp-step-000000050-abc." in out


def test_pruning_keeps_the_newest_and_the_pinned(run, command):
    assert "step-000000010 stays until it is unpinned." in command("--pin", 10)[1]
    assert "pinned" in command()[1]
    code, out, _ = command("--prune")
    assert (code, out) == (0, "Removed step-000000020; 3 stay.\n")
    assert names(run) == ["step-000000010", "step-000000030", "step-000000040"]
    assert "step-000000010 is no longer pinned." in command("--unpin", 10)[1]
    assert not is_pinned(run / "checkpoints" / "step-000000010")
    command("--prune", "--keep", 1)
    assert names(run) == ["step-000000040"]
    assert not list((run / "checkpoints").glob(".tmp*"))


def test_the_best_is_marked_and_not_pruned(run, command):
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.5)):
        add_score(run / "checkpoints", "accuracy/matching", step, score)
    (line,) = [line for line in command()[1].splitlines() if " best " in line]
    assert " 20 " in line
    command("--prune", "--keep", 1)
    assert names(run) == ["step-000000020", "step-000000040"]


def test_pruning_is_refused_while_a_job_owns_the_folder_and_looking_is_not(run, command):
    owner = take(run)
    code, _, err = command("--prune")
    assert code == 4
    assert "is in use by process" in err
    assert len(names(run)) == 4
    assert command()[0] == command("--pin", 10)[0] == command("--diff", 10, 20)[0] == 0
    owner.release()
    assert command("--prune")[0] == 0
    assert take(run).number == 3


def test_nothing_is_pruned_where_the_newest_is_not_valid(run, command):
    (run / "checkpoints" / "step-000000040" / "COMMIT").write_text("x")
    code, _, err = command("--prune")
    assert code == 3
    assert "Nothing is removed, because the newest checkpoint, " in err
    assert len(names(run)) == 4


def test_two_checkpoints_are_compared_by_weights_and_config(run, command):
    other = CheckpointStore(run / "other" / "checkpoints", ALONE)
    weights = {"layer.weight": torch.full((4, 3), 10.5), "layer.bias": torch.zeros(5), "head.bias": torch.ones(2)}
    save(other, 7, weights, rate=5e-4)
    b = other.folder / "step-000000007"
    code, out, _ = command("--diff", 10, b)
    assert code == 0
    assert out.splitlines() == [
        f"Only in {b}: head.bias.",
        "layer.bias: 4 -> 5",
        "1 of 1 parameters of the same shape differ:",
        "  layer.weight: by 5.000e-01 at most",
        "Config: optimizer.learning_rate: 0.001 -> 0.0005.",
    ]
    assert command("--diff", 10, 10)[1] == "0 of 2 parameters of the same shape differ.\n"


def test_weights_that_are_not_numbers_differ(run, command):
    save(CheckpointStore(run / "checkpoints", ALONE, Keep(100)), 50, {"layer.weight": torch.full((4, 3), torch.nan)})
    assert "layer.weight: by nan at most" in command("--diff", 40, 50)[1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--pin", 11), 3, "No checkpoint of step 11 in "),
        (("--diff", 10, 11), 3, "those there are of 10, 20, 30, 40."),
        (("--diff", 10, "nowhere"), 3, "The checkpoint nowhere is not valid: No such file"),
        (("--keep", 2), 4, "--keep 2 is for --prune, and 1 or more"),
        (("--prune", "--keep", 0), 4, "--keep 0 is for --prune, and 1 or more"),
        (("training.steps=3",), 2, "unrecognized arguments: training.steps=3"),
        (("--prune", "--verify"), 2, "not allowed with argument"),
    ],
)
def test_what_cannot_be_done_is_said(command, words, code, message):
    ended, _, err = command(*words)
    assert ended == code
    assert message in err


def test_a_folder_without_checkpoints_is_one_sentence(tmp_path, command):
    shutil.rmtree(tmp_path / "checkpoints")
    code, _, err = command()
    assert code == 3
    assert err.startswith("No checkpoint in ")
    assert json.dumps(err).count("\\n") == 1

"""A run's folder has one owner: a second job is refused, a dead or silent owner is followed, and can do no harm."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from data_pipelines.errors import DataError
from pretrain import lease as lease_module
from pretrain.checkpoint.retention import Keep
from pretrain.checkpoint.store import CheckpointStore, Failed, Saved
from pretrain.checkpoint.verify import read_run
from pretrain.errors import FencedError, StorageError
from pretrain.lease import Lease, take
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE
from pretrain.parallel.tensor import whole

ELSEWHERE = {"machine": "another boot", "host": "node7", "pid": 4, "started": "2026-01-01", "began": 1}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_S", 0.05)
    monkeypatch.setattr(lease_module, "SILENCE_S", 0.8)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 0.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def state() -> list[Fragment]:
    weights = {kind: torch.zeros(4) for kind in ("master", "exp_avg", "exp_avg_sq")}
    return [Fragment("layer.weight", whole(weights["master"]), 0, weights)]


def silence(lease: Lease) -> None:
    """As if its process were frozen."""
    lease._over.set()
    lease._renewer.join()


def write_owner(folder, number: int, **owner: object) -> None:
    (folder / ".lease").mkdir(exist_ok=True)
    (folder / ".lease" / f"{number:09d}.json").write_text(json.dumps(owner))


def test_a_second_job_is_refused_with_host_pid_and_time_of_the_first_until_that_ends(tmp_path):
    first = take(tmp_path / "a" / "run")
    with pytest.raises(StorageError) as error:
        take(tmp_path / "a" / "run")
    who = f"in use by process {os.getpid()} on {socket.gethostname()} since 20"
    assert who in str(error.value)
    assert str(error.value).endswith("stop that job first, or choose another output folder.")
    first.release()
    second = take(tmp_path / "a" / "run")
    assert second.number == 2
    second.release()


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '"x"', '{"pid": 1}', "\x00\xff"])
def test_an_owner_that_cannot_be_read_is_respected_while_it_renews(tmp_path, content):
    first = take(tmp_path)
    (tmp_path / ".lease" / "000000001.json").write_text(content)
    first._text = content  # it goes on renewing
    with pytest.raises(StorageError, match="in use by another job: stop"):
        take(tmp_path)
    silence(first)


@pytest.mark.parametrize(
    ("owner", "here", "at_once"),
    [
        pytest.param(ELSEWHERE | {"job": None, "start": [0, 0]}, {}, False, id="a job of another machine"),
        pytest.param(ELSEWHERE | {"job": None, "start": [0, 0], "ended": "2026"}, {}, True, id="one that has ended"),
        pytest.param(
            ELSEWHERE | {"job": "Slurm 7", "start": [0, 3]},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            True,
            id="this Slurm job before it was requeued",
        ),
        pytest.param(
            ELSEWHERE | {"job": "Slurm 7", "start": [1, 0]},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1", "TORCHELASTIC_RESTART_COUNT": "1"},
            True,
            id="this Slurm job before torchrun restarted it",
        ),
        pytest.param(
            ELSEWHERE | {"job": "Slurm 7", "start": [1, 0]},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            False,
            id="another step of this Slurm job",
        ),
        pytest.param(
            ELSEWHERE | {"job": "Slurm 7", "start": [2, 0]},
            {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"},
            False,
            id="a later start of this Slurm job",
        ),
        pytest.param(
            ELSEWHERE | {"job": "Slurm 7", "start": [0, 0]},
            {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"},
            False,
            id="another Slurm job",
        ),
        pytest.param({"pid": 1}, {}, False, id="one that says little of itself"),
    ],
)
def test_an_owner_that_is_known_to_be_gone_is_followed_at_once_and_any_other_after_silence(
    tmp_path, monkeypatch, owner, here, at_once
):
    write_owner(tmp_path, 41, **owner)
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    begin = time.monotonic()
    lease = take(tmp_path)
    assert lease.number == 42
    assert (time.monotonic() - begin < lease_module.SILENCE_S) == at_once
    assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["000000042.json"]
    lease.release()


@pytest.mark.parametrize("reused", [False, True])
def test_an_owner_whose_process_is_gone_from_this_machine_is_followed_at_once(tmp_path, reused):
    """Also where its id went to another process."""
    code = f"from pathlib import Path; from pretrain.lease import take; take(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    if reused:
        path = tmp_path / ".lease" / "000000001.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": os.getpid()}))
    begin = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begin < lease_module.SILENCE_S / 2


def test_silence_is_told_before_the_folder_is_taken_over(tmp_path, capsys):
    write_owner(tmp_path, 1, **ELSEWHERE)
    take(tmp_path).release()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{tmp_path} is in use by process 4 on node7 since 2026-01-01, of which there is no sign: waiting 1 s for one.",
        f"Taking over {tmp_path}, in use by process 4 on node7 since 2026-01-01: not a sign of that job for 1 s.",
    ]


def test_clocks_that_differ_between_nodes_change_nothing(tmp_path):
    """The file's time is only compared with itself."""
    first = take(tmp_path)
    os.utime(tmp_path / ".lease" / "000000001.json", (1e9, 1e9))
    with pytest.raises(StorageError):
        take(tmp_path)
    first.release()


def test_of_many_jobs_that_start_at_once_one_gets_the_folder(tmp_path):
    won, refused = list[Lease](), list[StorageError]()

    def start() -> None:
        try:
            won.append(take(tmp_path))
        except StorageError as error:
            refused.append(error)

    write_owner(tmp_path, 1, **ELSEWHERE)
    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].release()


@pytest.fixture
def stale_and_new(tmp_path):
    stale = take(tmp_path)
    silence(stale)
    new = take(tmp_path)
    yield stale, new
    new.release()


def test_the_stale_owner_learns_of_the_new_one_and_ends_with_8(tmp_path, stale_and_new):
    stale, new = stale_and_new
    time.sleep(3 * lease_module.RENEW_S)
    with pytest.raises(FencedError, match="is now in use by process .*, which took it over from this one") as error:
        stale.check()
    assert error.value.exit_code == 8
    assert stale.lost() == str(error.value)
    stale.release()
    assert new.lost() is None
    assert "ended" not in json.loads((tmp_path / ".lease" / "000000002.json").read_text())


def test_a_store_of_the_stale_owner_commits_moves_and_deletes_nothing(tmp_path, stale_and_new):
    stale, new = stale_and_new
    keep = Keep(2)
    stores = [CheckpointStore(tmp_path / "checkpoints", ALONE, keep, lease.lost) for lease in (stale, new)]
    stores[0].save(3, state(), {"by": "stale"})
    for step in (1, 2):
        stores[1].save(step, state(), {"by": "new"})
        assert isinstance(stores[1].settle(wait=True), Saved)
    (stores[1].folder / "step-000000002" / "COMMIT").unlink()
    (stores[1].folder / ".tmp-step-000000003-abc").mkdir()
    before = [path for path in sorted(tmp_path.rglob("*")) if "-000000003-" not in str(path)]
    for action in (stores[0].sweep, stores[0].newest_valid, lambda: stores[0].settle(wait=True)):
        with pytest.raises(FencedError):
            action()
    assert [path for path in sorted(tmp_path.rglob("*")) if "-000000003-" not in str(path)] == before
    assert not (stores[0].folder / "step-000000003").exists()


def test_a_commit_that_froze_between_its_look_and_its_rename_finds_nothing_to_rename(tmp_path):
    new = CheckpointStore(tmp_path, ALONE)

    def taken_over_right_after_the_look() -> None:
        new.sweep()
        assert new.newest_valid() is None
        new.save(3, state(), {"by": "new"})
        assert isinstance(new.settle(wait=True), Saved)

    stale = CheckpointStore(tmp_path, ALONE, still_owner=taken_over_right_after_the_look)
    stale.save(3, state(), {"by": "stale"})
    assert isinstance(stale.settle(wait=True), Failed)
    checkpoint = new.newest_valid()
    assert checkpoint is not None
    assert read_run(checkpoint)["by"] == "new"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [checkpoint.name]


def test_a_main_thread_without_a_sign_of_life_is_vouched_for_only_so_long(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "VOUCH_S", 0.3)
    stuck = take(tmp_path)
    with pytest.raises(StorageError):
        take(tmp_path)
    time.sleep(0.4)
    take(tmp_path).release()
    assert "took it over" in str(stuck.lost())


def test_a_lease_that_a_person_removed_ends_its_owner(tmp_path):
    lease = take(tmp_path)
    silence(lease)
    (tmp_path / ".lease" / "000000001.json").unlink()
    assert "in use by another job" in str(lease.lost())


def test_a_job_whose_folder_was_removed_and_made_anew_is_not_taken_for_the_owner(tmp_path):
    old = take(tmp_path / "run")
    silence(old)
    shutil.rmtree(tmp_path / "run")
    assert old.lost() is None  # nobody else is there: it may make its folder again
    code = f"from pathlib import Path; from pretrain.lease import take; take(Path({str(tmp_path / 'run')!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert (tmp_path / "run" / ".lease" / "000000001.json").exists()
    assert "took it over" in str(old.lost())


def test_a_look_is_repeated_only_when_the_last_one_is_old(tmp_path, monkeypatch):
    lease = take(tmp_path)
    silence(lease)
    lease.lost()
    monkeypatch.setattr(lease, "_renew", lambda: pytest.fail("looked"))
    lease.check()


@pytest.mark.parametrize("below", ["file", "/proc"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^Cannot write the run's folder .*run \(output\) \(.*\): .*\.$"):
        take(tmp_path / below / "run")

"""Copies of checkpoints on a real server of S3: whole or not there, and never at the run's expense."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.storage import objects
from http_server import Fault, ShardServer
from object_store import object_store
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.retention import Keep, add_score, pin
from pretrain.checkpoint.store import CheckpointStore, Saved
from pretrain.config import CheckpointConfig
from pretrain.errors import CheckpointError, StorageError
from pretrain.parallel.engine import Fragment
from pretrain.parallel.mesh import ALONE, Axis
from pretrain.parallel.tensor import whole
from pretrain.saving import Saving

URL = "s3://models/runs/a"
WEIGHTS = torch.arange(12.0)


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Any, ShardServer]]:
    with object_store() as pair:
        yield pair


@pytest.fixture(autouse=True)
def server(servers: tuple[Any, ShardServer], monkeypatch: pytest.MonkeyPatch) -> ShardServer:
    """What the store is sent goes through here, to a bucket without an object."""
    client, server = servers
    monkeypatch.setattr(objects, "_ATTEMPTS", 1)
    monkeypatch.setattr("pretrain.checkpoint.mirror._POLL_S", 0.05)
    client.create_bucket(Bucket="models")
    for name in names(client):
        client.delete_object(Bucket="models", Key=name)
    server.faults.clear()
    server.always, server.delay_s = Fault(), 0.0
    server.requests.clear()
    return server


@pytest.fixture
def client(servers: tuple[Any, ShardServer]) -> Any:
    return servers[0]


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", ALONE, Keep(2))


def names(client: Any) -> list[str]:
    return [found["Key"] for found in client.list_objects_v2(Bucket="models").get("Contents", [])]


def copied_steps(client: Any) -> list[int]:
    return sorted(int(name.split("/")[2][5:14]) for name in names(client) if name.endswith("/COMMIT"))


def fragments(value: float = 0.0) -> list[Fragment]:
    tensors = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), WEIGHTS + value)
    return [Fragment("layer.weight", whole(torch.empty(4, 3)), 0, tensors)]


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, fragments(step), {"note": "x"})
    assert isinstance(store.settle(wait=True), Saved)


def mirror_of(store: CheckpointStore, patience_s: float = 5.0, world: Axis = ALONE) -> Mirror:
    mirror = Mirror(URL, store, patience_s)
    mirror._world = world
    return mirror


def copy(mirror: Mirror, step: int) -> None:
    mirror.copy(step)
    mirror.finish()


def lose_the_disk(store: CheckpointStore) -> None:
    shutil.rmtree(store.folder)


def fetched(store: CheckpointStore) -> tuple[str, list[float]]:
    mirror_of(store).fetch(may_resume=True)
    checkpoint = store.newest_valid()
    assert checkpoint
    found = fragments(-1)
    store.load(checkpoint, found)
    return checkpoint.name, (found[0].tensors["master"] - WEIGHTS).tolist()


def test_a_lost_disk_gets_the_newest_checkpoint_back_and_nothing_else(store, capsys):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    assert fetched(store) == ("step-000000006", [6.0] * 12)
    assert [path.name for path in store.folder.iterdir()] == ["step-000000006"]
    assert f"Copied step 6 to {URL}." in capsys.readouterr().out


def test_commit_is_the_last_object_of_a_copy(store, server, client):
    save(store, 5)
    copy(mirror_of(store), 5)
    put = [request.path.rpartition("/")[2] for request in server.requests if request.method == "PUT"]
    assert len(put) == len(list((store.folder / "step-000000005").iterdir()))
    assert put[-1] == "COMMIT"


def test_a_checkpoint_on_the_disk_is_not_fetched_over(store, server):
    save(store, 5)
    copy(mirror_of(store), 5)
    lose_the_disk(store)
    save(store, 3)
    assert fetched(store)[0] == "step-000000003"


def test_each_rank_copies_its_share_and_commit_waits_for_all(store, client):
    save(store, 5)
    first, second = (mirror_of(store, world=Axis(rank, 2, None)) for rank in (0, 1))
    first.copy(5)
    first.finish(limit_s=0.5)
    assert copied_steps(client) == []
    assert 0 < len(names(client)) < 4
    copy(second, 5)
    first.finish()
    assert copied_steps(client) == [5]


def test_a_copy_without_commit_is_none_and_the_next_start_goes_on_with_it(store, server, client, capsys):
    save(store, 5)
    copy(mirror_of(store, patience_s=0.3, world=Axis(0, 2, None)), 5)  # the other rank was killed
    assert "Rank 0 could not copy step 5" in (said := capsys.readouterr().out)
    assert "no other rank has brought" in said
    there = len(names(client))
    server.requests.clear()
    copy(mirror_of(store), 5)
    assert copied_steps(client) == [5]
    put = [request for request in server.requests if request.method == "PUT"]
    assert len(put) == len(names(client)) - there
    lose_the_disk(store)
    client.delete_object(Bucket="models", Key=next(name for name in names(client) if name.endswith("COMMIT")))
    mirror_of(store).fetch(may_resume=True)
    assert store.newest_valid() is None


def test_copies_go_as_checkpoints_go_and_foreign_objects_stay(store, client):
    store.keep = Keep(2, every=4)
    foreign = ["notes.txt", "step-000000001/x", "step-000000001-0123456789ab/deep/er"]
    for name in foreign:
        client.put_object(Bucket="models", Key=f"runs/a/{name}", Body=b"x")
    client.put_object(Bucket="models", Key="runs/a/step-000000002-0123456789ab/rank-00000.safetensors", Body=b"left")
    for step in range(1, 8):
        save(store, step)
        copy(mirror_of(store), step)
    assert copied_steps(client) == [4, 6, 7]
    assert [name for name in foreign if f"runs/a/{name}" not in names(client)] == []
    assert "0123456789ab/rank" not in "".join(names(client))


def test_after_a_fetch_the_older_copies_are_still_kept(store, client):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    fetched(store)
    save(store, 7)
    copy(mirror_of(store), 7)
    assert copied_steps(client) == [6, 7]


def test_a_run_that_went_back_goes_on_from_where_it_was_last(store, client):
    save(store, 6)
    copy(mirror_of(store), 6)
    lose_the_disk(store)
    save(store, 3)
    time.sleep(1.1)  # a store tells seconds
    copy(mirror_of(store), 3)
    assert copied_steps(client) == [3, 6]  # nothing that may be needed goes
    lose_the_disk(store)
    assert fetched(store) == ("step-000000003", [3.0] * 12)


def test_pinned_and_best_copies_stay_and_are_known_after_the_disk_is_lost(store, client):
    store.keep = Keep(2, best="loss")
    for step in range(1, 8):
        save(store, step)
        if step == 1:
            pin(store.folder / "step-000000001")
        add_score(store.folder, "loss", step, abs(step - 3))
        copy(mirror_of(store), step)
    assert copied_steps(client) == [1, 3, 6, 7]
    lose_the_disk(store)
    fetched(store)
    for step in (8, 9):
        save(store, step)
        copy(mirror_of(store), step)
    assert copied_steps(client) == [1, 3, 7, 8, 9]  # 7 is the best of those on the disk


def test_a_step_that_is_saved_anew_has_one_copy(store, client):
    save(store, 5)
    copy(mirror_of(store), 5)
    lose_the_disk(store)
    store.save(5, fragments(50), {})
    store.settle(wait=True)
    copy(mirror_of(store), 5)
    lose_the_disk(store)
    assert copied_steps(client) == [5]
    assert fetched(store) == ("step-000000005", [50.0] * 12)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "COMMIT"])
def test_a_damaged_copy_is_named_and_the_one_before_is_taken(damage, store, client, capsys):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    name = next(n for n in names(client) if "000006-" in n and ("COMMIT" if damage == "COMMIT" else "node-") in n)
    content = bytearray(client.get_object(Bucket="models", Key=name)["Body"].read())
    content[-1] ^= 1
    if damage == "missing":
        client.delete_object(Bucket="models", Key=name)
    else:
        client.put_object(Bucket="models", Key=name, Body=bytes(content[: -1 if damage == "short" else None]))
    assert fetched(store) == ("step-000000005", [5.0] * 12)
    assert f"in {URL} is not whole (" in capsys.readouterr().out
    assert not list(store.folder.glob(".tmp-*"))


def test_a_copy_that_goes_while_it_is_fetched_is_named_and_the_one_before_is_taken(store, client, capsys):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    mirror = mirror_of(store)
    found = mirror._folders()
    mirror._folders = lambda: found
    client.delete_object(Bucket="models", Key=next(n for n in names(client) if "000006-" in n and "node-" in n))
    mirror.fetch(may_resume=True)
    assert [path.name for path in store.folder.iterdir()] == ["step-000000005"]
    assert re.search(
        rf"-\w+ in {URL} is not whole \(.*node-\S+ cannot be read \(the server ans", capsys.readouterr().out
    )


def test_copies_of_which_none_is_whole_are_no_fresh_start(store, client):
    save(store, 5)
    copy(mirror_of(store), 5)
    lose_the_disk(store)
    client.put_object(Bucket="models", Key=next(n for n in names(client) if "node-" in n), Body=b"x")
    with pytest.raises(CheckpointError, match=rf"has no checkpoint, and no copy in {URL} is whole: restore one"):
        mirror_of(store).fetch(may_resume=True)


def test_never_refuses_a_copy_and_fetches_nothing(store, client):
    save(store, 5)
    copy(mirror_of(store), 5)
    lose_the_disk(store)
    with pytest.raises(CheckpointError, match=rf"resume is never, and {URL} holds step-000000005-\w+: choose another"):
        mirror_of(store).fetch(may_resume=False)
    assert not store.folder.exists()


DENIED = b"<Error><Code>AccessDenied</Code><Message>No right to http://me:sesame@host/x?X-Amz-Signature=sesame</Message></Error>"
FAILING = {
    "busy": (Fault(status=503), r"cannot be \w+: \d+ attempts in \d+ s, the last one: the server answered 503"),
    "reset": (Fault(reset=True), r"cannot be \w+: \d+ attempts in \d+ s, the last one: .*[Cc]onnection"),
    "forbidden": (
        Fault(status=403, body=DENIED),
        r"cannot be \w+ \(the server answered 403 No right.*\): see that the",
    ),
    "busy and talkative": (Fault(status=503, body=DENIED), r"cannot be \w+: \d+ attempts in \d+ s, .* 503 No right"),
}


@pytest.mark.parametrize(("fault", "reason"), FAILING.values(), ids=FAILING)
def test_a_server_that_fails_costs_the_copy_and_not_the_run(fault, reason, store, server, client, capfd):
    mirror = mirror_of(store, patience_s=0.2)
    server.always = fault
    save(store, 5)
    copy(mirror, 5)
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"Rank 0 could not copy step 5 to {URL}: {URL} {reason}.* The checkpoint is safe\.\n", out), (
        out
    )
    assert (err, [word for word in ("nothing", "Signature", "sesame") if word in out]) == ("", [])
    assert store.newest_valid().name == "step-000000005"
    server.always = Fault()
    save(store, 6)
    copy(mirror, 6)
    assert copied_steps(client) == [6]


def test_a_server_that_is_not_there_is_told_at_the_start_unless_the_disk_has_a_checkpoint(
    store, server, monkeypatch, capsys
):
    server.always = Fault(status=503)
    mirror = mirror_of(store, patience_s=0.2)
    with pytest.raises(StorageError, match=rf"^checkpoint.mirror: {URL} cannot be listed: \d+ attempts in .* 503"):
        mirror.fetch(may_resume=True)
    save(store, 5)
    mirror.fetch(may_resume=True)
    assert "cannot be copied for now, which is tried again with the next one: s3://" in capsys.readouterr().out
    server.always = Fault()
    with pytest.raises(
        StorageError, match=r"s3://none/a cannot be listed \(the server answered 404 .* bucket does not"
    ):
        Mirror("s3://none/a", CheckpointStore(store.folder / "other", ALONE), 1).fetch(may_resume=True)


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(reset=True), Fault(status=500)], ids=str)
def test_a_passing_fault_changes_nothing(fault, store, server, client):
    save(store, 5)
    server.faults.extend([fault, Fault(), fault, fault])
    copy(mirror_of(store), 5)
    assert copied_steps(client) == [5]
    lose_the_disk(store)
    server.faults.extend([fault, Fault(), fault])
    assert fetched(store) == ("step-000000005", [5.0] * 12)


def test_a_large_file_goes_up_in_parts_of_which_one_is_sent_again(tmp_path, server, client, monkeypatch):
    monkeypatch.setattr(objects, "_ATTEMPTS", 3)
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    content = torch.arange(3 << 20, dtype=torch.int32).numpy().tobytes()
    (tmp_path / "large").write_bytes(content)
    server.faults.extend([Fault(), Fault(), Fault(status=503)])
    objects.ObjectFolder(URL, 5).upload("large", tmp_path / "large")
    assert client.get_object(Bucket="models", Key="runs/a/large")["Body"].read() == content
    assert len([request for request in server.requests if "partNumber=" in request.path]) == 4  # three, one twice


@pytest.mark.parametrize("already_saved", [True, False])
def test_a_run_that_was_told_to_stop_waits_a_while_for_its_copy(
    already_saved, store, server, client, monkeypatch, capsys
):
    journal: Any = SimpleNamespace(flush=lambda: None, checkpoint=lambda values: None, say=print)
    saving = Saving(CheckpointConfig(mirror=URL), store, journal, on_saved=lambda step, took_s: None)
    if already_saved:
        save(store, 5)
        saving.note_newest(5)
    saving.save(5, fragments(5), {}, must=True)
    assert copied_steps(client) == [5]
    monkeypatch.setattr("pretrain.saving._COPY_S", 0.3)
    server.delay_s = 0.4
    saving.save(6, fragments(6), {}, must=True)
    server.delay_s = 0.0
    assert copied_steps(client) == [5]
    assert f"The newest copy in {URL} is not complete; the next start goes on with it." in capsys.readouterr().out
    saving.finish()
    assert copied_steps(client) == [5, 6]


def test_a_job_that_lost_the_run_commits_and_removes_nothing(store, client):
    for step in (5, 6, 7):
        save(store, step)
    copy(mirror_of(store), 6)
    store.still_owner = lambda: "another job owns the run"
    copy(mirror_of(store), 7)
    assert copied_steps(client) == [6]


def test_a_checkpoint_that_went_before_its_turn_is_said_to(store, capsys):
    copy(mirror_of(store), 5)
    assert f"Step 5 was removed from {store.folder} before it was copied to {URL}." in capsys.readouterr().out


def test_a_disk_that_fails_ends_the_start_and_calls_no_copy_bad(store, server, client):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    store.folder.write_text("in the way")
    with pytest.raises(StorageError, match=r"^The copy step-000000006-\w+ cannot be brought to .*checkpoints: \[Errno"):
        mirror_of(store, patience_s=60).fetch(may_resume=True)
    with pytest.raises(OSError, match="No space left"):
        objects.ObjectFolder("s3://models", 60).download(names(client)[0], Path("/dev/full"))


def test_a_server_that_fails_in_a_fetch_is_no_reason_to_take_an_older_copy(store, server):
    for step in (5, 6):
        save(store, step)
        copy(mirror_of(store), step)
    lose_the_disk(store)
    mirror = mirror_of(store, patience_s=0.2)
    found = mirror._folders()
    mirror._folders = lambda: found
    server.always = Fault(status=503)
    with pytest.raises(
        StorageError, match=r"^The copy step-000000006-\w+ cannot be brought .*: s3://\S+ cannot be read"
    ):
        mirror.fetch(may_resume=True)

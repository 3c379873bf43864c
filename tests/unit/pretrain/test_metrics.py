"""Reported numbers mean what their names say."""

import json
import resource
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipelines.batch import BadSample
from distributed.tiny import tiny_config
from pretrain import metrics
from pretrain.errors import FencedError
from pretrain.metrics import Clock, Metrics, card


def test_the_data_wait_share_is_the_time_in_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock()
    with clock.waiting():
        now[0] += 1
    now[0] += 3
    assert clock.read() == (4, 0.25)


def values(step_s):
    return {
        "loss": 2.0,
        "loss/contrastive": 1.5,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "time/samples_per_s": 32 / step_s,
        "time/step_s": step_s,
        "batch_id": 7,
    }


def test_the_line_shows_the_time_left_at_the_recent_pace(tmp_path):
    m = Metrics(tiny_config(output=str(tmp_path), training__steps=1000), 0)
    for step, step_s in enumerate((30.0, 2.0, 2.0, 2.0), start=1):  # the first step compiles and connects
        m.step(step, values(step_s))
    line = m.line(100, values(2.0))
    assert "step 100/1000" in line
    assert "0:30:00 left" in line
    assert "16 samples/s" in line
    assert "loss 2.0000 (contrastive 1.500)" in line
    m.close()


def test_a_resume_drops_the_lines_of_steps_that_are_taken_again(tmp_path):
    config = tiny_config(output=str(tmp_path))
    first = Metrics(config, 0)
    for step in (1, 2, 3):
        first.step(step, values(1.0))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut off by a kill
    second = Metrics(config, 2)
    second.step(3, values(9.0))
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["time/step_s"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 9.0)]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe not text", b"[1, 2]", b'{"loss": 2}', b"{}", b"null", b'{"step": "x"}', b'{"st']
)
def test_a_damaged_line_is_passed_over_and_named(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n{"step": 3}\n')
    m = Metrics(tiny_config(output=str(tmp_path)), 2)
    m.step(3, values(9.0))
    m.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert capsys.readouterr().out == f"{path}: left out 1 lines that hold no step, line 2 first.\n"


def test_held_out_scores_stand_in_the_line_of_their_step_and_all_is_json(tmp_path):
    m = Metrics(tiny_config(output=str(tmp_path)), 0)
    m.step(1, values(1.0))
    m.step(2, values(1.0) | {"loss": float("nan")})
    m.heldout(2, {"loss": 3.5, "text_to_image_R@1": float("inf")})
    m.step(3, values(1.0))
    m.close()
    first, second, third = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in (first, second, third)] == [1, 2, 3]
    assert (second["loss"], second["heldout/loss"], second["heldout/text_to_image_R@1"]) == (None, 3.5, None)
    assert "heldout/loss" not in first | third


def test_a_line_that_a_full_disk_cuts_leaves_whole_lines_alone(tmp_path, capsys):
    m = Metrics(tiny_config(output=str(tmp_path)), 0)
    m.step(1, values(1.0))
    path, soft = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 30, soft[1]))
    try:
        m.heldout(1, {f"score {number}": 1.0 for number in range(20)})
        m.step(2, values(1.0))
        m.heldout(2, {"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    m.step(3, values(1.0))
    m.heldout(3, {"loss": 3.0})
    m.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line.get("heldout/loss")) for line in lines] == [(1, None), (3, 3.0)]
    assert capsys.readouterr().out.count("Metrics can no longer be written") == 1


def test_cards_are_grouped_so_that_loss_optimizer_and_progress_come_first():
    names = ("loss", "loss/matching", "learning_rate", "epoch", "epoch/web", "accuracy/matching", "time/step_s")
    cards = [card(name) for name in (*names, "memory/peak_gib", "text_to_image_R@1", "health/bad_samples")]
    assert sorted({name.partition("/")[0] for name in cards}) == ["loss", "optimizer", "progress", "scores", "system"]
    assert len(set(cards)) == len(cards)


def test_the_line_names_the_epoch_of_each_source(tmp_path):
    m = Metrics(tiny_config(output=str(tmp_path)), 0)
    m.step(1, values(1.0))
    assert m.line(1, values(1.0) | {"epoch": 0.456}).endswith(" left  epoch 0.46")
    assert m.line(1, values(1.0) | {"epoch/web": 1.0, "epoch/books": 0.5}).endswith("  epoch web 1.00, books 0.50")
    m.close()


def test_alarms_are_kept_by_step_and_a_resume_drops_those_of_steps_that_are_taken_again(tmp_path):
    config = tiny_config(output=str(tmp_path))
    first = Metrics(config, 0)
    for step in (1, 2, 3):
        first.alarm(step, f"look at {step}")
    first.close()
    second = Metrics(config, 2)
    second.alarm(3, "look again")
    second.close()
    kept = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [(line["step"], line["alarm"]) for line in kept] == [(1, "look at 1"), (2, "look at 2"), (3, "look again")]


def test_what_a_stale_job_still_writes_into_its_lines_is_seen_by_nobody(tmp_path):
    """It holds the file open, although another job has taken over and has cut off what it wrote too much."""
    config, path = tiny_config(output=str(tmp_path)), tmp_path / "metrics.jsonl"
    stale = Metrics(config, 0)
    for step in (1, 2, 3):
        stale.step(step, values(1.0))
    new = Metrics(config, 2)
    new.step(3, values(9.0))
    before = path.read_bytes()
    stale.step(4, values(1.0))
    stale.heldout(4, {"loss": 1.0})
    stale.close()
    assert path.read_bytes() == before
    new.close()


def test_a_job_that_was_taken_over_writes_no_step_and_no_bad_sample(tmp_path, monkeypatch):
    def fenced():
        raise FencedError("another job owns it")

    lease: Any = SimpleNamespace(check=fenced)
    stale = Metrics(tiny_config(output=str(tmp_path)), 0, lease)
    monkeypatch.setattr(stale._board, "add_scalar", lambda *_: pytest.fail("written"))
    for write in (
        lambda: stale.step(1, values(1.0)),
        lambda: stale.heldout(1, {"loss": 1.0}),
        lambda: stale.checkpoint({"stall_s": 1.0}),
        lambda: stale.bad_samples(1, [BadSample("a.tar", "7", "empty caption")]),
    ):
        with pytest.raises(FencedError):
            write()
    stale.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert not (tmp_path / "bad_samples.jsonl").exists()

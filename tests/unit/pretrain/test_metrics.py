"""Reported numbers mean what their names say."""

import json

from distributed.tiny import tiny_config
from pretrain import metrics
from pretrain.metrics import Clock, Metrics


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

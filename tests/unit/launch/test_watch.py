"""Heartbeats, and what is made of them: who holds up the others, and since when a rank counts as hung."""

import os
from pathlib import Path

import pytest

from launch import watch as module
from launch.watch import Watch, laggards, waits_for_others
from pretrain.heartbeat import FOLDER, PHASES, Heart, Heartbeat, heartbeat_of, output_of, stacks_of

WAITING = (
    'Thread 0x1 (most recent call first):\n  File "threading.py", line 1 in wait\n\n'
    'Current thread 0x2 (most recent call first):\n  File "/x/torch/distributed/c10d.py", line 1 in reduce\n'
)
WORKING = WAITING.replace("Current thread 0x2", "Thread 0x3") + (
    '\nCurrent thread 0x2 (most recent call first):\n  File "/x/pretrain/loader.py", line 1 in make\n'
)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds that pass when the test says so, for ranks and launcher alike."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def watch(clock, tmp_path) -> Watch:
    (tmp_path / "beats").mkdir()
    return Watch(tmp_path / "beats")


@pytest.fixture
def heart(watch, monkeypatch, tmp_path) -> Heart:
    """Rank 0's, as under a launcher; its folder is `beats`, its run's folder `run`."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "beats"))
    monkeypatch.setattr("faulthandler.register", lambda *_, **__: None)
    return Heart(tmp_path / "run", hang_timeout_s=10, most_s=1000, patience_s=30)


def heard(phase: str, step: int = 5) -> Heartbeat:
    return Heartbeat(1, 0, PHASES.index(phase), step, -1, 60.0)


def steps(heart: Heart, clock: list[float], seconds: float, number: int) -> None:
    for step in range(number):
        heart.beat("step", step)
        clock[0] += seconds
        heart.beat("data", step)


def test_a_limit_follows_the_slowest_of_a_phase_once_it_has_been_seen_three_times(heart, clock):
    assert heart.limit_s("step") == 150
    steps(heart, clock, 1, 2)
    assert heart.limit_s("step") == 150
    steps(heart, clock, 1, 1)
    assert heart.limit_s("step") == 10
    steps(heart, clock, 7, 1)
    assert heart.limit_s("step") == 35
    steps(heart, clock, 900, 1)
    assert heart.limit_s("step") == 1000, "below what collectives themselves wait"
    steps(heart, clock, 1, 100)
    assert heart.limit_s("step") == 10, "what was slow a hundred steps ago counts no more"
    assert heart.limit_s("data") == heart.limit_s("agree") - 150 + 10 == 40, "data may be tried again"


def test_a_rank_is_hung_when_it_has_been_seen_in_one_phase_for_longer_than_its_limit(heart, watch, clock):
    assert not watch.look([0]), "it has not said a word"
    steps(heart, clock, 1, 3)
    heart.beat("step", 3)
    for _ in range(1 + 10):
        clock[0] += 1
        assert not watch.look([0])
    clock[0] += 1
    assert watch.look([0])
    heart.beat("data", 3)
    clock[0] += 1
    assert not watch.look([0])


def test_time_in_which_the_launcher_was_suspended_too_does_not_count(heart, watch, clock):
    steps(heart, clock, 1, 3)
    heart.beat("step", 3)
    clock[0] += 1
    assert not watch.look([0])
    clock[0] += 3600
    assert not watch.look([0])


def test_the_newest_checkpoint_is_known_from_the_heartbeats(heart, watch, clock):
    heart.saved_step = 12
    heart.beat("data", 12)
    clock[0] += 1
    watch.look([0])
    assert watch.saved_step == 12


@pytest.mark.parametrize(
    ("beats", "states", "stacks", "expected"),
    [
        ({0: "step", 1: "step"}, {1: "T"}, {0: WAITING}, [1]),
        ({0: "step", 1: "step"}, {0: "D"}, {1: WORKING}, [0]),
        ({0: "agree", 1: "data", 2: "agree"}, {}, {0: WAITING, 1: WAITING, 2: WAITING}, [1]),
        ({0: "step", 1: "step"}, {}, {0: WORKING, 1: WAITING}, [0]),
        ({0: "step", 1: "step"}, {}, {0: WAITING, 1: WAITING}, []),  # for a rank of another node
        ({0: "step", 1: "step"}, {}, {0: WAITING}, [1]),  # it did not answer
    ],
)
def test_the_rank_that_holds_up_the_others_is_found(beats, states, stacks, expected):
    states = {rank: states.get(rank, "S") for rank in beats}
    assert laggards({rank: heard(phase) for rank, phase in beats.items()}, states, stacks) == expected


@pytest.mark.parametrize(("stacks", "waits"), [(WAITING, True), (WORKING, False), ("", False)])
def test_only_the_main_threads_stack_tells_whether_a_rank_waits_for_others(stacks, waits):
    assert waits_for_others(stacks) == waits


def test_where_the_runs_folder_cannot_take_stacks_that_is_said(monkeypatch, heart, watch, clock, tmp_path):
    heart.beat("step", 3)
    clock[0] += 1
    watch.look([0])
    monkeypatch.setattr(module.os, "kill", lambda *_: None)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    (tmp_path / "run").touch()
    said = watch.report({0: os.getpid()})
    assert said.startswith("no progress for 0 s: rank 0 (step, step 4) holds up the run; the stacks cannot be kept (")
    assert Path(output_of(tmp_path / "beats")).read_text() == str(tmp_path / "run")
    assert stacks_of(tmp_path / "beats", 0).exists()
    assert heartbeat_of(tmp_path / "beats", 0).exists()


@pytest.mark.parametrize(
    ("phase", "place"), [("start", "the start"), ("step", "step, step 6"), ("save", "save, step 5")]
)
def test_a_place_is_a_phase_and_the_step_that_it_completes(phase, place):
    assert heard(phase).place == place

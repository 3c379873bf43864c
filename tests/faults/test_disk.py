"""A disk that fails costs saves, and not the run; where it goes on failing the run ends, and loses nothing."""

import pytest

from faults.conftest import EVERY, STEPS
from faults.harness import assert_intact, mount, resumed_at, small_disk
from faults.injector import FILLER, Fault

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well

FILE = r"\.tmp-{save}-\w+/"
# Saves that fail once, with one that succeeds in between: what is struck, and what is said of it.
ERRORS = {
    "no file on one rank": (Fault(1, "open", "EIO", path=FILE + "node"), "rank 1: Input/output error"),
    "no flush on the main rank": (Fault(0, "fsync", "EIO", path=FILE + "node"), "rank 0: Input/output error"),
    "no manifest": (Fault(0, "open", "EIO", path=FILE + "MANIFEST"), "Input/output error"),
    "no name": (Fault(0, "os.rename", "ESTALE", path="{save}$"), "Stale file handle"),
    "no folder": (Fault(0, "os.mkdir", "EACCES", path=r"\.tmp-{save}"), "Permission denied"),
}


def test_errors_of_one_rank_cost_a_save_on_all_of_them_and_nothing_else(make_run, undisturbed):
    run = make_run()
    struck = {2 * EVERY * number + EVERY: error for number, error in enumerate(ERRORS.values())}
    ended = run.live(faults=[Fault(**vars(fault) | {"step": step}) for step, (fault, _) in struck.items()])
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    for step, (_, said) in struck.items():
        assert f"Could not save step {step}: {said}" in ended.out
        assert f"Saved step {step + EVERY} in" in ended.out
    assert ended.out.count("Earlier checkpoints are untouched.") == len(ERRORS)
    assert run.steps() == undisturbed
    assert_intact(run, undisturbed)
    assert run.newest() == STEPS
    assert run.leftovers() == []


@pytest.fixture(scope="module")
def on_small_disk(make_run):
    """A run whose checkpoints have a disk of their own, which holds three of them."""
    run = make_run()
    with small_disk(run.checkpoints, "3m"):
        yield run


@pytest.mark.parametrize(
    ("way", "keep", "said"),
    [
        ("too little space for another", 10, "make space, or lower checkpoint.keep"),
        ("full while it is written", 2, "No space left on device"),
        ("read-only", 2, "Read-only file system"),
    ],
)
def test_a_disk_that_takes_no_more_ends_the_run_after_three_saves_and_leaves_the_others(
    on_small_disk, undisturbed, way, keep, said
):
    run, before = on_small_disk, on_small_disk.newest()
    fault = Fault(0, "open", "fill", step=EVERY, path=FILE + "node")
    if way == "read-only":
        assert not mount("-o", "remount,ro", run.checkpoints)
    ended = run.live(f"checkpoint.keep={keep}", faults=[fault] if "full" in way else [])
    if way == "read-only":
        assert not mount("-o", "remount,rw", run.checkpoints)
    (run.checkpoints / FILLER).unlink(missing_ok=True)
    assert ended.code == 4, ended.err
    assert resumed_at(ended) == before
    assert ended.out.count("Could not save step") == 3
    assert said in ended.out
    assert "start again with the same command to go on from the newest checkpoint." in ended.err
    assert "Traceback" not in ended.err
    assert (run.newest() or 0) >= (before or 0)
    assert_intact(run, undisturbed)
    assert run.leftovers() == []


def test_with_room_for_what_is_kept_the_run_goes_on_to_the_undisturbed_end(on_small_disk, undisturbed):
    before = on_small_disk.newest()
    ended = on_small_disk.live("checkpoint.keep=2")
    assert ended.code == 0, ended.err
    assert resumed_at(ended) == before
    assert on_small_disk.steps() == undisturbed

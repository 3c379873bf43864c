"""What goes wrong on one rank alone is taken by all of them together: not-a-numbers, and a data worker that dies."""

import pytest

from faults.harness import assert_intact, resumed_at
from faults.injector import Fault

pytestmark = pytest.mark.timeout(600)  # many lives, on a machine that others use as well


def test_not_a_number_on_one_rank_costs_that_step_on_all_and_a_resume_repeats_it(make_run, undisturbed):
    poison = Fault(1, "forward", "nan", step=3)
    short = ("training.steps=20",)
    calm, killed = make_run(), make_run()
    reference = calm.live(*short, faults=[poison])
    assert reference.code == 0, reference.err
    assert (
        "step 3: skipped: the loss or the gradient norm is not finite (1 of the last 100 steps, 1 in all)"
        in reference.out
    )
    steps = [repr(step) for step in calm.steps()]
    assert [step["health/skipped_steps"] for step in calm.steps()] == [0, 0] + [1] * 18
    assert [step["batch_id"] for step in calm.steps()] == [step["batch_id"] for step in undisturbed[:20]]
    # The kill comes after the skipped step is in a checkpoint: what follows knows of it.
    ended = killed.live(*short, faults=[poison, Fault(0, "update", "SIGKILL all", step=9)])
    assert ended.code == 0, ended.err
    assert (resumed_at(ended) or 0) >= 4
    assert [repr(step) for step in killed.steps()] == steps


@pytest.mark.long
def test_a_killed_data_worker_ends_the_run_with_a_sentence_and_the_same_command_goes_on(make_run, undisturbed):
    run = make_run(data={"workers": 2})
    ended = run.live(faults=[Fault(1, "forward", "SIGKILL child", step=9)])
    assert ended.code == 4, ended.err
    assert "A data worker died, most often because memory or /dev/shm ran out" in ended.err
    assert "Traceback" not in ended.err
    assert_intact(run, undisturbed)
    assert (run.newest() or 0) >= 6
    ended = run.live()
    assert ended.code == 0, ended.err
    assert run.steps() == undisturbed

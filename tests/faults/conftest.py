"""Warm processes, and the run that nobody disturbed."""

import pytest

from e2e.conftest import tiny_run
from faults.harness import Run
from warm import Nursery

STEPS, EVERY = 52, 2


@pytest.fixture(scope="session")
def nursery():
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def make_run(corpus, nursery, tmp_path_factory):
    """Makes a run in a folder of its own; the same config but for `changes` to sections of it."""

    def make(**changes) -> Run:
        folder = tmp_path_factory.mktemp("run")
        tree = tiny_run(corpus, folder / "run")
        tree["training"]["steps"] = STEPS
        tree["checkpoint"] = {"every": EVERY}
        for section, values in changes.items():
            tree[section] = tree[section] | values if isinstance(values, dict) else values
        return Run(tree, folder, nursery)

    return make


@pytest.fixture(scope="session")
def undisturbed(make_run):
    """The steps of a run on two ranks that nobody disturbed."""
    run = make_run()
    ended = run.live()
    assert ended.code == 0, ended.err
    return run.steps()

"""What one layout saved, every other goes on from: same losses, same gradient norms, on 1, 2 or 4 ranks.

Each layout loads what one process saved, and saves what one process and some quite different layout load.
"""

import pytest

from distributed.layouts import LAYOUTS
from distributed.tiny import engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore, read_run

SAVED_AFTER, STEPS = 3, 6
ONE_PROCESS = "ZeRO-0, 1 rank"


def train_and_save(mesh, changes, folder):
    config = tiny_config(**changes)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, SAVED_AFTER, engine)
    run = {"applied_steps": engine.applied_steps}
    return CheckpointStore(folder, mesh.world, keep=2).save(SAVED_AFTER, engine.fragments(), run)


def load_and_go_on(mesh, changes, folder):
    config = tiny_config(**changes)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine, first=15)  # other weights and moments than fresh ones
    store = CheckpointStore(folder, mesh.world, keep=2)
    checkpoint = store.newest_valid()
    store.load(checkpoint, engine.fragments())
    engine.loaded(read_run(checkpoint)["applied_steps"])
    return engine_curve(mesh, config, STEPS - SAVED_AFTER, engine, first=SAVED_AFTER)


@pytest.fixture(scope="module")
def goes_on():
    """Checks that a layout that loads what is in a folder takes the steps of a run that nothing interrupted."""
    uninterrupted = plain_curve(tiny_config(), STEPS)[SAVED_AFTER:]

    def check(request, layout, folder):
        ranks, changes = LAYOUTS[layout]
        for curve in request.getfixturevalue(ranks).run(load_and_go_on, changes, folder):
            for here, expected in zip(curve, uninterrupted, strict=True):
                assert here.losses == pytest.approx(expected.losses, abs=2e-5), f"loaded on {layout}"
                assert here.norm == pytest.approx(expected.norm, rel=2e-4), f"loaded on {layout}"

    return check


def save(request, layout, folder):
    ranks, changes = LAYOUTS[layout]
    assert set(request.getfixturevalue(ranks).run(train_and_save, changes, folder)) == {None}


@pytest.fixture(scope="module")
def saved_by_one_process(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(request, ONE_PROCESS, folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_goes_on_from_what_one_process_saved(request, goes_on, saved_by_one_process, layout):
    goes_on(request, layout, saved_by_one_process)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_and_another_layout_go_on_from_what_it_saved(request, goes_on, tmp_path, layout):
    save(request, layout, tmp_path)
    goes_on(request, ONE_PROCESS, tmp_path)
    names = list(LAYOUTS)
    goes_on(request, names[(names.index(layout) + 11) % len(names)], tmp_path)

"""What one layout saved, every other goes on from: same losses, same gradient norms, on 1, 2 or 4 ranks."""

import pytest

from distributed.tiny import engine_curve, plain_curve, tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore, read_run

SAVED_AFTER, STEPS = 4, 8
LAYOUTS = [  # ranks, ZeRO stage, tensor parallel, pipeline parallel
    ("one_rank", 0, 1, 1),
    ("two_ranks", 1, 1, 1),
    ("two_ranks", 3, 1, 1),
    ("four_ranks", 2, 1, 1),
    ("two_ranks", 0, 2, 1),
    ("four_ranks", 3, 2, 1),
    ("two_ranks", 0, 1, 2),
    ("four_ranks", 1, 1, 2),
    ("four_ranks", 1, 2, 2),
]


def layout(stage, tp, pp):
    return tiny_config(engine__zero_stage=stage, engine__tensor_parallel=tp, engine__pipeline_parallel=pp)


def train_and_save(mesh, stage, tp, pp, folder):
    config = layout(stage, tp, pp)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, SAVED_AFTER, engine)
    run = {"applied_steps": engine.applied_steps}
    return CheckpointStore(folder, mesh.world, keep=2).save(SAVED_AFTER, engine.fragments(), run)


def load_and_go_on(mesh, stage, tp, pp, folder):
    config = layout(stage, tp, pp)
    engine = tiny_engine(mesh, config)
    engine_curve(mesh, config, 1, engine, first=15)  # other weights and moments than fresh ones
    store = CheckpointStore(folder, mesh.world, keep=2)
    checkpoint = store.newest_valid()
    store.load(checkpoint, engine.fragments())
    engine.loaded(read_run(checkpoint)["applied_steps"])
    return engine_curve(mesh, config, STEPS - SAVED_AFTER, engine, first=SAVED_AFTER)


@pytest.fixture(scope="module")
def uninterrupted():
    return plain_curve(tiny_config(), STEPS)[SAVED_AFTER:]


@pytest.mark.parametrize("saver", LAYOUTS, ids=str)
def test_every_layout_goes_on_from_it(request, tmp_path, uninterrupted, saver):
    ranks, *degrees = saver
    assert set(request.getfixturevalue(ranks).run(train_and_save, *degrees, tmp_path)) == {None}
    for loader, *loader_degrees in LAYOUTS:
        for curve in request.getfixturevalue(loader).run(load_and_go_on, *loader_degrees, tmp_path):
            for (losses, norm), (expected, expected_norm) in zip(curve, uninterrupted, strict=True):
                assert losses == pytest.approx(expected, abs=2e-5), (
                    f"loaded on {loader} with ZeRO, tensor and pipeline parallel {loader_degrees}"
                )
                assert norm == pytest.approx(expected_norm, rel=2e-4)

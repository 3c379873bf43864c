"""Another run's weights come to every layout as the same bytes, resized or not."""

from pathlib import Path

import pytest
import torch

from distributed.layouts import LAYOUTS
from distributed.tiny import tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.transfer import start_from
from pretrain.parallel.mesh import ALONE, Mesh

SOURCE = {"seed": 9, "engine__zero_stage": 0, "model__image__size": 32, "model__text__length": 9}
SOME_LAYOUTS = ("ZeRO-3 x dp 2", "ZeRO-1 x dp 2", "ZeRO-0 x tp 2", "ZeRO-3 x tp 2", "ZeRO-1 x pp 2")


def initial_pieces(mesh, source: Path, changes):
    engine = tiny_engine(mesh, tiny_config(**changes))
    start_from(source, engine, mesh.world, "t")
    for fragment in engine.fragments():
        assert not fragment.tensors["exp_avg"].any()
    return [(f.name, f.part, f.start, f.tensors["master"].clone()) for f in engine.fragments()]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    engine = tiny_engine(Mesh(torch.device("cpu")), tiny_config(**SOURCE))
    store = CheckpointStore(folder / "checkpoints", ALONE)
    store.save(3, engine.fragments(), {"tokenizer": "t"})
    store.settle(wait=True)
    return folder


@pytest.mark.parametrize("layout", SOME_LAYOUTS)
def test_every_layout_starts_from_the_same_bytes(request, source, layout):
    one = initial_pieces(Mesh(torch.device("cpu")), source, {"engine__zero_stage": 0})
    whole = {name: values.view(part.shape) for name, part, _, values in one}
    ranks, changes = LAYOUTS[layout]
    seen = {name: torch.zeros(values.shape, dtype=torch.bool) for name, values in whole.items()}
    for pieces in request.getfixturevalue(ranks).run(initial_pieces, source, changes):
        for name, part, start, values in pieces:
            place = tuple(slice(a, a + n) for a, n in zip(part.offset, part.size, strict=True))
            flat = slice(start, start + len(values))
            assert torch.equal(whole[name][place].reshape(-1)[flat], values), name
            marks = seen[name][place].reshape(-1)
            marks[flat] = True
            seen[name][place] = marks.view(part.size)
    assert all(marks.all() for marks in seen.values())

"""Every layout writes the captions that one process writes, also one whose vocabulary is cut over ranks."""

import pytest
import torch

from distributed.layouts import LAYOUTS
from distributed.tiny import VOCABULARY, build, mesh_of, tiny_config, tiny_engine
from pretrain.captioning import Run, look, write_captions
from pretrain.collectives import Group
from pretrain.config import Config
from pretrain.models.layer import Architecture
from pretrain.parallel.mesh import Mesh
from pretrain.synthetic import made_up_batch

CONFIG = {"model__architecture": "coca", "model__text__depth": 2, "objectives__contrastive__negatives": "global_batch"}


def write(run: Run, architecture: Architecture, config: Config, group: Group = None) -> list[list[list[int]]]:
    """Captions of 8 images, with one beam and with three."""
    images = made_up_batch(config, VOCABULARY, torch.arange(8))["images"]
    seen = look(run, architecture, images)
    marks = {
        "vocabulary": VOCABULARY.size,
        "cls": 2,
        "sep": 3,
        "pad": VOCABULARY.pad,
        "length": config.model.text.length,
    }
    return [write_captions(run, seen, beams=beams, group=group, **marks).tolist() for beams in (1, 3)]


def write_on_engine(mesh: Mesh, config: Config) -> list[list[list[int]]]:
    engine = tiny_engine(mesh, config)
    group = mesh_of(mesh, config).tp.group
    return write(lambda want, have: engine.run(want, [have])[0], engine.architecture, config, group)


@pytest.fixture(scope="module")
def reference():
    config = tiny_config(**CONFIG)
    model = build(config).eval()
    written = write(model.run, model.architecture, config)
    assert len(set(map(tuple, written[0]))) > 4  # images are told apart
    assert written[0] != written[1]
    return written


@pytest.mark.parametrize(
    "layout",
    [
        "ZeRO-0, 1 rank",
        "ZeRO-3 x dp 2",
        "ZeRO-1 x tp 2",
        "ZeRO-3 x tp 2 x dp 2",
        "ZeRO-1 x pp 2",
        "ZeRO-0 x pp 2 x tp 2",
    ],
)
def test_its_captions_are_those_of_one_process(request, reference, layout):
    ranks, changes = LAYOUTS[layout]
    for written in request.getfixturevalue(ranks).run(write_on_engine, tiny_config(**CONFIG, **changes)):
        assert written == reference

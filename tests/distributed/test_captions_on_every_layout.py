"""Every layout writes the captions that one process writes, whatever its vocabulary and its layers are cut over."""

import pytest
import torch

from distributed.layouts import LAYOUTS
from distributed.tiny import BLIP, COCA, SOME_LAYOUTS, VOCABULARY, build, mesh_of, tiny_config, tiny_engine
from pretrain.captioning import Run, look, write_captions
from pretrain.collectives import Group
from pretrain.config import Config
from pretrain.models.layer import Architecture
from pretrain.parallel.mesh import Mesh
from pretrain.synthetic import made_up_batch

Captions = list[list[int]]
ARCHITECTURES = {"coca": COCA, "blip": BLIP}


def write(run: Run, architecture: Architecture, config: Config, group: Group = None) -> dict[int, Captions]:
    """Captions of 8 images, by the number of beams."""
    images, length = made_up_batch(config, VOCABULARY, torch.arange(8))["images"], config.model.text.length
    seen, marks = look(run, architecture, images), {"vocabulary": VOCABULARY.size, "cls": 2, "sep": 3, "pad": 0}
    return {
        beams: write_captions(run, seen, beams=beams, length=length, group=group, **marks).tolist() for beams in (1, 3)
    }


def write_on_engine(mesh: Mesh, config: Config) -> dict[int, Captions]:
    engine, group = tiny_engine(mesh, config), mesh_of(mesh, config).tp.group
    return write(lambda want, have: engine.run(want, [have])[0], engine.architecture, config, group)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reference(request):
    config = tiny_config(**ARCHITECTURES[request.param])
    model = build(config).eval()
    return ARCHITECTURES[request.param], write(model.run, model.architecture, config)


def test_the_reference_tells_images_apart_and_beams_make_a_difference(reference):
    _, written = reference
    assert len(set(map(tuple, written[1]))) > 4
    assert written[1] != written[3]


@pytest.mark.parametrize("layout", [*SOME_LAYOUTS, "ZeRO-0 x pp 2 x tp 2"])
def test_its_captions_are_those_of_one_process(request, reference, layout):
    (ranks, changes), (own, expected) = LAYOUTS[layout], reference
    for written in request.getfixturevalue(ranks).run(write_on_engine, tiny_config(**own, **changes)):
        assert written == expected

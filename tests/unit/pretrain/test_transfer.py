"""Starting with another run's weights: what fits is loaded, positions are carried over, and all of it is told."""

import pytest
import torch
import torch.nn.functional as F

from distributed.tiny import BLIP, CLIP, COCA, VILT, tiny_config, tiny_engine
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.transfer import make_plan, report, resized, shapes_of, start_from
from pretrain.errors import CheckpointError, ConfigError
from pretrain.parallel.mesh import ALONE, Mesh

CPU = Mesh(torch.device("cpu"))


def engine(**changes):
    return tiny_engine(CPU, tiny_config(engine__zero_stage=0, **changes))


def masters(engine):
    return {f.name: f.tensors["master"].view(f.part.shape).clone() for f in engine.fragments()}


@pytest.fixture
def source(tmp_path):
    """A run with other weights, and moments."""
    other = engine(seed=9)
    for fragment in other.fragments():
        fragment.tensors["exp_avg"].fill_(3.0)
    store = CheckpointStore(tmp_path / "source" / "checkpoints", ALONE)
    store.save(7, other.fragments(), {"tokenizer": "t"})
    store.settle(wait=True)
    return tmp_path / "source", masters(other)


def test_the_same_model_takes_every_weight_and_nothing_else(source):
    folder, weights = source
    fresh = engine()
    origin, said = start_from(folder, fresh, ALONE, "t")
    assert all(torch.equal(value, weights[name]) for name, value in masters(fresh).items())
    assert all(not f.tensors[kind].any() for f in fresh.fragments() for kind in ("exp_avg", "exp_avg_sq"))
    assert fresh.applied_steps == 0
    manifest = (folder / "checkpoints" / "step-000000007" / "COMMIT").read_text()
    assert origin == {
        "path": str(folder / "checkpoints" / "step-000000007"),
        "step": 7,
        "manifest_sha256": manifest,
    }
    count = len(weights)
    assert said == [
        f"Initial weights from {origin['path']} (step 7, manifest {manifest[:12]}): {count} of {count} parameters "
        f"loaded, 0 resized, 0 skipped, 0 not in it."
    ]


def test_a_checkpoint_of_the_run_may_be_named_instead(source):
    folder, _ = source
    origin, _ = start_from(folder / "checkpoints" / "step-000000007", engine(), ALONE, "t")
    assert origin["step"] == 7
    with pytest.raises(CheckpointError, match="No checkpoint of step 8 in .*: those there are of 7"):
        start_from(folder / "checkpoints" / "step-000000008", engine(), ALONE, "t")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param(
            {"model__image__size": 32},
            "Resized: image_embed.position (4 x 32 -> 16 x 32, interpolated).",
            id="larger images",
        ),
        pytest.param(
            {"model__image__size": 8},
            "Resized: image_embed.position (4 x 32 -> 1 x 32, interpolated).",
            id="smaller images",
        ),
        pytest.param(
            {"model__image__patch": 4},
            "Resized: image_embed.position (4 x 32 -> 16 x 32, interpolated).",
            id="smaller patches",
        ),
        pytest.param(
            {"model__image__patch": 4},
            "Skipped, and as initialised: image_embed.project.weight (32 x 192 -> 32 x 48).",
            id="a projection of other patches",
        ),
        pytest.param(
            {"model__text__length": 20},
            "Resized: text_embed.position (12 x 32 -> 20 x 32, places from 12 on as initialised).",
            id="longer captions",
        ),
        pytest.param(
            {"model__text__length": 6}, "Resized: text_embed.position (12 x 32 -> 6 x 32, cut).", id="shorter captions"
        ),
        pytest.param(
            CLIP,
            "In it, and not in this model: matching_head, masked_lm_head, fusion_block_0.",
            id="another architecture",
        ),
        pytest.param(
            {"model__image__depth": 5},
            "Not in it, and as initialised: image_block_2 to 4.",
            id="more blocks",
        ),
        pytest.param(
            {"objectives__contrastive__loss": "sigmoid"},
            "Not in it, and as initialised: temperature.bias.",
            id="one parameter more of a layer",
        ),
    ],
)
def test_what_does_not_fit_is_told(source, changes, line):
    _, said = start_from(source[0], engine(**changes), ALONE, "t")
    assert {*line.removesuffix(".").split(", ")} <= {*", ".join(said).replace(".,", ",").removesuffix(".").split(", ")}


def test_another_tokenizer_leaves_out_what_is_of_its_pieces(source):
    folder, weights = source
    fresh = engine()
    initial = masters(fresh)
    _, said = start_from(folder, fresh, ALONE, "u")
    by_id = ("text_embed.token.weight", "masked_lm_head.decode.weight", "masked_lm_head.decode.bias")
    for name, value in masters(fresh).items():
        assert torch.equal(value, (initial if name in by_id else weights)[name])
    assert "text_embed.token.weight (of another tokenizer)" in said[1]


def test_places_of_longer_captions_are_the_old_ones_and_behind_them_the_initial_ones(source):
    folder, weights = source
    fresh = engine(model__text__length=20)
    initial = masters(fresh)["text_embed.position"]
    start_from(folder, fresh, ALONE, "t")
    now = masters(fresh)["text_embed.position"]
    assert torch.equal(now[:12], weights["text_embed.position"])
    assert torch.equal(now[12:], initial[12:])


@pytest.mark.parametrize("side", [3, 7, 14])
def test_image_positions_are_interpolated_as_timm_does(side):
    """A plane stays a plane in the middle, and the function is the published one."""
    old = torch.randn(49, 5)
    expected = F.interpolate(
        old.reshape(1, 7, 7, -1).permute(0, 3, 1, 2), size=[side, side], mode="bicubic", antialias=True
    )
    new = resized("image_embed.position", old, (side * side, 5))
    assert torch.equal(new, expected.permute(0, 2, 3, 1).reshape(-1, 5))
    if side == 7:
        assert torch.allclose(new, old, atol=1e-6)
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    plane = resized("image_embed.position", torch.stack([y, x], -1).view(49, 2), (side**2, 2)).view(side, side, 2)
    middle = plane[side // 3 : -(side // 3), side // 3 : -(side // 3)]
    assert bool((middle[1:, :, 0] > middle[:-1, :, 0]).all())
    assert bool((middle[:, 1:, 1] > middle[:, :-1, 1]).all())


@pytest.mark.parametrize("changes", [{}, CLIP, BLIP, COCA, VILT], ids=["albef", "clip", "blip", "coca", "vilt"])
def test_the_shapes_of_every_architecture_are_those_of_its_parameters(changes):
    made = engine(**changes)
    assert shapes_of(made.architecture) == {f.name: f.part.shape for f in made.fragments()}


def test_a_run_without_a_checkpoint_and_one_with_nothing_in_common_are_one_sentence(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"init_from .*nothing has no checkpoint: give the output folder"):
        start_from(tmp_path / "nothing", engine(), ALONE, "t")
    wide = engine(model__image__width=64, model__text__width=64, model__embed=24)
    with pytest.raises(ConfigError, match=r"init_from .*source has no matrix of the name and shape"):
        start_from(source[0], wide, ALONE, "u")


def test_a_damaged_source_is_not_taken_and_not_moved(source):
    checkpoint = source[0] / "checkpoints" / "step-000000007"
    file = next(checkpoint.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(CheckpointError, match="is valid"):
        start_from(source[0], engine(), ALONE, "t")
    assert file.exists()


def test_long_lists_are_told_by_layer_and_by_run_of_layers():
    here = {f"block_{n}.{part}": (1,) for n in range(12) for part in ("a", "b")} | {"head.a": (1,), "head.b": (1,)}
    there = {"head.b": (1,), "other.x": (2,)}
    plan = make_plan(here, there, same_tokenizer=True)
    lines = list(report(plan, here, there, {"path": "p", "step": 1, "manifest_sha256": "abc"}))
    assert lines[1:] == [
        "Not in it, and as initialised: head.a, block_0 to 11.",
        "In it, and not in this model: other.",
    ]

"""ViLT: one pass over [caption; image] rows is the passes of the paper; its pairs follow from positions alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.tiny import VILT, VOCABULARY, build, tiny_config
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import leading_to
from pretrain.models.model import Model
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.matching import draw_images
from pretrain.synthetic import made_up_batch

B = 16


def model_and_batch(**changes) -> tuple[Model, dict[str, Tensor]]:
    config = tiny_config(**VILT, **changes)
    return build(config).eval(), made_up_batch(config, VOCABULARY, torch.arange(B))


def run_row(model: Model, padded: Tensor, pixels: Tensor) -> Tensor:
    """One caption and one image, (L,) and (3, H, W), without padding -> (1, L + P, D)."""
    ids = padded[padded != VOCABULARY.pad]
    words = model.text_embed.token(ids) + model.text_embed.position[: len(ids)] + model.one_stream.modality[0]
    patches = model.image_norm(model.image_embed(pixels[None]))[0] + model.one_stream.modality[1]
    row = torch.cat([words, patches])[None]
    for number in range(2):
        row = model.get_submodule(f"joint_block_{number}")(row)
    return row


def test_one_pass_equals_one_pass_per_objective():
    model, batch = model_and_batch()
    want = ("negative_images", "pairs/label", "pairs/valid", "loss/matching", "loss/masked_lm")
    flow = model.run(want, batch)
    pairs, words = [], []
    for i in range(B):
        row = run_row(model, batch["text"][i], batch["images"][flow["negative_images"][i]])
        logits = model.matching_head.classify(model.matching_head.norm(row[:, 0]))
        pairs.append(F.cross_entropy(logits, flow["pairs/label"][i : i + 1]) * flow["pairs/valid"][i])
        row = run_row(model, batch["masked_text"][i], batch["images"][i])
        one = slice(i, i + 1)
        words.append(model.masked_lm_head(row, batch["masked_positions"][one], batch["masked_targets"][one])[0])
    torch.testing.assert_close(flow["loss/matching"], torch.stack(pairs).mean())
    torch.testing.assert_close(flow["loss/masked_lm"], torch.stack(words).mean())


@pytest.mark.parametrize("changes", [{}, {"objectives__matching": None}, {"objectives__masked_lm": None}], ids=str)
def test_every_parameter_gets_a_gradient(changes):
    model, batch = model_and_batch(**changes)
    model(batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_towers_may_have_blocks_of_their_own():
    towers = {"model__image__depth": 2, "model__text__depth": 1}
    model = build(tiny_config(**(VILT | towers)))
    assert {"image_block_1", "text_block_0", "joint_block_1"} <= {name for name, _ in model.named_children()}


def test_padding_changes_nothing():
    model, batch = model_and_batch()
    reference = model(batch)
    model.text_embed.token.weight.data[VOCABULARY.pad] += 5
    torch.testing.assert_close(model(batch).figures, reference.figures)


def test_any_pairs_are_matched_as_they_are_brought_and_nothing_else_runs():
    """Re-ranking: an image as its patches, a caption as its pieces' embeddings."""
    model, batch = model_and_batch()
    with torch.no_grad():
        sides = model.run(["image_tokens", "caption_tokens", "caption_mask"], batch)
        images, texts = torch.tensor([3, 0, 5]), torch.tensor([1, 0, 7])
        have = {"seen": sides["image_tokens"], "pairs/image": images}
        have |= {f"pairs/{name}": sides[name][texts] for name in ("caption_tokens", "caption_mask")}
        for logits, image, text in zip(model.run(["match_logits"], have)["match_logits"], images, texts, strict=True):
            row = run_row(model, batch["text"][text], batch["images"][image])
            torch.testing.assert_close(logits[None], model.matching_head(row))
    names = [call.layer.name for call in leading_to(model.architecture.layers, ["match_logits"], have)]
    assert names[:2] == ["join_joint", "one_stream"]


def test_masked_captions_alone_run_no_pairs():
    model, batch = model_and_batch()
    calls = leading_to(model.architecture.layers, ["loss/masked_lm"], batch)
    assert "pair_at_random" not in [call.layer.name for call in calls]
    assert {call.kinds for call in calls} == {(), ("masked",)}


def drawn(positions: Tensor, identity: Identity | None = None, pool: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    return draw_images(identity or Identity(positions, positions), positions, pool, seed)


@pytest.mark.parametrize("pool", [2, 3, 8, 24])
def test_half_of_each_pool_keep_their_images_and_the_others_see_another_of_the_pool(pool):
    positions = 48 + torch.arange(48)
    rows, kept, valid = drawn(positions, pool=pool)
    assert valid.all()
    assert (kept.view(-1, pool).sum(dim=1) == pool // 2).all()
    assert torch.equal(rows == torch.arange(48), kept == 1)
    assert torch.equal(rows // pool, torch.arange(48) // pool)


def test_no_other_image_is_the_same_nor_has_the_same_caption():
    """Some samples have no other image in their pool to show: they count nothing, unless they keep their own."""
    positions = torch.arange(800)
    alone = positions // 8 % 4 == 0  # all of such a pool share an image
    identity = Identity(torch.where(alone, 0, positions // 2), torch.where(positions % 8 < 3, 0, positions))
    rows, kept, valid = drawn(positions, identity)
    other = kept == 0
    shown = (other & (valid == 1)).nonzero()[:, 0]
    for ids in (identity.image_ids, identity.caption_ids):
        assert (ids[shown] != ids[rows[shown]]).all()
    assert torch.equal(valid == 0, other & alone)
    assert torch.equal(rows[alone], positions[alone])


def test_each_sample_keeps_its_image_half_the_time_and_sees_the_others_alike():
    """Chi-square over 400 pools of 4: 11 degrees of freedom, of which 1 in 1,000 exceeds 31.3."""
    positions = torch.arange(1600)
    rows, kept, _ = drawn(positions, pool=4)
    per_place = kept.view(-1, 4).float().mean(dim=0)
    assert (per_place - 0.5).abs().max() < 4 * 0.5 / 20  # four standard deviations
    counts = torch.zeros(4, 4)
    other = kept == 0
    counts.index_put_((positions[other] % 4, rows[other] % 4), torch.ones(int(other.sum())), accumulate=True)
    expected = 400 / 2 / 3
    chi_square = ((counts - expected) ** 2 / expected)[~torch.eye(4).bool()].sum()
    assert chi_square < 31.3


def test_pairs_follow_from_seed_and_position_however_the_batch_is_cut():
    whole = drawn(torch.arange(32))
    halves = [drawn(16 * half + torch.arange(16)) for half in range(2)]
    halves = [(rows + 16 * half, *flags) for half, (rows, *flags) in enumerate(halves)]
    for together, apart in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(whole[1], drawn(torch.arange(32), seed=1)[1])
    assert not torch.equal(whole[1], drawn(32 + torch.arange(32))[1])  # the next step's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__image__width": 64}, "model.image.width 64 is not model.text.width 32, and blocks of model.joint"),
        ({"model__joint": None}, "model.architecture vilt needs model.joint: remove `null`"),
        ({"model__embed": 16}, "model.architecture vilt has no model.embed: remove it"),
        (
            {"objectives__contrastive": {}},
            "model.architecture vilt has no objectives.contrastive: set objectives.contrastive=null",
        ),
        ({"engine__tensor_parallel": 4}, "engine.tensor_parallel 4 does not divide model.joint.heads 2"),
        (
            {"objectives__masked_lm": None, "objectives__matching": None},
            "model.architecture vilt: layer image_embed leads to no loss",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        architecture_of(tiny_config(**(VILT | changes)), VOCABULARY)
    assert message in str(caught.value)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_without_blocks_needs_joint_ones(tower):
    with pytest.raises(ConfigError, match=f"model.{tower}.depth is 0, and only blocks of model.joint make up for"):
        tiny_config(**{f"model__{tower}__depth": 0})


def test_heads_of_a_tower_without_blocks_bind_nothing():
    tiny_config(**VILT, model__image__heads=5, engine__tensor_parallel=2)

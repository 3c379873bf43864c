"""Models are lists of layers; one pass serves every objective; initial weights follow from names."""

import pytest
import torch

from distributed.tiny import CLIP, VOCABULARY, build, tiny_config
from pretrain.models.architectures import architecture_of
from pretrain.models.blocks import SelfAttention, padding_mask, sees
from pretrain.objectives.matching import matching_loss
from pretrain.synthetic import made_up_batch

SIGMOID = {"objectives__contrastive__loss": "sigmoid"}


def batch_of(positions: torch.Tensor) -> dict[str, torch.Tensor]:
    return made_up_batch(tiny_config(), VOCABULARY, positions)


@pytest.mark.parametrize(
    "changes",
    [{}, CLIP, SIGMOID, {**CLIP, **SIGMOID}, {"objectives__matching": None}, {"objectives__masked_lm": None}],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes):
    model = build(tiny_config(**changes))
    model(batch_of(torch.arange(8))).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_clip_is_the_towers_of_albef():
    albef, clip = (architecture_of(tiny_config(**changes), VOCABULARY).layers for changes in ({}, CLIP))
    shared = [layer.name for layer in clip if not layer.name.startswith("text_block")]
    assert [layer.name for layer in albef if layer.name in shared] == shared
    assert clip[-1].name == "contrastive_head"


def test_one_pass_equals_one_pass_per_objective():
    """Matching and masked-LM losses of the 4B-row pass, computed again in separate passes over plain rows."""
    model, B = build(tiny_config()).eval(), 8
    batch = batch_of(torch.arange(B))
    sides = ("image_tokens", "caption_tokens", "caption_mask", "masked_tokens", "masked_mask")
    want = (*sides, "negative_images", "negative_texts", "negatives_valid", "loss/matching", "loss/masked_lm")
    flow = model.run(want, batch)

    def fuse(side, text_rows, image_rows):
        """Each pair by itself: its own image, its own row."""
        rows = []
        for text_row, image_row in zip(text_rows, image_rows, strict=True):
            text = flow[f"{side}_tokens"][text_row : text_row + 1]
            mask = flow[f"{side}_mask"][text_row : text_row + 1]
            image = flow["image_tokens"][image_row : image_row + 1]
            rows.append(model.fusion_block_0(text, mask, image, torch.tensor([0])))
        return torch.cat(rows)

    own = list(range(B))
    images, texts = flow["negative_images"].tolist(), flow["negative_texts"].tolist()
    logits = model.matching_head(fuse("caption", own + own + texts, own + images + own))
    labels, ones = torch.tensor([1] * B + [0] * 2 * B), torch.ones_like(flow["negatives_valid"])
    valid = torch.cat([ones, flow["negatives_valid"], flow["negatives_valid"]])
    torch.testing.assert_close(flow["loss/matching"], matching_loss(logits, labels, valid)[0])
    loss, _ = model.masked_lm_head(fuse("masked", own, own), batch["masked_positions"], batch["masked_targets"])
    torch.testing.assert_close(flow["loss/masked_lm"], loss)


def test_padding_changes_nothing():
    model = build(tiny_config()).eval()
    batch = batch_of(torch.arange(8))
    reference = model(batch)
    model.text_embed.token.weight.data[VOCABULARY.pad] += 5
    torch.testing.assert_close(model(batch).figures, reference.figures)


@pytest.mark.parametrize(
    ("time", "doc", "visible"),
    [
        ([0, 0, 0, 0], [0, 0, 0, -1], ["1110"] * 4),  # bidirectional, the last one padding
        ([0, 1, 2, 3], [0, 0, 0, 0], ["1000", "1100", "1110", "1111"]),  # causal
        ([0, 0, 1, 2], [0, 0, 0, 0], ["1100", "1100", "1110", "1111"]),  # a prefix, then causal
        ([0, 1, 0, 1], [0, 0, 1, 1], ["1000", "1100", "0010", "0011"]),  # two captions packed into one row
    ],
)
def test_what_a_token_sees_follows_from_its_document_and_its_time(time, doc, visible):
    found = sees(torch.tensor([doc]), torch.tensor([time]))[0, 0]
    used = torch.tensor(doc) >= 0
    for row, expected, is_used in zip(found, visible, used, strict=True):
        assert not is_used or "".join(str(int(bit)) for bit in row) == expected


def test_the_fast_paths_are_the_general_mask():
    torch.manual_seed(0)
    x, used = torch.randn(3, 5, 8), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    both, causal = SelfAttention(8, 2), SelfAttention(8, 2, causal=True)
    doc, place = torch.where(used, 0, -1), torch.arange(5).expand(3, 5)
    full = both(x, sees(doc, 0 * place))
    torch.testing.assert_close(both(x, padding_mask(used))[used], full[used])
    torch.testing.assert_close(causal(x)[used], causal(x, sees(doc, place))[used])


def test_initial_weights_follow_from_seed_and_name_alone():
    one, two, other = (build(tiny_config(**changes)) for changes in ({}, {"model__embed": 32}, {"seed": 1}))
    same = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        if not name.startswith(("image_project", "text_project")):
            assert torch.equal(parameter, same[name]), name
    assert not torch.equal(one.image_embed.project.weight, other.image_embed.project.weight)
    assert one.temperature.log_scale.shape == (1,)
    assert torch.allclose(one.temperature.log_scale.exp(), torch.tensor([1 / 0.07]))


def test_only_the_sigmoid_loss_has_a_bias_and_it_starts_far_below_zero():
    assert [name for name, _ in build(tiny_config()).temperature.named_parameters()] == ["log_scale"]
    assert build(tiny_config(**SIGMOID)).temperature.bias.tolist() == [-10.0]


def test_negatives_do_not_depend_on_how_the_batch_is_cut():
    """The same pools in a batch of 16 or in two of 8."""
    model = build(tiny_config()).eval()

    def images_of_negatives(positions):
        found = model.run(["negative_images"], batch_of(positions))["negative_images"]
        return positions[found].tolist()

    whole = images_of_negatives(torch.arange(16))
    assert whole == images_of_negatives(torch.arange(8)) + images_of_negatives(torch.arange(8, 16))
    assert images_of_negatives(torch.arange(16, 32)) != [row + 16 for row in whole]  # noise follows the position

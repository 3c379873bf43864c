"""Models are lists of layers; one pass serves every objective; initial weights follow from names."""

import pytest
import torch

from distributed.tiny import PAD, VOCABULARY, samples, tiny_config
from pretrain.models.architectures import layer_specs
from pretrain.models.model import build_model
from pretrain.objectives.masked_lm import masked_lm_loss
from pretrain.objectives.matching import matching_loss

DUAL = {
    "model__architecture": "dual_encoder",
    "model__fusion": None,
    "objectives__matching": None,
    "objectives__masked_lm": None,
}


def build(**changes):
    config = tiny_config(**changes)
    return build_model(layer_specs(config, VOCABULARY), config, PAD, torch.device("cpu"))


def record_flows(model):
    """The flow that leaves each layer, by the layer's name."""
    flows = {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda _, __, flow, name=name: flows.__setitem__(name, flow))
    return flows


SIGMOID = {"objectives__contrastive__loss": "sigmoid"}


@pytest.mark.parametrize(
    "changes",
    [{}, DUAL, SIGMOID, {**DUAL, **SIGMOID}, {"objectives__matching": None}, {"objectives__masked_lm": None}],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes):
    model = build(**changes)
    model(**samples(torch.arange(8)).tensors()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_dual_encoder_is_the_towers_of_the_other_list():
    fused, dual = (layer_specs(tiny_config(**changes), VOCABULARY) for changes in ({}, DUAL))
    shared = [spec.name for spec in dual if spec.name != "align" and not spec.name.startswith("text_block")]
    assert [spec.name for spec in fused if spec.name in shared] == shared
    assert dual[-1].name == "align"


def test_one_pass_equals_one_pass_an_objective():
    """Matching and masked-LM losses of the 4B-row pass, computed again in separate passes over plain rows."""
    model = build().eval()
    flows = record_flows(model)
    batch = samples(torch.arange(8))
    output = model(**batch.tensors())
    B = 8
    after_text, aligned = flows["text_block_0"], flows["align"]
    image = flows["image_norm"].image

    def fuse(text_rows, image_rows):
        """Each pair by itself: its own image, its own row."""
        rows = []
        for text_row, image_row in zip(text_rows, image_rows, strict=True):
            text, mask = after_text.text[text_row : text_row + 1], after_text.text_mask[text_row : text_row + 1]
            for name, layer in model.named_children():
                if name.startswith("fusion_block"):
                    text = layer.transform(text, mask, image[image_row : image_row + 1], torch.tensor([0]))
            rows.append(text)
        return torch.cat(rows)

    image_rows = aligned.image_rows.tolist()
    own = list(range(B))
    negative_texts = [  # which clean caption stands in block 2
        next(j for j in own if torch.equal(aligned.text[2 * B + i], after_text.text[j])) for i in own
    ]
    assert image_rows[:B] == image_rows[2 * B : 3 * B] == image_rows[3 * B :] == own
    matched = fuse(own + own + negative_texts, own + image_rows[B : 2 * B] + own)
    loss, _ = matching_loss(model.matching_head.logits(matched), aligned.negatives_valid.bool())
    torch.testing.assert_close(output.losses[1], loss)
    masked = fuse([B + i for i in own], own)
    loss, _ = masked_lm_loss(model.masked_lm_head.logits(masked, aligned.masked_positions), aligned.masked_targets)
    torch.testing.assert_close(output.losses[2], loss)


def test_padding_changes_nothing():
    model = build().eval()
    batch = samples(torch.arange(8))
    reference = model(**batch.tensors())
    model.text_embed.token.weight.data[PAD] += 5
    changed = model(**batch.tensors())
    torch.testing.assert_close(changed.losses, reference.losses)


def test_initial_weights_follow_from_seed_and_name_alone():
    one, two, other = build(), build(model__embed=32), build(seed=1)
    same = dict(two.named_parameters())
    for name, parameter in one.named_parameters():
        if "project" not in name or "image_embed" in name:
            assert torch.equal(parameter, same[name]), name
    assert not torch.equal(one.image_embed.project.weight, other.image_embed.project.weight)
    assert one.align.temperature.log_scale.shape == (1,)
    assert torch.allclose(one.align.temperature.log_scale.exp(), torch.tensor([1 / 0.07]))


def test_only_the_sigmoid_loss_has_a_bias_and_it_starts_far_below_zero():
    assert build().align.temperature.bias is None
    assert build(objectives__contrastive__loss="sigmoid").align.temperature.bias.tolist() == [-10.0]


def test_negatives_do_not_depend_on_how_the_batch_is_cut():
    """The same pools in a batch of 16 or in two of 8."""
    model = build().eval()
    flows = record_flows(model)

    def images_of_negatives(positions):
        model(**samples(positions).tensors())
        B = len(positions)
        return positions[flows["align"].image_rows[B : 2 * B]].tolist()

    whole = images_of_negatives(torch.arange(16))
    assert whole == images_of_negatives(torch.arange(8)) + images_of_negatives(torch.arange(8, 16))
    assert images_of_negatives(torch.arange(16, 32)) != [row + 16 for row in whole]  # noise follows the position

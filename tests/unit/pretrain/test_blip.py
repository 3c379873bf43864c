"""BLIP: one pass over [text; encoder; decoder] rows is the passes of the paper, each of which runs no other's rows."""

import ast
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.tiny import BLIP, GRAIN, VOCABULARY, build, run_each, tiny_config
from pretrain.errors import ConfigError
from pretrain.models import blip
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import Flow, Groups, leading_to
from pretrain.models.model import Model
from pretrain.objectives.contrastive import Identity
from pretrain.objectives.matching import mine_hard_negatives
from pretrain.parallel.first_pass import evaluate, prepare
from pretrain.parallel.mesh import ALONE
from pretrain.synthetic import made_up_batch

B = 8
ENC, DEC = VOCABULARY.size, VOCABULARY.size + 1


def model_and_batch(**changes) -> tuple[Model, Flow]:
    """A batch with all that its training pass is given."""
    config = tiny_config(**BLIP, **changes)
    model = build(config).eval()
    batch = made_up_batch(config, VOCABULARY, torch.arange(B))
    ((have, _),) = prepare(model, [batch], ALONE, partial(run_each, model))
    return model, have


def without_padding(padded: Tensor) -> Tensor:
    return padded[padded != VOCABULARY.pad]


def run_text(model: Model, ids: Tensor, attend: Callable, image: Tensor | None = None) -> Tensor:
    """One caption, (L,) without padding, through the stack; it looks at (P, D) patches, if at any -> (1, L, D)."""
    x = (model.text_embed.token(ids) + model.text_embed.position[: len(ids)])[None]
    for number in range(2):
        block = model.get_submodule(f"med_block_{number}")
        x = x + attend(block, x)
        if image is not None:
            x = x + block.cross(block.cross_norm(x), image[None])
        x = x + block.mlp(block.mlp_norm(x))
    return x


def bidirectional(block, x: Tensor) -> Tensor:
    return block.encoder_attention(block.encoder_norm(x))


def causal(block, x: Tensor) -> Tensor:
    own = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    return block.decoder_attention(block.decoder_norm(x), own[None, None])


def read(model: Model, padded: Tensor) -> Tensor:
    return run_text(model, without_padding(padded), bidirectional)


def judge(model: Model, padded: Tensor, image: Tensor) -> Tensor:
    """(L,), (P, D) -> (1, 2) logits."""
    ids = torch.cat([torch.tensor([ENC]), without_padding(padded)[1:]])
    return model.matching_head(run_text(model, ids, bidirectional, image))


def write(model: Model, padded: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """(L,), (P, D) -> (L - 1, V) logits and what they should name."""
    ids = without_padding(padded)
    given = torch.cat([torch.tensor([DEC]), ids[1:-1]])
    return model.caption_head(run_text(model, given, causal, image))[0], ids[1:]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pass_equals_one_pass_per_objective(smoothing):
    """Images by themselves; captions by themselves, without padding: read, judged with an image, and written."""
    model, have = model_and_batch(objectives__captioning={"label_smoothing": smoothing})
    flow = model.run(["loss/contrastive", "loss/matching", "loss/captioning", "image_tokens"], have)
    patches, text = flow["image_tokens"], have["text"]
    images = model.image_project(patches)
    texts = torch.cat([model.text_project(read(model, row)) for row in text])
    identity = Identity(have["image_ids"], have["caption_ids"])
    logits = images @ texts.T / 0.07
    logits = logits.masked_fill(identity.same(identity) & ~torch.eye(B).bool(), -math.inf)
    own = torch.arange(B)
    contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(flow["loss/contrastive"], contrastive)

    scale = torch.tensor([1 / 0.07]).log()
    found = mine_hard_negatives(images, texts, scale, identity, have["positions"], GRAIN, seed=0)
    losses = []
    for i in range(B):
        kinds = [(i, i, 1, 1)]
        kinds += [(i, found.image_rows[i], 0, found.valid[i]), (found.text_rows[i], i, 0, found.valid[i])]
        for caption, image, label, valid in kinds:
            logits = judge(model, text[caption], patches[image])
            losses.append(F.cross_entropy(logits, torch.tensor([label])) * valid)
    torch.testing.assert_close(flow["loss/matching"], torch.stack(losses).mean())

    written = [write(model, text[i], patches[i]) for i in range(B)]
    tokens = [F.cross_entropy(*each, reduction="none", label_smoothing=smoothing) for each in written]
    torch.testing.assert_close(flow["loss/captioning"], torch.cat(tokens).mean())


def test_negatives_of_the_first_pass_are_those_of_the_training_pass():
    """Were pairs known in another way, a single pass over all rows would find the same negatives at its end."""
    model, have = model_and_batch()
    negatives = ("negative_images", "negative_texts", "negatives_valid")
    batch = {name: tensor for name, tensor in have.items() if name not in negatives}
    batch |= {"pairs/text": have["text"].repeat(3, 1), "pairs/image": torch.zeros(3 * B).long()}
    found = model.run([*negatives, "match_logits", "caption_logits"], batch)
    for name in negatives:
        assert torch.equal(have[name], found[name])
    assert have["negatives_valid"].all()


@pytest.mark.parametrize(
    ("want", "have", "kinds", "never"),
    [
        (["negative_images"], {"images", "text"}, {"text"}, {"see", "pair_up", "matching_head", "caption_head"}),
        (["text_embeddings"], {"text"}, {"text"}, {"image_embed", "see", "pair_up"}),
        (["match_logits"], {"seen", "pairs/image", "pairs/text"}, {"encoder"}, {"see", "image_embed", "text_project"}),
        (["caption_logits"], {"image_tokens", "text"}, {"decoder"}, {"image_embed", "pair_up", "mining"}),
        (["loss/captioning"], {"images", "text"}, {"decoder"}, {"pair_up", "mining", "text_project"}),
    ],
)
@pytest.mark.parametrize("pool", [GRAIN, 2 * GRAIN])  # on one rank, on several
def test_rows_that_a_pass_does_not_need_do_not_run(want, have, kinds, never, pool):
    ranks: Any = object()
    config = tiny_config(**BLIP, objectives__matching__pool=pool)
    architecture = architecture_of(config, VOCABULARY, Groups(samples=ranks))
    have |= {"positions", "image_ids", "caption_ids", "targets/captioning"}
    calls = leading_to(architecture.layers, want, have)
    assert {kind for call in calls for kind in call.kinds} == kinds
    assert not never & {call.layer.name for call in calls}
    made = {name for call in calls for name in call.layer.writes}
    assert {name for call in calls for name in call.reads} <= have | made


def test_captions_are_written_and_pairs_judged_by_their_own_rows_alone():
    model, have = model_and_batch()
    with torch.no_grad():
        patches = model.run(["image_tokens"], have)["image_tokens"]
        some = {"seen": patches, "pairs/image": torch.tensor([3, 0]), "pairs/text": have["text"][[1, 0]]}
        logits = model.run(["match_logits"], some)["match_logits"]
        for row, (text, image) in zip(logits, [(1, 3), (0, 0)], strict=True):
            torch.testing.assert_close(row[None], judge(model, have["text"][text], patches[image]))
        some = {"image_tokens": patches[:2], "text": have["text"][:2]}
        for row, text, image in zip(model.run(["caption_logits"], some)["caption_logits"], *some.values(), strict=True):
            expected, asked = write(model, image, text)
            torch.testing.assert_close(row[: len(asked)], expected)


def test_captions_need_no_first_pass():
    model, have = model_and_batch()
    batch = {name: have[name] for name in ("images", "text")}
    passes = []

    def run(want, batches):
        passes.append(set(want))
        return run_each(model, want, batches)

    evaluate(model, ["counts/captioning"], [batch], run)
    assert passes == [{"counts/captioning"}]


def test_a_later_token_never_changes_an_earlier_logit():
    model, have = model_and_batch()
    reference = model.run(["caption_logits"], have)["caption_logits"]
    for place in range(1, 12):
        text = have["text"].clone()
        text[:, place] = 7 + (text[:, place] == 7).long()
        changed = model.run(["caption_logits"], have | {"text": text})["caption_logits"]
        torch.testing.assert_close(changed[:, :place], reference[:, :place], rtol=0, atol=1e-6)
        assert not torch.isclose(changed[:, place], reference[:, place]).all(dim=1).any()


def test_padding_changes_nothing():
    model, have = model_and_batch()
    reference = model(have)
    model.text_embed.token.weight.data[VOCABULARY.pad] += 5
    torch.testing.assert_close(model(have).figures, reference.figures)


def test_an_image_is_projected_once_however_many_rows_look_at_it():
    model, have = model_and_batch()
    rows = []
    model.med_block_0.cross.key_value.register_forward_hook(lambda _, read, __: rows.append(len(read[0])))
    model.med_block_0.cross.query.register_forward_hook(lambda _, read, __: rows.append(len(read[0])))
    model(have)
    assert sorted(rows) == [B, 4 * B]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objectives__matching": None},
        {"objectives__captioning": None},
        {"objectives__matching": None, "objectives__captioning": None},
        {"objectives__contrastive__negatives": "global_batch"},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(changes):
    model, have = model_and_batch(**changes)
    model(have).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_encoder_and_decoder_differ_in_self_attention_alone():
    names = {name.partition(".")[2] for name, _ in build(tiny_config(**BLIP)).named_parameters() if "med_block" in name}
    parts = {name.rpartition(".")[0] for name in names}
    attention = {
        f"{kind}_{part}" for kind in ("encoder", "decoder") for part in ("norm", "attention.qkv", "attention.out")
    }
    cross = {"cross_norm", "cross.query", "cross.key_value", "cross.out"}
    assert parts == attention | cross | {"mlp_norm", "mlp.up", "mlp.down"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives__contrastive": None}, "model.architecture blip: its embeddings need objectives.contrastive"),
        (
            {"objectives__masked_lm": {}},
            "model.architecture blip has no objectives.masked_lm: set objectives.masked_lm=null",
        ),
        ({"model__fusion": {"depth": 1, "heads": 2}}, "model.architecture blip has no model.fusion: remove it"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        architecture_of(tiny_config(**(BLIP | changes)), VOCABULARY)
    assert message in str(caught.value)


def test_the_pages_example_is_the_model():
    """docs/architecture.md builds layers of BLIP; its code runs here, and its layers are the model's."""
    page = (Path(__file__).parents[3] / "docs/architecture.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.partition("## How to add an architecture")[2], flags=re.DOTALL)
    config = tiny_config(**BLIP)
    model = {layer.name: layer for layer in architecture_of(config, VOCABULARY).layers}
    names = vars(blip) | {"config": config, "objectives": config.objectives, "groups": Groups(), "block": None}
    shown = []
    for statement in ast.parse("".join(blocks)).body:
        if isinstance(statement, ast.Expr):
            shown.append(eval(compile(ast.Expression(statement.value), "page", "eval"), names))
        else:
            exec(compile(ast.Module([statement], []), "page", "exec"), names)
    assert [layer.name for layer in shown] == ["join_med", "split_med", "med_block_0", "mining"]
    for layer in shown:
        assert layer._replace(build=None) == model[layer.name]._replace(build=None)

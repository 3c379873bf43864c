"""CoCa: one pass over each caption is the two passes of the paper, and no token learns what it must not know."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.demo.scenes import draw_scene, picture_of
from distributed.tiny import VOCABULARY, build, tiny_config
from pretrain.captioning import look, same_captions, write_captions
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of
from pretrain.models.model import Model
from pretrain.objectives.captioning import count_targets
from pretrain.synthetic import made_up_batch

COCA = {
    "model__architecture": "coca",
    "model__text__depth": 2,
    "model__decoder": {"depth": 2, "heads": 2, "queries": 3},
}
B = 8


def model_and_batch(**changes) -> tuple[Model, dict[str, Tensor]]:
    config = tiny_config(**COCA, **changes)
    batch = made_up_batch(config, VOCABULARY, torch.arange(B))
    return build(config).eval(), batch | {"targets/captioning": count_targets(batch["text"], 0).reshape(1).float()}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """One image or caption: (L, D), (S, D), (S, D), (L, S) bool -> (L, D), head by head."""
    parts = []
    for q_head, k_head, v_head in zip(*(x.chunk(heads, dim=1) for x in (q, k, v)), strict=True):
        scores = q_head @ k_head.T / math.sqrt(q_head.shape[1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        parts.append(scores.softmax(dim=1) @ v_head)
    return torch.cat(parts, dim=1)


def by_head(projected: Tensor, heads: int, parts: int) -> list[Tensor]:
    """A joint projection holds of each head all its parts: (L, parts D) -> parts of (L, D)."""
    split = projected.view(len(projected), heads, parts, -1)
    return [split[:, :, part].flatten(1) for part in range(parts)]


def cross(module, x: Tensor, memory: Tensor) -> Tensor:
    return module.out(attend(module.query(x), *by_head(module.key_value(memory), 2, 2), heads=2))


def block(module, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
    """A pre-norm block over one image or caption."""
    attention = module.attention
    x = x + attention.out(attend(*by_head(attention.qkv(module.attention_norm(x)), 2, 3), heads=2, mask=mask))
    if memory is not None:
        x = x + cross(module.cross, module.cross_norm(x), memory)
    return x + module.mlp(module.mlp_norm(x))


def pool(module, tokens: Tensor) -> Tensor:
    return module.norm(cross(module.cross, module.query_norm(module.query), tokens))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_pass_equals_one_pass_per_objective(smoothing):
    """Each image and each caption by itself, without padding; the caption once with [CLS] and once without."""
    model, batch = model_and_batch(objectives__captioning={"label_smoothing": smoothing})
    flow = model.run(["loss/contrastive", "loss/captioning", "image_embeddings", "text_embeddings"], batch)
    images, texts, token_losses = [], [], []
    for pixels, padded in zip(batch["images"], batch["text"], strict=True):
        patches = model.image_embed(pixels[None])[0]
        for number in range(2):
            patches = block(model.get_submodule(f"image_block_{number}"), patches)
        seen = pool(model.pool_caption, model.image_norm(patches))
        images.append(F.normalize(model.image_project.project(pool(model.pool_contrast, seen)), dim=1))

        ids = padded[padded != VOCABULARY.pad]
        row = torch.cat(
            [model.text_embed.token(ids) + model.text_embed.position[: len(ids)], model.text_embed.class_token]
        )
        for number in range(2):
            row = block(model.get_submodule(f"text_block_{number}"), row, torch.ones(len(row), len(row)).tril().bool())
        texts.append(F.normalize(model.text_project.project(model.text_project.norm(row[-1:])), dim=1))

        given, asked = ids[:-1], ids[1:]
        causal = torch.ones(len(given), len(given)).tril().bool()
        row = model.text_embed.token(given) + model.text_embed.position[: len(given)]
        for number in range(2):
            row = block(model.get_submodule(f"text_block_{number}"), row, causal)
        for number in range(2):
            row = block(model.get_submodule(f"decoder_block_{number}"), row, causal, seen)
        logits = model.caption_head.decode(model.caption_head.norm(row))
        token_losses.append(F.cross_entropy(logits, asked, reduction="none", label_smoothing=smoothing))

    torch.testing.assert_close(flow["image_embeddings"], torch.cat(images))
    torch.testing.assert_close(flow["text_embeddings"], torch.cat(texts))
    logits = torch.cat(images) @ torch.cat(texts).T / 0.07
    same = batch["image_ids"][:, None] == batch["image_ids"][None]
    logits = logits.masked_fill(same & ~torch.eye(B).bool(), -math.inf)
    own = torch.arange(B)
    contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(flow["loss/contrastive"], contrastive)
    torch.testing.assert_close(flow["loss/captioning"], torch.cat(token_losses).mean())


def test_no_token_sees_cls():
    model, batch = model_and_batch()
    before = model.run(["caption_logits", "text_embeddings"], batch)
    model.text_embed.class_token.data.mul_(2).add_(torch.arange(32) % 2)
    after = model.run(["caption_logits", "text_embeddings"], batch)
    assert torch.equal(before["caption_logits"], after["caption_logits"])
    assert not torch.isclose(before["text_embeddings"], after["text_embeddings"]).all(dim=1).any()


def test_cls_sees_all_tokens_of_its_caption_and_nothing_else():
    model, batch = model_and_batch()
    tokens, mask = model.text_embed(batch["text"])
    tokens = tokens.detach().requires_grad_()
    flow = model.run(["text_embeddings"], batch, stand_ins={"text_embed": lambda _: (tokens, mask)})
    used = F.pad(batch["text"] != VOCABULARY.pad, (0, 1), value=True)  # (B, L + 1), [CLS] behind the caption
    for row, embedding in enumerate(flow["text_embeddings"]):
        (gradient,) = torch.autograd.grad(embedding[0], tokens, retain_graph=True)
        has_say = gradient.abs().sum(dim=2) > 0
        assert torch.equal(has_say[row], used[row])
        assert has_say.sum() == used[row].sum()


def test_a_later_token_never_changes_an_earlier_logit():
    model, batch = model_and_batch()
    reference = model.run(["caption_logits"], batch)["caption_logits"]
    for place in range(1, 12):
        text = batch["text"].clone()
        text[:, place] = 7 + (text[:, place] == 7).long()  # padding, too: then a longer caption begins the same
        changed = model.run(["caption_logits"], batch | {"text": text})["caption_logits"]
        torch.testing.assert_close(changed[:, :place], reference[:, :place], rtol=0, atol=1e-6)
        assert not torch.isclose(changed[:, place], reference[:, place]).all(dim=1).any()


@pytest.mark.parametrize("used", [2, 3, 8, 12])
def test_padding_changes_nothing(used):
    """[CLS] [SEP] alone, up to a caption that fills its row."""
    model, batch = model_and_batch()
    text = torch.where(torch.arange(12) < used, 5 + (batch["text"] + torch.arange(12)) % 50, VOCABULARY.pad)
    batch |= {"text": text, "targets/captioning": torch.tensor([float(B * (used - 1))])}
    padded, bare = model(batch), model(batch | {"text": text[:, :used]})
    torch.testing.assert_close(padded.figures, bare.figures)
    assert torch.equal(padded.counts, bare.counts)
    model.text_embed.token.weight.data[VOCABULARY.pad] += 5
    torch.testing.assert_close(model(batch).figures, padded.figures)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_every_parameter_gets_a_gradient(loss):
    model, batch = model_and_batch(objectives__contrastive={"loss": loss})
    model(batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objectives__contrastive": None},
            "model.architecture coca: its embeddings need objectives.contrastive, which is off: switch it on.",
        ),
        (
            {"objectives__captioning": None},
            "model.architecture coca: layer decoder_block_0 leads to no loss, so that nothing would train it: the "
            "objectives that are on are contrastive",
        ),
        ({"model__decoder": None}, "model.architecture coca needs model.decoder: remove `null`"),
        (
            {"objectives__masked_lm": {}},
            "model.architecture coca has no objectives.masked_lm: set objectives.masked_lm=null",
        ),
        ({"model__decoder": {"depth": 1, "heads": 5, "queries": 3}}, "model.decoder.heads 5 does not divide the width"),
        ({"engine__tensor_parallel": 4}, "engine.tensor_parallel 4 does not divide model."),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        architecture_of(tiny_config(**(COCA | changes)), VOCABULARY)
    assert message in str(caught.value)


def test_both_objectives_learn_and_captions_can_be_read_off_drawings_again():
    number, side, rows = 24, 32, []
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pictures = torch.empty(number, 3, side, side, dtype=torch.uint8)
    for index in range(number):
        scene, draws = draw_scene(heldout=False, seed=0, index=index)
        pictures[index] = torch.from_numpy(np.array(picture_of(scene, draws, side))).permute(2, 0, 1)
        caption = [*scene.subject, scene.relation, *scene.object]
        caption = caption[: 3 if scene.relation in ("above", "below") else 7]
        words += [word for word in dict.fromkeys(caption) if word not in words]
        rows.append([2, *map(words.index, caption), 3, *[0] * (7 - len(caption))])
    text, ids = torch.tensor(rows), torch.arange(number)
    batch = {"images": pictures, "text": text, "image_ids": ids, "caption_ids": ids, "positions": ids}
    batch["targets/captioning"] = count_targets(text, 0).reshape(1).float()
    shape = {"model__image__size": side, "model__text__length": 9, "model__decoder__queries": 8}
    config = tiny_config(**(COCA | shape))
    model = build(config, VOCABULARY._replace(size=len(words)))
    steps, optimizer = 80, torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min((step + 1) / 10, 1 - step / steps)
        model(batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    report = model(batch)
    assert report.figures.max() < 0.1
    assert torch.equal(report.counts[:, 0], report.counts[:, 1])
    seen = look(model.run, model.architecture, pictures)
    for beams in (1, 3):
        written = write_captions(model.run, seen, vocabulary=len(words), cls=2, sep=3, pad=0, length=9, beams=beams)
        assert same_captions(written, text).all()

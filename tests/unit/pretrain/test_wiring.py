"""What follows from the names that layers read and write, and what is refused when they do not hang together."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distributed.tiny import VOCABULARY, build, tiny_config
from pretrain.errors import ConfigError
from pretrain.models.architectures import architecture_of
from pretrain.models.layer import (
    Architecture,
    Layer,
    Objective,
    Rows,
    Spans,
    WiringError,
    check,
    join,
    leading_to,
    split,
)
from pretrain.models.model import Model
from pretrain.synthetic import made_up_batch

COLUMNS = ("images", "text", "masked_text")


class Plus(nn.Module):
    """Adds up what it reads, and 1; as many times as it writes."""

    def __init__(self, writes: int = 1) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, *reads: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        total = torch.stack([read.float() for read in reads]).sum(dim=0) + 1
        return total if self.writes == 1 else (total,) * self.writes


def layer(name: str, reads: str, writes: str, **more) -> Layer:
    names = tuple(writes.split())
    return Layer(name, partial(Plus, len(names)), tuple(reads.split()), names, **more)


def loss(name: str, reads: str) -> Layer:
    return layer(f"{name}_head", reads, f"loss/{name} counts/{name}")


TOWERS = [
    layer("image_embed", "images", "image"),
    layer("image_block", "image", "image"),
    layer("image_end", "image", "image_tokens"),
    layer("text_embed", "text", "words"),
    layer("text_end", "words", "text_tokens"),
    loss("contrastive", "image_tokens text_tokens"),
    layer("fuse", "image_tokens text_tokens", "fused"),
    loss("matching", "fused"),
]
OBJECTIVES = [Objective("contrastive", 1.0), Objective("matching", 1.0)]


def names(calls) -> list[str]:
    return [call.layer.name for call in calls]


def test_only_what_leads_to_the_wanted_names_runs():
    assert names(leading_to(TOWERS, ["image_tokens"], COLUMNS)) == ["image_embed", "image_block", "image_end"]
    assert names(leading_to(TOWERS, ["loss/contrastive"], COLUMNS)) == names_of(TOWERS[:6])
    assert names(leading_to(TOWERS, [], COLUMNS)) == []


def names_of(layers) -> list[str]:
    return [each.name for each in layers]


def test_what_is_brought_is_not_made_again():
    have = {*COLUMNS, "image_tokens", "text_tokens"}
    assert names(leading_to(TOWERS, ["fused"], have)) == ["fuse"]
    assert names(leading_to(TOWERS, ["image_tokens"], have)) == []


def test_after_each_layer_there_is_what_later_ones_read_or_the_caller_wants():
    calls = leading_to(TOWERS, ["loss/matching", "image_tokens"], COLUMNS)
    after = {call.layer.name: set(call.after) for call in calls}
    assert after["image_embed"] == {"image"}
    assert after["image_end"] == {"image_tokens"}
    assert after["text_end"] == {"image_tokens", "text_tokens"}
    assert after["fuse"] == {"image_tokens", "fused"}


ROWS = Rows("text", {"clean": 1, "masked": 2})
STACKED = [
    join(ROWS, ("ids",), clean=("text",), masked=("masked_text",)),
    layer("embed", "ids", "rows"),
    split(ROWS, ("rows",), clean=("clean_rows",), masked=("masked_rows",)),
    loss("contrastive", "clean_rows"),
    loss("matching", "masked_rows"),
]


def stacked() -> Model:
    architecture = Architecture(STACKED, OBJECTIVES)
    return Model(architecture, {each.name: each.build() for each in STACKED})


def test_rows_of_several_kinds_run_once_and_come_apart_under_their_names():
    have = {"text": torch.zeros(2, 3), "masked_text": torch.ones(4, 3)}
    flow = stacked().run(["clean_rows", "masked_rows"], have)
    assert torch.equal(flow["clean_rows"], torch.full((2, 3), 1.0))
    assert torch.equal(flow["masked_rows"], torch.full((4, 3), 2.0))


@pytest.mark.parametrize(
    ("want", "reads", "rows"),
    [("clean_rows", {"text"}, 2), ("masked_rows", {"masked_text"}, 4), ("loss/matching", {"masked_text"}, 4)],
)
def test_only_the_kinds_of_rows_that_something_wanted_is_made_of_run(want, reads, rows):
    calls = leading_to(STACKED, [want], COLUMNS)
    assert calls[0].reads == reads
    model, seen = stacked(), []
    model.embed.register_forward_hook(lambda module, inputs, made: seen.append(len(made)))
    model.run([want], {"text": torch.zeros(2, 3), "masked_text": torch.ones(4, 3)} if rows else {})
    assert seen == [rows]


def test_a_kind_that_nothing_wants_need_not_be_there():
    flow = stacked().run(["clean_rows"], {"text": torch.zeros(5, 3)})
    assert len(flow["clean_rows"]) == 5


class Looks(nn.Module):
    """Adds what it looks at, if it does."""

    def forward(self, rows: Tensor, image: Tensor | None = None, *, spans: Spans) -> Tensor:
        return rows if image is None else rows + image.repeat(len(rows), 1)


LOOKING = [
    *STACKED[:2],
    Layer("look", Looks, ("rows", "image"), ("rows",), rows=ROWS, only={"image": ("masked",)}),
    *STACKED[2:],
]


@pytest.mark.parametrize(
    ("want", "reads", "first"),
    [("clean_rows", {"text"}, 1.0), ("masked_rows", {"masked_text", "image"}, 7.0)],
)
def test_what_only_some_kinds_of_rows_read_is_left_out_without_them(want, reads, first):
    architecture = Architecture(LOOKING, OBJECTIVES)
    check(architecture, [*COLUMNS, "image"])
    assert {name for call in leading_to(LOOKING, [want], COLUMNS) for name in call.reads} - {"ids", "rows"} == reads
    have = {"text": torch.zeros(2, 3), "masked_text": torch.ones(4, 3), "image": torch.full((1, 3), 5.0)}
    model = Model(architecture, {each.name: each.build() for each in LOOKING})
    assert model.run([want], {name: have[name] for name in reads})[want][0, 0] == first


def test_what_may_be_left_out_is_read_last():
    wrong = [each._replace(reads=each.reads[::-1]) if each.name == "look" else each for each in LOOKING]
    with pytest.raises(AssertionError):
        check(Architecture(wrong, OBJECTIVES), [*COLUMNS, "image"])


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (
            [*TOWERS[:4], layer("text_end", "word", "text_tokens"), *TOWERS[5:]],
            "layer text_end reads word, which no layer writes and no column of the data brings; the nearest name that "
            "there is is words",
        ),
        (
            [TOWERS[6], *TOWERS[:6], TOWERS[7]],
            "layer fuse reads image_tokens, which image_end writes only behind it: move it",
        ),
        ([*TOWERS[:7], layer("matching_head", "fused", "text")], "layer matching_head writes text, which a column"),
        (TOWERS[:7], "objectives.matching is on, and no layer writes loss/matching"),
        ([*TOWERS, layer("extra", "fused", "more")], "layer extra leads to no loss, so that nothing would train it: "),
    ],
)
def test_what_does_not_hang_together_is_refused_in_a_sentence(layers, sentence):
    check(Architecture(TOWERS, OBJECTIVES), COLUMNS)
    reports = [each for each in layers if each.name == "matching_head" and "text" in each.writes]
    objectives = OBJECTIVES[:1] if reports else OBJECTIVES
    with pytest.raises(WiringError) as found:
        check(Architecture([*layers, *([loss("late", "text")] if reports else [])], objectives), COLUMNS)
    assert sentence in str(found.value)


def test_layers_that_no_objective_trains_are_named_with_what_is_on():
    config = tiny_config(objectives__matching=None, objectives__masked_lm=None)
    with pytest.raises(ConfigError, match=r"model.architecture albef: layer fusion_block_0 leads to no loss.*contrast"):
        architecture_of(config, VOCABULARY)


def test_a_model_says_which_columns_it_reads():
    everything = {"images", "text", "positions", "image_ids", "caption_ids"}
    masks = {"masked_text", "masked_positions", "masked_targets"}
    assert architecture_of(tiny_config(), VOCABULARY).columns == everything | masks
    assert architecture_of(tiny_config(objectives__masked_lm=None), VOCABULARY).columns == everything
    clip = architecture_of(tiny_config(model__architecture="clip"), VOCABULARY)
    assert clip.columns == everything - {"positions"}


def test_masked_captions_alone_need_no_negatives():
    architecture = architecture_of(tiny_config(), VOCABULARY)
    assert "mining" not in names(leading_to(architecture.layers, ["loss/masked_lm"], architecture.columns))


def test_pairs_that_are_brought_are_matched_as_they_are():
    """Re-ranking: images and captions after their towers, in any combination."""
    model = build(tiny_config()).eval()
    batch = made_up_batch(tiny_config(), VOCABULARY, torch.arange(8))
    with torch.no_grad():
        whole = model.run(["match_logits"], batch)["match_logits"]
        sides = model.run(["image_tokens", "caption_tokens", "caption_mask"], batch)
        some = torch.tensor([3, 0])
        have = {
            "seen": sides["image_tokens"],
            "pairs/image": some,
            "pairs/caption_tokens": sides["caption_tokens"][some],
            "pairs/caption_mask": sides["caption_mask"][some],
        }
        torch.testing.assert_close(model.run(["match_logits"], have)["match_logits"], whole[some])

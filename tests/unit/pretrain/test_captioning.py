"""Captions are written as their definition says, on a model whose probabilities are known."""

import pytest
import torch

from distributed.tiny import BLIP, COCA, VOCABULARY, build, tiny_config
from pretrain.captioning import look, same_captions, write_captions
from pretrain.models.layer import Flow
from pretrain.objectives.cross_entropy import likeliest
from pretrain.synthetic import made_up_batch

PAD, SEP, CLS, V, LENGTH, IMAGES = 0, 1, 2, 5, 5, 6
MARKS = {"vocabulary": V, "cls": CLS, "sep": SEP, "pad": PAD, "length": LENGTH}


class Chain:
    """What comes next depends on the image, the place and the token before."""

    def __init__(self) -> None:
        self.table = torch.randn(IMAGES, LENGTH, V, V, generator=torch.Generator().manual_seed(0))
        self.seen = {"image_tokens": torch.arange(IMAGES)}
        self.shapes: list[torch.Size] = []

    def run(self, want, have: Flow) -> Flow:
        if "text" in have:
            self.shapes.append(have["text"].shape)
            image, place = have["image_tokens"][:, None], torch.arange(have["text"].shape[1])
            return {"decoded": self.table[image, place, have["text"]]}
        return {"caption_logits": have["decoded"]}

    def search(self, image: int, beams: int) -> list[int]:
        """Beam search in the plainest way: all that each caption could become, sorted; what fills its row ends."""
        logits = self.table[image].log_softmax(dim=2)
        found: list[tuple[float, list[int]]] = [(0.0, [CLS])]
        for place in range(1, LENGTH):
            longer = [item for item in found if SEP in item[1]]
            for score, caption in (item for item in found if SEP not in item[1]):
                tokens = range(V) if place < LENGTH - 1 else [SEP]
                longer += [(score + float(logits[place - 1, caption[-1], t]), [*caption, t]) for t in tokens]
            found = sorted(longer, reverse=True)[:beams]
        return padded(found[0][1])


def padded(caption: list[int]) -> list[int]:
    return [*caption, *[PAD] * (LENGTH - len(caption))]


@pytest.mark.parametrize("beams", range(1, V + 1))
def test_the_captions_are_those_of_a_plain_beam_search(beams):
    chain = Chain()
    expected = [chain.search(image, beams) for image in range(IMAGES)]
    assert write_captions(chain.run, chain.seen, beams=beams, **MARKS).tolist() == expected


def test_one_beam_takes_the_likeliest_token_each_time_until_the_end():
    chain = Chain()
    expected = []
    for image in range(IMAGES):
        caption = [CLS]
        while caption[-1] != SEP and len(caption) < LENGTH - 1:
            caption.append(int(chain.table[image, len(caption) - 1, caption[-1]].argmax()))
        expected.append(padded(caption if caption[-1] == SEP else [*caption, SEP]))
    assert write_captions(chain.run, chain.seen, beams=1, **MARKS).tolist() == expected
    assert len({len([t for t in row if t != PAD]) for row in expected}) > 1  # some end early, some are cut


@pytest.mark.parametrize("beams", [1, 3])
def test_the_number_of_passes_and_their_shapes_do_not_depend_on_what_is_written(beams):
    chain = Chain()
    write_captions(chain.run, chain.seen, beams=beams, **MARKS)
    assert chain.shapes == [(IMAGES * beams, length) for length in range(1, LENGTH)]


def test_the_likeliest_tokens_come_with_their_log_probabilities():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    values, ids = likeliest(logits, 4, 7)
    expected, places = logits.log_softmax(dim=1).topk(4)
    torch.testing.assert_close(values, expected)
    assert torch.equal(ids, places)


def test_captions_are_the_same_only_to_the_letter_and_to_the_end():
    text = torch.tensor([[CLS, 4, SEP, PAD], [CLS, 4, 3, SEP], [CLS, 4, SEP, PAD]])
    written = torch.tensor([[CLS, 4, SEP, PAD], [CLS, 4, SEP, PAD], [CLS, 3, SEP, PAD]])
    assert same_captions(written, text).tolist() == [True, False, False]


@pytest.mark.parametrize(("changes", "kept"), [(COCA, {"image_queries"}), (BLIP, {"seen"})])
def test_a_model_writes_a_batch_of_captions_as_it_would_write_each_by_itself(changes, kept):
    """The image tower runs once, and rows of a batch have nothing to do with each other."""
    config = tiny_config(**changes)
    model, batch = build(config).eval(), made_up_batch(config, VOCABULARY, torch.arange(4))
    seen = look(model.run, model.architecture, batch["images"])
    assert seen.keys() == kept
    written = write_captions(
        model.run, seen, vocabulary=VOCABULARY.size, cls=2, sep=3, pad=VOCABULARY.pad, length=12, beams=1
    )
    for image, row in zip(batch["images"], written, strict=True):
        tokens, ids = model.run(["image_tokens"], {"images": image[None]})["image_tokens"], [2]
        while ids[-1] != 3 and len(ids) < 11:
            have = {"image_tokens": tokens, "seen": tokens, "positions": torch.zeros(1).long()}
            logits = model.run(["caption_logits"], have | {"text": torch.tensor([ids])})["caption_logits"]
            ids.append(int(logits[0, -1].argmax()))
        ids += [3] if ids[-1] != 3 else []
        assert row.tolist() == ids + [0] * (12 - len(ids))

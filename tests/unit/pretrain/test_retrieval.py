"""Recall counts every identical caption as right, gives ties away to nobody, and knows its chance level."""

import pytest
import torch

from pretrain import retrieval
from pretrain.retrieval import Gallery, chance_recall, recall


def test_the_rank_of_the_best_relevant_candidate_decides():
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.3, 0.2, 0.1]])
    assert recall(similarity, torch.eye(3, dtype=torch.bool))[1] == pytest.approx(1 / 3)


def test_a_caption_identical_to_the_querys_own_is_right():
    relevant = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    similarity = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.0, 0.5]])
    assert recall(similarity, relevant)[1] == 1.0


def test_a_model_that_says_the_same_of_everything_scores_nothing():
    assert recall(torch.ones(20, 20), torch.eye(20, dtype=torch.bool)) == {1: 0.0, 5: 0.0, 10: 0.0}


def test_chance_is_what_a_random_order_scores():
    relevant = torch.arange(40)[:, None] % 13 == torch.arange(40)[None, :] % 13
    generator = torch.Generator().manual_seed(0)
    trials = [recall(torch.rand(40, 40, generator=generator), relevant) for _ in range(500)]
    for k, chance in chance_recall(relevant).items():
        assert sum(trial[k] for trial in trials) / 500 == pytest.approx(chance, abs=0.01)
    assert chance_recall(torch.eye(512, dtype=torch.bool))[1] == pytest.approx(1 / 512)


def scattered(pairs: int, images: int, captions: int, seed: int = 0):
    """Pairs of some images and captions with random embeddings: an image has several captions, some are said twice."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.randint(images, (pairs,), generator=generator) * 10**12
    caption_ids = torch.randint(captions, (pairs,), generator=generator) - 7
    by_image = torch.randn(images, 4, generator=generator)
    return by_image[image_ids // 10**12], torch.randn(pairs, 4, generator=generator), image_ids, caption_ids


def by_hand(queries, candidates, relevant) -> float:
    """Share of queries whose most similar candidate is relevant, one at a time."""
    hits = [relevant(q, int((candidates @ query).argmax())) for q, query in enumerate(queries)]
    return sum(hits) / len(hits)


def test_a_hit_is_any_of_an_images_captions_and_the_same_image_is_one_image():
    """The protocol of COCO, whose shards hold five pairs per image, or one sample with a list."""
    images, texts, image_ids, caption_ids = scattered(200, 40, 150)
    gallery = Gallery.of(images, texts, image_ids, caption_ids)
    assert len(gallery.images) == len(image_ids.unique()) < 200
    together = set(zip(gallery.image_of.tolist(), gallery.caption_of.tolist(), strict=True))
    image, caption = gallery.image_of.tolist(), gallery.caption_of.tolist()
    text_to_image = by_hand(texts, gallery.images, lambda text, found: (found, caption[text]) in together)
    image_to_text = by_hand(gallery.images, texts, lambda image, found: (image, caption[found]) in together)
    assert gallery.text_to_image()[1].value == pytest.approx(text_to_image)
    assert gallery.image_to_text()[1].value == pytest.approx(image_to_text)
    assert torch.equal(images[gallery.first_pair], gallery.images)
    assert image[int(gallery.first_pair[3])] == 3


def test_perfect_embeddings_of_five_captions_per_image_score_everything():
    image_ids = torch.arange(10).repeat_interleave(5)
    embeddings = torch.nn.functional.one_hot(image_ids).float()
    gallery = Gallery.of(embeddings, embeddings, image_ids, torch.arange(50))
    for recalls in (gallery.text_to_image(), gallery.image_to_text()):
        assert recalls[1].value == 1.0
    assert gallery.text_to_image()[1].chance == pytest.approx(1 / 10)
    assert gallery.image_to_text()[1].chance == pytest.approx(5 / 50)


@pytest.mark.parametrize("limit", [1, 700, 10**9])
def test_many_pairs_are_ranked_some_at_a_time_to_the_same_figures(monkeypatch, limit):
    gallery = Gallery.of(*scattered(120, 30, 90))

    def rerank(queries, candidates):  # some order that depends on both
        return ((queries[:, None] * 7 + candidates * 13) % 11).float()

    whole = [
        way(top, rerank if top else None) for way in (gallery.text_to_image, gallery.image_to_text) for top in (0, 5)
    ]
    monkeypatch.setattr(retrieval, "MAX_SIMILARITIES", limit)
    parts = [
        way(top, rerank if top else None) for way in (gallery.text_to_image, gallery.image_to_text) for top in (0, 5)
    ]
    for one, other in zip(whole, parts, strict=True):
        for k in one:
            assert one[k] == pytest.approx(other[k])
    assert whole[0] != whole[1]


def test_a_random_negative_is_never_a_caption_of_the_image_and_pairs_without_any_go():
    gallery = Gallery.of(*scattered(80, 6, 20))
    pairs, partners = gallery.random_negatives(torch.Generator().manual_seed(0))
    together = set(zip(gallery.image_of.tolist(), gallery.caption_of.tolist(), strict=True))
    for pair, partner in zip(pairs.tolist(), partners.tolist(), strict=True):
        assert (int(gallery.image_of[pair]), int(gallery.caption_of[partner])) not in together
    assert len(set(partners.tolist())) > 20
    alike = Gallery.of(torch.ones(5, 2), torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    assert len(alike.random_negatives(torch.Generator())[0]) == 0

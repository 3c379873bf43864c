"""Recall counts every identical caption as right, gives ties away to nobody, and knows its chance level."""

import pytest
import torch

from pretrain.retrieval import chance_recall, recall


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

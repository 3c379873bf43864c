"""The objectives against loops that say the same in the plainest way."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipelines.batch import IGNORE
from pretrain.objectives.captioning import captioning_loss, count_targets
from pretrain.objectives.contrastive import Identity, contrastive_loss
from pretrain.objectives.cross_entropy import cross_entropy
from pretrain.objectives.masked_lm import masked_lm_loss
from pretrain.objectives.matching import HardNegatives, matching_loss, mine_hard_negatives
from pretrain.objectives.noise import gumbel

B, E = 12, 8


def unit_vectors(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(B, E, generator=torch.Generator().manual_seed(seed)), dim=1)


def distinct() -> Identity:
    return Identity(torch.arange(B), torch.arange(B))


def test_contrastive_loss_is_the_mean_of_both_directions_cross_entropies():
    image, text, scale = unit_vectors(0), unit_vectors(1), torch.tensor([2.0])
    loss, counts = contrastive_loss(image, text, scale, distinct(), None)
    logits = math.e**2 * image @ text.T
    expected = sum(-logits[i].log_softmax(0)[i] - logits[:, i].log_softmax(0)[i] for i in range(B)) / (2 * B)
    torch.testing.assert_close(loss, expected)
    right = sum(logits[i].argmax() == i for i in range(B)) + sum(logits[:, i].argmax() == i for i in range(B))
    assert counts.tolist() == [right, 2 * B]


def test_pairs_that_share_an_image_or_a_caption_are_no_negatives():
    image, text, scale = unit_vectors(0), unit_vectors(1), torch.tensor([2.0])
    identity = Identity(torch.tensor([0, 0, *range(2, B)]), torch.tensor([*range(B - 2), 99, 99]))
    loss, _ = contrastive_loss(image, text, scale, identity, None)
    logits = math.e**2 * image @ text.T
    for i, j in ((0, 1), (1, 0), (B - 2, B - 1), (B - 1, B - 2)):
        logits[i, j] = -math.inf
    expected = (F.cross_entropy(logits, torch.arange(B)) + F.cross_entropy(logits.T, torch.arange(B))) / 2
    torch.testing.assert_close(loss, expected)


class LargestTensor(TorchDispatchMode):
    """Watches how large the tensors are that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.numel = max(self.numel, made.numel())
        return made


def test_logits_that_are_too_many_are_made_some_rows_at_a_time_forwards_and_backwards(monkeypatch):
    def run() -> tuple[list[torch.Tensor], int]:
        leaves = [unit_vectors(0), unit_vectors(1), torch.tensor([2.0])]
        with LargestTensor() as largest:
            loss, counts = contrastive_loss(*(leaf.requires_grad_() for leaf in leaves), distinct(), None)
            loss.backward()
        return [loss.detach(), counts, *(leaf.grad for leaf in leaves)], largest.numel

    whole, at_once = run()
    monkeypatch.setattr("pretrain.objectives.contrastive.MAX_LOGITS", 5 * B)  # 12 rows are 5, 5 and 2
    parts, at_most = run()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)
    assert at_once == B * B
    assert at_most == B * E


def test_negatives_come_from_the_pool_and_share_neither_image_nor_caption():
    identity = Identity(torch.arange(B) // 2, torch.arange(B))  # images come in pairs
    for seed in range(20):
        found = mine_hard_negatives(
            unit_vectors(0), unit_vectors(1), torch.tensor([1.0]), identity, 100 + torch.arange(B), pool=4, seed=seed
        )
        for rows in (found.image_rows, found.text_rows):
            for own, other in enumerate(rows.tolist()):
                assert (100 + own) // 4 == (100 + other) // 4
                assert identity.image_ids[own] != identity.image_ids[other]
        assert found.valid.all()


def test_negatives_are_drawn_with_the_probability_of_the_softmax():
    image, text, scale = unit_vectors(0), unit_vectors(1), torch.tensor([1.5])
    draws = 4000
    counts = torch.zeros(B, B)
    for seed in range(draws):
        found = mine_hard_negatives(image, text, scale, distinct(), torch.arange(B) + B * seed, pool=B, seed=0)
        counts[torch.arange(B), found.text_rows] += 1
    logits = (scale.exp() * image @ text.T).fill_diagonal_(-math.inf)
    expected = logits.softmax(dim=1) * draws
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).fill_diagonal_(0).sum(dim=1)
    assert (chi_square < 30).all()  # 10 degrees of freedom: 1 in 1,000 exceeds 29.6


def test_pools_begin_where_the_micro_step_does():
    """A run that went on with another batch: position 21 is the first of 12."""
    pairs = Identity(torch.arange(B) // 2, torch.arange(B))
    found = mine_hard_negatives(
        unit_vectors(0), unit_vectors(1), torch.tensor([1.0]), pairs, 21 + torch.arange(B), pool=2, seed=0
    )
    assert not found.valid.any()  # each pool is one pair


def test_pairs_that_are_too_many_are_scored_some_rows_at_a_time(monkeypatch):
    def run() -> tuple[HardNegatives, int]:
        identity = Identity(torch.arange(B) // 2, torch.arange(B) // 5)  # most pairs of a pool are alike
        scale, positions = torch.tensor([1.0]), 100 + torch.arange(B)
        with LargestTensor() as largest:
            found = mine_hard_negatives(unit_vectors(0), unit_vectors(1), scale, identity, positions, pool=4, seed=0)
        return found, largest.numel

    whole, at_once = run()
    monkeypatch.setattr("pretrain.objectives.matching.MAX_PAIRS", 5 * B)  # 12 rows are 5, 5 and 2
    parts, at_most = run()
    for name in ("image_rows", "text_rows", "valid"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert 0 < whole.valid.sum() < B
    assert (at_once, at_most) == (B * B, B * E)


def test_a_row_without_any_valid_negative_is_defined_and_counts_nothing():
    everyone_alike = Identity(torch.zeros(B, dtype=torch.int64), torch.arange(B))
    found = mine_hard_negatives(
        unit_vectors(0), unit_vectors(1), torch.tensor([1.0]), everyone_alike, torch.arange(B), pool=4, seed=0
    )
    assert not found.valid.any()
    assert found.image_rows.tolist() == list(range(B))
    logits = torch.randn(3 * B, 2, requires_grad=True)
    labels = torch.tensor([1] * B + [0] * 2 * B)
    valid = torch.cat([torch.ones(B, dtype=torch.bool), found.valid, found.valid]).long()
    loss, counts = matching_loss(logits, labels, valid)
    loss.backward()
    assert loss.isfinite()
    assert counts[1] == B
    assert logits.grad is not None
    assert (logits.grad[B:] == 0).all()
    torch.testing.assert_close(loss, F.cross_entropy(logits[:B], torch.ones(B, dtype=torch.int64)) / 3)


def test_class_1_means_belongs_together():
    labels = torch.tensor([1, 0, 0] * B)
    logits = torch.stack([9.0 - 18 * labels, 18.0 * labels - 9], dim=1)
    loss, counts = matching_loss(logits, labels, torch.ones_like(labels))
    assert loss < 1e-6
    assert counts.tolist() == [3 * B, 3 * B]


def test_every_caption_weighs_the_same_in_masked_lm():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[4, IGNORE, IGNORE], [1, 2, 3]])
    loss, counts = masked_lm_loss(logits, targets, 7)
    per_slot = -logits.log_softmax(dim=2)
    second = (per_slot[1, 0, 1] + per_slot[1, 1, 2] + per_slot[1, 2, 3]) / 3
    torch.testing.assert_close(loss, (per_slot[0, 0, 4] + second) / 2)
    assert counts[1] == 4


def test_a_caption_without_masked_slots_is_defined():
    loss, counts = masked_lm_loss(torch.randn(1, 2, 5), torch.full((1, 2), IGNORE), 5)
    assert loss == 0
    assert counts.tolist() == [0, 0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_with_label_smoothing_and_without(smoothing):
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(20).view(4, 5) % 7
    loss, best = cross_entropy(logits, targets, 7, smoothing=smoothing)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected.view(4, 5))
    assert torch.equal(best, logits.argmax(dim=2))
    one, other = (torch.autograd.grad(summed.square().sum(), logits)[0] for summed in (loss, expected))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_of_captioning_losses_is_the_mean_over_all_target_tokens(smoothing):
    """However the captions are dealt out to micro-batches."""
    pad, ids = 0, torch.tensor([[2, 5, 6, 3], [2, 4, 3, 0], [2, 3, 0, 0], [2, 6, 3, 0]])
    logits = torch.randn(4, 4, 7, generator=torch.Generator().manual_seed(0))
    flat, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    expected = F.cross_entropy(flat, targets, ignore_index=pad, label_smoothing=smoothing)
    for parts in (1, 2, 4):
        average = count_targets(ids, pad).float().reshape(1) / parts
        found = [
            captioning_loss(part, texts, average, pad=pad, vocabulary=7, smoothing=smoothing)
            for part, texts in zip(logits.chunk(parts), ids.chunk(parts), strict=True)
        ]
        torch.testing.assert_close(sum(loss for loss, _ in found) / parts, expected)
        right = ((flat.argmax(dim=1) == targets) & (targets != pad)).sum()
        assert sum(counts for _, counts in found).tolist() == [right, 8]


def test_noise_is_a_function_of_its_key():
    a, b = torch.arange(50)[:, None], torch.arange(60)[None, :]
    noise = gumbel(7, a, b)
    assert torch.equal(noise[3:5, 4:9], gumbel(7, a[3:5], b[:, 4:9]))
    assert not torch.equal(noise, gumbel(8, a, b))
    assert not torch.allclose(noise[:50, :50], noise[:50, :50].T)


def test_noise_is_gumbel_distributed_and_uncorrelated():
    noise = gumbel(0, torch.arange(400)[:, None], torch.arange(500)[None, :]).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    neighbours = torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]
    assert abs(neighbours) < 0.01

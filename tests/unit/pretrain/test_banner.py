"""What a run says at its start is so."""

import pytest
import torch

from pretrain.alarms import has_negatives
from pretrain.banner import changes, idle_gpus


def test_changes_name_every_key_with_both_values():
    saved = {"seed": 1, "optimizer": {"rate": 0.1, "clip": 1.0}, "matching": {"pool": 4}, "gone": [1, 2]}
    here = {"seed": 1, "optimizer": {"rate": 0.2, "clip": 1.0}, "matching": None, "new": True}
    assert list(changes(saved, here)) == [
        "optimizer.rate: 0.1 -> 0.2",
        "matching: {'pool': 4} -> null",
        "gone: [1, 2] -> null",
        "new: null -> True",
    ]
    assert list(changes(here, here)) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch uses the GPUs here")
def test_gpus_that_torch_cannot_use_are_counted_unless_they_are_hidden(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert idle_gpus({}, tmp_path) == 2
    assert idle_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert idle_gpus({}, tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("images", "captions", "left"),
    [
        ([1, 2, 3], [7, 7, 7], False),
        ([4, 4, 4], [1, 2, 3], False),
        ([5], [5], False),
        ([1, 2, 1], [7, 7, 8], True),  # the second and the third
        ([1, 2], [1, 2], True),
    ],
)
def test_negatives_are_left_where_two_samples_differ_in_image_and_caption(images, captions, left):
    by_hand = any(a != c and b != d for a, b in zip(images, captions) for c, d in zip(images, captions))  # noqa: B905
    assert has_negatives(torch.tensor(images), torch.tensor(captions)) is by_hand is left

"""What a run says at its start is so."""

import torch

from pretrain.banner import idle_gpus
from pretrain.checkpoint.identity import changes


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


def test_gpus_that_torch_cannot_use_are_counted_unless_they_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert idle_gpus({}, tmp_path) == 2
    assert idle_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
    assert idle_gpus({}, tmp_path / "nothing") == 0

"""What a start of training sets for the whole process."""

import os

import torch

from pretrain.train import take_deterministic_kernels


def test_deterministic_kernels_are_asked_of_torch_and_cublas_and_a_users_workspace_is_kept(monkeypatch):
    try:
        for given, expected in ((None, ":4096:8"), (":16:8", ":16:8")):
            monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
            if given:
                monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given)
            take_deterministic_kernels()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

"""Fixtures that several folders share."""

import subprocess
import sys
from pathlib import Path

import pytest

from distributed.ranks import Ranks


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """850 training and 64 held-out scenes in shards of their own, with a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus") / "demo"
    command = ["-m", "data_pipelines", "demo", str(folder), "--train", "850", "--heldout", "64", "--size", "32"]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def one_rank():
    ranks = Ranks(1)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()

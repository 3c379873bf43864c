"""A tokenizer and a corpus that the data tests share; neither is changed by a test."""

from pathlib import Path

import pytest
from corpus import Corpus, caption, make_corpus

from data_pipelines.samples.tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece((caption(index) for index in range(500)), path, 60)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), tokenizer_path, (70, 33, 1, 60))

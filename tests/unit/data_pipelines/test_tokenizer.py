"""Tokenizers give [CLS] pieces [SEP], know where words begin, and cannot be tricked by a caption."""

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from corpus import caption
from transformers import AutoTokenizer

from data_pipelines.errors import DataError
from data_pipelines.tokenizer import Tokenizer, export_tokenizer, train_sentencepiece

CAPTIONS = [
    *(caption(index) for index in range(200)),
    *(
        "Large RED circle",
        "  two   spaces ",
        "caf\u00e9 \ufb01ne \uff21",
        "[MASK] [CLS]</s>",
        "\u96ea\u306e\u5c71 mountain",
    ),
    *("", "\u00a0", "a\tb\nc", "\U0001f600 circle", "unknown\u2581sign"),
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def exported(tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_tokenizer(tokenizer_path, folder)
    return folder


def test_a_caption_stands_between_cls_and_sep_padded_to_its_length(tokenizer: Tokenizer):
    ids, starts = tokenizer.encode("red circle", 16)
    pieces, _ = tokenizer.pieces("red circle")
    assert ids.tolist() == [2, *pieces.tolist(), 3, *[0] * (14 - len(pieces))]
    assert (ids.dtype, starts.dtype, starts.shape) == (np.int64, bool, (16,))


def test_a_long_caption_is_cut_and_keeps_its_sep(tokenizer: Tokenizer):
    ids, starts = tokenizer.encode("red circle above the mountain " * 9, 8)
    assert (ids[0], ids[-1], (ids[1:-1] > 4).all()) == (2, 3, True)
    assert not starts[[0, 7]].any()


def test_words_begin_where_the_text_has_a_space(tokenizer: Tokenizer):
    _, starts = tokenizer.pieces("xylophone red")
    assert starts[0]
    assert starts.sum() == 2
    assert len(starts) > 3


def test_pieces_with_cjk_characters_are_words_of_their_own(tmp_path: Path):
    train_sentencepiece(["\u96ea\u306e\u5c71 red", "\u5c71\u306e\u96ea blue"] * 20, tmp_path / "t.model", 40)
    _, starts = Tokenizer.load(tmp_path / "t.model").pieces("\u5c71\u96ea")
    assert len(starts) >= 2
    assert starts[-2:].all()


def test_special_tokens_have_fixed_ids_and_no_text(tokenizer: Tokenizer):
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.special_ids == frozenset(range(5))
    assert tokenizer.ordinary_ids.tolist() == list(range(5, tokenizer.vocab_size))


@pytest.mark.parametrize("text", ["[MASK]", "[CLS] [SEP] [PAD]", "a [MASK] b", "</s> <s> <unk>"])
@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_a_caption_cannot_contain_a_special_token(text: str, kind: str, tokenizer: Tokenizer, exported: Path):
    loaded = tokenizer if kind == "sentencepiece" else Tokenizer.load(exported)
    assert not set(loaded.pieces(text)[0].tolist()) & {0, 2, 3, 4}


def test_the_same_captions_train_the_same_tokenizer(tmp_path: Path):
    for name in ("a", "b"):
        train_sentencepiece((caption(index) for index in range(300)), tmp_path / f"{name}.model", 60)
    first, second = Tokenizer.load(tmp_path / "a.model"), Tokenizer.load(tmp_path / "b.model")
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


def test_a_small_corpus_fills_fewer_pieces_than_asked(tokenizer_path: Path, tmp_path: Path):
    train_sentencepiece(["red circle", "blue star"], tmp_path / "t.model", 5000)
    assert Tokenizer.load(tmp_path / "t.model").vocab_size < 100


def test_the_exported_tokenizer_gives_the_same_ids_and_words(tokenizer: Tokenizer, exported: Path):
    theirs = AutoTokenizer.from_pretrained(exported)
    loaded = Tokenizer.load(exported)
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id) == (0, 1, 2)
    assert (theirs.sep_token_id, theirs.mask_token_id, len(theirs)) == (3, 4, tokenizer.vocab_size)
    for text in CAPTIONS:
        ids, starts = tokenizer.encode(text, 40)
        if not text.startswith("[MASK]"):  # transformers itself reads special tokens in text
            assert theirs(text, padding="max_length", max_length=40, truncation=True)["input_ids"] == ids.tolist(), text
        for ours, other in zip((ids, starts), loaded.encode(text, 40), strict=True):
            assert np.array_equal(ours, other), text
    assert loaded.special_ids == tokenizer.special_ids
    assert loaded.vocab_size == tokenizer.vocab_size


def test_a_missing_tokenizer_is_an_error_with_the_command_that_makes_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer at .*t\.model: give .* `python -m data_pipelines tokenizer"):
        Tokenizer.load(tmp_path / "t.model")


def test_a_file_that_is_no_model_is_named(tmp_path: Path):
    (tmp_path / "t.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"t\.model is not a sentencepiece model: train one"):
        Tokenizer.load(tmp_path / "t.model")


def _train(path: Path, **options: object) -> Path:
    settings: dict[str, object] = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "vocab_size": 40}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CAPTIONS[:200]),
        model_prefix=str(path.with_suffix("")),
        hard_vocab_limit=False,
        minloglevel=2,
        **(settings | options),
    )
    return path


@pytest.mark.parametrize(
    ("options", "missing"), [({}, "mask"), ({"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}, "pad, mask")]
)
def test_a_model_without_a_special_token_is_refused_by_its_name(
    tmp_path: Path, options: dict[str, object], missing: str
):
    with pytest.raises(DataError, match=rf"has no {missing} token, which masked .*: train one with"):
        Tokenizer.load(_train(tmp_path / "t.model", **options))


def test_a_model_whose_mask_is_ordinary_text_is_refused(tmp_path: Path):
    path = _train(tmp_path / "t.model", user_defined_symbols=["[MASK]"])
    with pytest.raises(
        DataError, match=r"\[MASK\] as ordinary text, .*: train the model with \[MASK\] among its control"
    ):
        Tokenizer.load(path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no Hugging Face tokenizer .*: save one there with `save_pretrained`"):
        Tokenizer.load(tmp_path)


def test_a_hugging_face_tokenizer_without_a_mask_is_refused(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "t")
    wrapper = AutoTokenizer.from_pretrained(tmp_path / "t")
    wrapper.mask_token = None
    wrapper.save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match="has no mask token"):
        Tokenizer.load(tmp_path / "t")


def test_no_text_to_train_on_is_an_error_that_says_so(tmp_path: Path):
    with pytest.raises(DataError, match=r"No tokenizer of 60 pieces can be trained .*: give more captions or another"):
        train_sentencepiece([], tmp_path / "t.model", 60)
    with pytest.raises(DataError, match="No tokenizer of 6 pieces"):
        train_sentencepiece(CAPTIONS[:50], tmp_path / "t.model", 6)


def test_a_tokenizer_that_cannot_be_opened_is_an_error_in_one_sentence(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(DataError, match=r"holds no Hugging Face tokenizer with a tokenizer\.json"):
        Tokenizer.load(tmp_path)

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(
        DataError, match=r"^Tokenizer .* cannot be opened \(Permission denied\): see that you may read it"
    ):
        Tokenizer.load(tokenizer_path)

"""Tokenizers give [CLS] pieces [SEP], know where words begin, and cannot be tricked by a caption."""

import errno
import json
import shutil
import tracemalloc
import unicodedata
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from corpus import caption
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CLIPTokenizer,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from data_pipelines.errors import DataError
from data_pipelines.samples.tokenizer import Tokenizer, adopt_tokenizer, export_tokenizer, train_sentencepiece
from data_pipelines.tools.coverage import coverage

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
ENGLISH = [f"a {colour} {thing}" for colour, thing in product(("red", "green", "blue"), ("circle", "star", "phone"))]
CHINESE = [
    f"{number}{colour}的{thing}。"
    for number, colour, thing in product(("一只", "两个"), ("红色", "绿色", "蓝色"), ("圆圈", "星星", "手机"))
]
MIXED = [*ENGLISH, *CHINESE, *(f"{chinese} {english}" for chinese, english in zip(CHINESE, ENGLISH, strict=False))] * 3


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture(scope="module")
def mixed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "t.model"
    train_sentencepiece(MIXED, path, 130)
    return path


@pytest.fixture(scope="module")
def mixed(mixed_path: Path) -> Tokenizer:
    return Tokenizer.load(mixed_path)


@pytest.fixture(scope="module")
def mixed_exported(mixed_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("mixed_exported")
    export_tokenizer(mixed_path, folder)
    return Tokenizer.load(folder)


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


def words(tokenizer: Tokenizer, text: str) -> list[int]:
    """How many pieces each word has."""
    _, starts = tokenizer.pieces(text)
    assert starts[0]
    return np.diff(np.flatnonzero(starts), append=len(starts)).tolist()


def test_chinese_and_english_share_a_vocabulary_in_which_frequent_words_are_pieces(mixed: Tokenizer, mixed_path: Path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(mixed_path))
    assert model.EncodeAsPieces("a blue phone") == ["\u2581a", "\u2581blue", "\u2581phone"]
    assert {"手机", "红色", "星星"} < {model.IdToPiece(i) for i in range(mixed.vocab_size)}
    assert all(mixed.unk_id not in mixed.pieces(text)[0] for text in MIXED)


def test_a_space_belongs_to_the_word_after_it_even_as_a_piece_of_its_own(mixed: Tokenizer):
    assert mixed.pieces("圆")[0].size == 2  # the space that begins a text, and the character
    assert words(mixed, "圆") == [2]
    assert words(mixed, "red 圆") == [1, 2]


UNSPACED = {
    "Thai": "แมวสีดำนั่งอยู่บนโซฟา",
    "Lao": "ແມວສີດຳນັ່ງຢູ່ເທິງໂຊຟາ",
    "Khmer": "ឆ្មាខ្មៅអង្គុយលើសាឡុង",
    "Burmese": "ကြောင်နက်တစ်ကောင်",
    "Tibetan": "ཞི་མི་ནག་པོ་ཞིག་ཁྲི་སྟེང་དུ་བསྡད་ཡོད།",
    "Javanese": "ꦏꦸꦕꦶꦁꦲꦶꦉꦁ",
    "Balinese": "ᬫᬾᬂᬲᭂᬮᭂᬫ᭄",
    "Tai Le": "ᥛᥥᥝᥴᥘᥛᥴ",
    "New Tai Lue": "ᦶᦙᧁᦡᧄ",
    "Tai Tham": "ᨾᩯ᩠ᩅᨯᩣᩴ",
    "Tai Viet": "ꪵꪣꪫꪒꪾ",
    "Chinese": "一只黑猫坐在客厅的沙发上",
    "Japanese": "黒い猫がソファーの上に座っている人々",
    "Bopomofo": "ㄇㄠㄏㄟㄙㄜ",
    "Yi": "ꀉꀊꀋꀌꀍ",
    "emoji": "🌅🌊🐱👍🏿🏖️",
}
SPACED = {
    "English": "sleeping",
    "accents": "nai\u0308vete\u0301",
    "Russian": "кошка",
    "Greek": "γάτα",
    "Arabic": "القطة",
    "Hebrew": "חתול",
    "Hindi": "बिल्ली",
    "Tamil": "பூனை",
    "Korean": "고양이가",
    "Amharic": "ድመት",
    "Vietnamese": "ngôi",
}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Knows the letters of many scripts, and no words."""
    path = tmp_path_factory.mktemp("letters") / "t.model"
    texts = [*UNSPACED.values(), *SPACED.values()]
    alphabet = len({character for text in texts for character in unicodedata.normalize("NFKC", text.casefold())})
    train_sentencepiece([" ".join(text) for text in texts], path, alphabet + 30, character_coverage=1.0)
    return Tokenizer.load(path)


@pytest.mark.parametrize("script", UNSPACED)
def test_in_scripts_without_spaces_every_piece_is_a_word(script: str, letters: Tokenizer):
    for text, begun in ((UNSPACED[script], 0), (f"sleep {UNSPACED[script]}", 1)):
        sizes = words(letters, text)
        assert letters.unk_id not in letters.pieces(text)[0]
        assert max(sizes[begun:]) <= 2, "a piece, or the space at the beginning and a piece"
        assert sizes[begun + 1 :].count(1) == len(sizes) - begun - 1


@pytest.mark.parametrize("script", SPACED)
def test_in_scripts_with_spaces_a_word_is_one(script: str, letters: Tokenizer):
    text = SPACED[script]
    assert len(words(letters, f"{text} {text}")) == 2
    mixed = f"{UNSPACED['Thai']} {text} {UNSPACED['Thai']}"
    assert max(words(letters, mixed)) == words(letters, f"x {text}")[1], "between words of one piece"


def test_a_word_too_long_for_bert_is_not_unknown(tmp_path: Path):
    bert().save_pretrained(tmp_path / "in")
    tokenizer = Tokenizer.load(tmp_path / "in")
    for text in ("red" * 100, "a" * 9000):
        pieces, _ = tokenizer.pieces(text)
        assert tokenizer.unk_id not in pieces
        assert len(pieces) > 50


def test_a_latin_word_between_chinese_characters_is_a_word_of_its_own(mixed: Tokenizer):
    assert mixed.pieces("red手机phone手机")[0].size == 5  # without a space before it, "phone" is two
    assert words(mixed, "red手机phone手机") == [1, 1, 2, 1]


@pytest.mark.parametrize(
    "text", [*CHINESE[:3], *ENGLISH[:3], "A\u3000\uff32\uff45\uff44 circle", "一只红色的圆圈。A Red STAR"]
)
def test_text_comes_back_normalised_and_folded(text: str, mixed: Tokenizer, mixed_path: Path):
    model = sentencepiece.SentencePieceProcessor(model_file=str(mixed_path))
    back = model.Decode(mixed.pieces(text)[0].tolist())
    assert back == unicodedata.normalize("NFKC", text).casefold()


def test_rare_chinese_characters_among_english_captions_are_known(tmp_path: Path):
    rare = "雪山水火木"
    captions = [*(caption(index) for index in range(3000)), *([rare] * 8)]
    assert 8 * len(rare) < 0.0005 * sum(len(text) for text in captions)  # of which sentencepiece would keep none
    train_sentencepiece(captions, tmp_path / "t.model", 100)
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert tokenizer.unk_id not in tokenizer.pieces(rare)[0]


# Letters of many scripts, under marks that compose and marks that do not; wide forms, spaces, special tokens.
SCRIPTS = st.lists(
    st.one_of(
        st.text([*"一只红色的圆圈手机。々ーのカ한국 aBcÉßİΣЖ"], max_size=3),
        st.tuples(
            st.sampled_from([*"一のカ国 aBcÉßİΣЖ1#"]),
            st.sampled_from([*"\u0301\u0304\u0323\u3099\ufe0f\u200d\u20e3\U0001f3fb"]),
        ).map("".join),
        st.sampled_from([*"\uff21\uff11\uff01\uff0c\uff5e\ufb01①\u3000\u00a0\u0085\u200b\u2028\t\n\u2581\U0001f600"]),
        st.sampled_from(["红色", "手机", "phone", " red ", "[MASK]", "</s>", " "]),
        st.characters(categories=("Lu", "Ll", "Lo", "Nd", "Po", "So", "Zs")),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(text=SCRIPTS)
def test_the_exported_tokenizer_gives_the_same_ids_and_words_in_any_script(
    text: str, mixed: Tokenizer, mixed_exported: Tokenizer
):
    for ours, theirs in zip(mixed.pieces(text), mixed_exported.pieces(text), strict=True):
        assert np.array_equal(ours, theirs)


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


def test_code_that_a_tokenizer_brings_is_not_run(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "t")
    mark = tmp_path / "mark"
    (tmp_path / "t" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="holds no Hugging Face tokenizer"):
        Tokenizer.load(tmp_path / "t")
    assert not mark.exists()


def test_a_hugging_face_tokenizer_without_a_mask_is_refused(exported: Path, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "t")
    wrapper = AutoTokenizer.from_pretrained(tmp_path / "t")
    wrapper.mask_token = None
    wrapper.save_pretrained(tmp_path / "t")
    with pytest.raises(DataError, match="has no mask token"):
        Tokenizer.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("captions", "size", "sentence"),
    [
        ([], 60, "There is no text to train a tokenizer on: every caption is empty."),
        (["", " \t", "\u2585"], 60, "There is no text to train a tokenizer on: every caption is empty."),
        (
            ["a b"],
            99_999_999_999,
            r"No tokenizer of 99,999,999,999 pieces can be trained .*: give another --vocab-size",
        ),
        (["abc def"], 6, r"of 6 pieces is too small for these captions: give a --vocab-size of 12 or more, which is"),
    ],
)
def test_what_no_tokenizer_can_be_made_of_is_told_in_one_sentence(
    captions: list[str], size: int, sentence: str, tmp_path: Path
):
    with pytest.raises(DataError, match=sentence):
        train_sentencepiece(captions, tmp_path / "t.model", size)
    if "12 or more" in sentence:
        train_sentencepiece(captions, tmp_path / "t.model", 12)


ZH = "".join(chr(0x4E00 + number) for number in range(1500))
LONG = {
    "4,500 bytes without a space": [ZH],
    "beside short ones": [ZH, *["a red circle"] * 20],
    "100,000 bytes without a space": [ZH * 22],
    "70,000 letters without a space": ["abc" * 23_000 + "xyz"],
    "6,000 bytes of words": ["a red circle and a blue star " * 200 + "xyz"],
    "only one of 4,193 bytes": ["x" * 4192 + "y"],
    "a sign of sentencepiece's own": [f"{character} \u2585\u2581 w" for character in ZH[:40]],
    "control characters": ["red\x01circle\x05 xyz"],
}


@pytest.mark.parametrize("name", LONG)
def test_no_caption_is_too_long_to_be_learned_from(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train_sentencepiece(LONG[name], tmp_path / "t.model", 4000, character_coverage=1.0)
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    for text in LONG[name]:
        known = text.replace("\u2585", "").replace("\u2581", "")
        assert tokenizer.unk_id not in tokenizer.pieces(known)[0]
    assert capfd.readouterr().err == ""


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


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ENGLISH, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def word_piece(*special: str) -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=list(special), show_progress=False)
    backend.train_from_iterator(MIXED, trainer)
    return backend


def bert() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab=word_piece("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]").get_vocab())


def without_mask() -> PreTrainedTokenizerBase:
    backend = word_piece("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def gpt2() -> PreTrainedTokenizerBase:
    model = json.loads(byte_level().to_str())["model"]
    return GPT2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def clip() -> PreTrainedTokenizerBase:
    pieces = [*pre_tokenizers.ByteLevel.alphabet(), "re", "red</w>"]
    pieces += [f"{piece}</w>" for piece in pieces[:-2]] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("r", "e"), ("re", "d</w>")])


def unigram() -> PreTrainedTokenizerBase:
    """Like T5's: no [CLS], the end of a text is an ordinary piece of the model, too, and one more special token."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=110, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(MIXED, trainer)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, extra_special_tokens=["<extra>"])


@pytest.mark.parametrize(
    ("make", "added"),
    [
        (bert, []),
        (without_mask, ["[MASK]"]),
        (gpt2, ["[CLS]", "[SEP]", "[PAD]", "[MASK]"]),
        (clip, ["[SEP]", "[PAD]", "[MASK]"]),
        (unigram, ["[CLS]", "[MASK]"]),
    ],
)
def test_an_adopted_tokenizer_has_every_special_token_and_its_pieces_as_they_were(
    make, added: list[str], tmp_path: Path
):
    original = make()
    original.save_pretrained(tmp_path / "in")
    if added:
        with pytest.raises(DataError, match=r"`python -m data_pipelines adopt \S+in -o FOLDER`\.$"):
            Tokenizer.load(tmp_path / "in")
    assert adopt_tokenizer(tmp_path / "in", tmp_path / "out") == added
    tokenizer = Tokenizer.load(tmp_path / "out")
    special = {tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    assert len(special) == 5
    assert special <= tokenizer.special_ids
    assert {original.convert_tokens_to_ids(token) for token in original.all_special_tokens} <= tokenizer.special_ids
    assert tokenizer.vocab_size == len(original) + len(added)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("a red circle", "一只红色的手机。"):
        pieces = tokenizer.pieces(text)[0].tolist()
        assert pieces == original(text, add_special_tokens=False)["input_ids"]
        assert theirs(text)["input_ids"] == [tokenizer.cls_id, *pieces, tokenizer.sep_id]
    hostile = "".join(theirs.all_special_tokens) + "</s> \U0010fffd"
    assert set(tokenizer.pieces(hostile)[0].tolist()) & tokenizer.special_ids <= {tokenizer.unk_id}


@pytest.mark.parametrize("make", [gpt2, clip, bert])
def test_the_bytes_of_a_character_are_one_word_whatever_the_tokenizer(make, tmp_path: Path):
    make().save_pretrained(tmp_path / "in")
    adopt_tokenizer(tmp_path / "in", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    size = 1 if make is bert else 3  # pieces of a character
    found = words(tokenizer, "圆圈red手机")
    assert (len(found), found[:2], found[3:]) == (5, [size] * 2, [size] * 2)
    assert words(tokenizer, "圆 圆")[1] in (size, 1 + size)  # with a piece for the space, or without
    if make is not bert:
        for text in UNSPACED.values():
            characters = text.replace("\ufe0f", "")
            expected = [len(character.encode()) for character in characters]
            assert words(tokenizer, characters) == expected
    assert len(words(tokenizer, "naïve")) == 1


def test_a_token_that_serves_two_purposes_is_refused_and_adopting_mends_it(tmp_path: Path):
    wrapper = without_mask()
    wrapper.mask_token, wrapper.pad_token = "[SEP]", "[PAD]"
    wrapper.save_pretrained(tmp_path / "in")
    with pytest.raises(DataError, match=r"has \[SEP\] both as sep and as mask token: give it its own with `python"):
        Tokenizer.load(tmp_path / "in")
    assert adopt_tokenizer(tmp_path / "in", tmp_path / "out") == ["[MASK]"]
    Tokenizer.load(tmp_path / "out")


def test_adopting_overwrites_nothing_and_needs_a_tokenizer(tmp_path: Path):
    bert().save_pretrained(tmp_path / "in")
    with pytest.raises(DataError, match=r"in is already there: remove it, or name another folder"):
        adopt_tokenizer(tmp_path / "in", tmp_path / "in")
    with pytest.raises(DataError, match="holds no Hugging Face tokenizer"):
        adopt_tokenizer(tmp_path, tmp_path / "out")


def test_coverage_counts_pieces_words_characters_and_what_is_unknown(mixed: Tokenizer):
    captions = ["a red circle"] * 96 + ["一只手机。", "雪雪 wx", "a red star a red star", "a blue star 红色"]
    sizes = [mixed.pieces(text)[0].size for text in captions]
    found = coverage(mixed, captions, [6, 3, 99])
    assert (found.captions, found.mean_pieces, found.max_pieces) == (100, sum(sizes) / 100, max(sizes))
    assert (found.median_pieces, found.p95_pieces) == (3, 3)
    assert found.p99_pieces == sorted(sizes)[98]
    assert found.cut_shares == tuple(sum(size > most for size in sizes) / 100 for most in (4, 1, 97))
    assert found.pieces_per_word == 1.0  # of those without Chinese
    assert found.pieces_per_unspaced_letter == sizes[96] / 4  # of the one that is Chinese alone
    unknown = sum(mixed.pieces(text)[0].tolist().count(mixed.unk_id) for text in captions)
    assert unknown > 0
    assert found.unknown_share == unknown / sum(sizes)
    assert found.unknown_characters == (("雪", 2), ("w", 1), ("x", 1))
    used = {i for text in captions for i in mixed.pieces(text)[0].tolist()} - {mixed.unk_id}
    assert found.vocabulary_share == len(used) / len(mixed.ordinary_ids)


def test_coverage_knows_no_ratio_of_what_does_not_occur(mixed: Tokenizer):
    assert coverage(mixed, ["红色"], [6]).pieces_per_word is None
    assert coverage(mixed, ["red"], [6]).pieces_per_unspaced_letter is None
    with pytest.raises(DataError, match="no captions to measure the tokenizer on: give a manifest"):
        coverage(mixed, [], [6])


def test_coverage_keeps_no_captions(mixed: Tokenizer):
    def captions() -> Iterator[str]:
        yield from (f"a red circle {number}" * 20 for number in range(1000))

    tracemalloc.start()
    coverage(mixed, captions(), [6])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # bytes; the captions have 300,000

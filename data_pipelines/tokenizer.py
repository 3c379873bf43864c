"""Captions to token ids: sentencepiece trained on the captions, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data_pipelines.errors import DataError, cannot_open

PAD, UNK, CLS, SEP, MASK = range(5)
_SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPACE = "\u2581"  # sentencepiece's sign for the space that begins a word


class Tokenizer(ABC):
    """Encodes captions. Special tokens have no text, so that no caption can contain one."""

    vocab_size: int
    fingerprint: str  # sha256 of the model
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: frozenset[int]  # every id that is no piece of text

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Reads a sentencepiece `.model`, or the folder of a Hugging Face tokenizer.

        Raises:
            DataError: There is no tokenizer at `path`, it cannot be opened, or it lacks a special token.
        """
        try:
            if path.is_dir():
                return HuggingFaceTokenizer(path)
            if path.is_file():
                return SentencePieceTokenizer(path)
        except OSError as error:
            raise cannot_open(f"Tokenizer {path}", error) from None
        raise DataError(
            f"There is no tokenizer at {path}: give a sentencepiece .model or the folder of a Hugging Face tokenizer, "
            f"or train one with `python -m data_pipelines tokenizer MANIFEST -o {path}`."
        )

    @abstractmethod
    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int64, whether a piece begins a word bool) without special tokens, two (n,) arrays."""

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """Ids of all pieces of text, ascending int64."""
        return np.setdiff1d(np.arange(self.vocab_size), np.array(sorted(self.special_ids), dtype=np.int64))

    def encode(self, caption: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """[CLS] pieces [SEP], truncated and padded.

        Returns:
            ids: (max_length,) int64.
            word_starts: (max_length,) bool, true at the first piece of each word.
        """
        pieces, starts = self.pieces(caption)
        num_pieces = min(len(pieces), max_length - 2)
        ids = np.full(max_length, self.pad_id, dtype=np.int64)
        ids[0], ids[num_pieces + 1] = self.cls_id, self.sep_id
        ids[1 : num_pieces + 1] = pieces[:num_pieces]
        word_starts = np.zeros(max_length, dtype=bool)
        word_starts[1 : num_pieces + 1] = starts[:num_pieces]
        if num_pieces:
            word_starts[1] = True
        return ids, word_starts


class SentencePieceTokenizer(Tokenizer):
    """Raw sentencepiece: 224,000 captions/s on one core, against 16,000 through transformers."""

    def __init__(self, path: Path):
        model = path.read_bytes()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise DataError(
                f"{path} is not a sentencepiece model: train one with `python -m data_pipelines tokenizer`."
            ) from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        vocabulary = [self._processor.IdToPiece(i) for i in range(self.vocab_size)]
        by_piece = {piece: i for i, piece in enumerate(vocabulary)}
        ids = {
            "pad": self._processor.pad_id(),
            "unk": self._processor.unk_id(),
            "cls": self._processor.bos_id(),
            "sep": self._processor.eos_id(),
            "mask": by_piece.get("[MASK]", -1),
        }
        if missing := [name for name, i in ids.items() if i < 0]:
            raise _lacks(path, missing)
        if not self._processor.IsControl(ids["mask"]):
            raise DataError(
                f"{path} has [MASK] as ordinary text, so that a caption could contain it: train the model with "
                f"[MASK] among its control symbols, as `python -m data_pipelines tokenizer` does."
            )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        special = (self._processor.IsControl, self._processor.IsUnknown, self._processor.IsUnused)
        self.special_ids = frozenset(i for i in range(self.vocab_size) if any(is_kind(i) for is_kind in special))
        self._starts_word = np.array([piece.startswith(_SPACE) or _has_cjk(piece) for piece in vocabulary])

    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(self._processor.EncodeAsIds(caption), dtype=np.int64)
        return ids, self._starts_word[ids]


class HuggingFaceTokenizer(Tokenizer):
    """The fast tokenizer of a folder that transformers loads; the workers then need `tokenizers` alone."""

    def __init__(self, path: Path):
        from transformers import AutoTokenizer  # takes seconds, and most runs use sentencepiece

        try:
            wrapper = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self._backend = wrapper.backend_tokenizer
        except Exception as error:  # of a file that it cannot open or parse, the backend raises a bare Exception
            raise DataError(
                f"{path} holds no Hugging Face tokenizer with a tokenizer.json ({type(error).__name__}): save one "
                f"there with `save_pretrained`."
            ) from None
        names = ("pad", "unk", "cls", "sep", "mask")
        ids = {name: getattr(wrapper, f"{name}_token_id") for name in names}
        if missing := [name for name, i in ids.items() if i is None]:
            raise _lacks(path, missing)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        self.special_ids = frozenset(wrapper.all_special_ids)
        self.vocab_size = max(len(wrapper), wrapper.vocab_size)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "[MASK]" in a caption is text like any other
        self._is_cjk = np.array([_has_cjk(self._backend.id_to_token(i) or "") for i in range(self.vocab_size)])
        self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._backend.encode(caption, add_special_tokens=False)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        starts = np.diff(words, prepend=-2) != 0
        ids = np.array(encoding.ids, dtype=np.int64)
        return ids, starts | self._is_cjk[ids]


def train_sentencepiece(captions: Iterable[str], path: Path, vocab_size: int) -> None:
    """Trains a byte-pair model on captions and writes it to `path`. The same captions give the same bytes.

    Byte-pair merges make a piece of every frequent word. A unigram model only considers pieces that occur in two
    different words, and cuts a corpus of few words into syllables.

    Text is case-folded and normalised (NFKC): captions differ in case by accident. The special tokens are control
    symbols, which no caption can contain. A small corpus may fill fewer than `vocab_size` pieces.

    Raises:
        DataError: There is too little text, or `vocab_size` is smaller than the alphabet.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(" ".join(caption.split()) for caption in captions),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            byte_fallback=False,
            num_threads=1,  # the sums of several threads would differ in their last digits
            pad_id=PAD,
            unk_id=UNK,
            bos_id=CLS,
            eos_id=SEP,
            pad_piece=_SPECIAL_PIECES[PAD],
            unk_piece=_SPECIAL_PIECES[UNK],
            bos_piece=_SPECIAL_PIECES[CLS],
            eos_piece=_SPECIAL_PIECES[SEP],
            control_symbols=[_SPECIAL_PIECES[MASK]],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"No tokenizer of {vocab_size:,} pieces can be trained on these captions ({_last_words(error)}): "
            f"give more captions or another --vocab-size."
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def export_tokenizer(model: Path, folder: Path) -> None:
    """Writes a sentencepiece model as a fast Hugging Face tokenizer with the same ids, for `AutoTokenizer`."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model.read_bytes())
    ids = {p.piece: number for number, p in enumerate(proto.pieces)}
    # sentencepiece merges two neighbours whenever their union is a piece, the earliest piece first.
    splits = ((piece[:cut], piece[cut:]) for piece in ids for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    backend = Backend(BPE(ids, merges, unk_token=_SPECIAL_PIECES[UNK], fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    pad, unk, cls, sep, mask = _SPECIAL_PIECES
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B {sep}", special_tokens=[(cls, CLS), (sep, SEP)]
    )
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )
    wrapper.save_pretrained(folder)


def _has_cjk(piece: str) -> bool:
    # Scripts written without spaces between words: kana, Han ideographs and their extensions.
    return any(
        "\u3040" <= c <= "\u30ff" or "\u3400" <= c <= "\u9fff" or "\uf900" <= c <= "\ufaff" or c >= "\U00020000"
        for c in piece
    )


def _lacks(path: Path, missing: list[str]) -> DataError:
    return DataError(
        f"The tokenizer at {path} has no {', '.join(missing)} token, which masked language modelling needs: train one "
        f"with `python -m data_pipelines tokenizer`, or add the tokens to this one."
    )


def _last_words(error: RuntimeError) -> str:
    return str(error).rpartition("]")[2].strip().rstrip(".") or str(error).splitlines()[0]

"""Captions to token ids: sentencepiece trained on the captions, or any Hugging Face tokenizer.

A word, for masks of whole words, begins at a space; in scripts that are written without spaces every piece is one.
"""

from __future__ import annotations

import hashlib
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_pipelines.errors import DataError, cannot_open
from data_pipelines.samples.backend import load_wrapper, template
from data_pipelines.samples.unspaced import UNSPACED
from data_pipelines.shards.manifest import write_atomically

PAD, UNK, CLS, SEP, MASK = range(5)
_SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPACE = "\u2581"  # sentencepiece's sign for the space that begins a word
_UNKNOWN = "\u2585"  # sentencepiece's sign for what it does not know: it passes over captions that have it
_ROLES = ("pad", "unk", "cls", "sep", "mask")


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
            DataError: There is no tokenizer at `path`, it cannot be opened, or it lacks a special token or has
                one for two purposes.
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
            raise _lacks(path, missing, "train one with `python -m data_pipelines tokenizer`")
        if not self._processor.IsControl(ids["mask"]):
            raise DataError(
                f"{path} has [MASK] as ordinary text, so that a caption could contain it: train the model with "
                f"[MASK] among its control symbols, as `python -m data_pipelines tokenizer` does."
            )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        special = (self._processor.IsControl, self._processor.IsUnknown, self._processor.IsUnused)
        self.special_ids = frozenset(i for i in range(self.vocab_size) if any(is_kind(i) for is_kind in special))
        self._starts_word = np.array([piece.startswith(_SPACE) for piece in vocabulary])
        self._is_word = np.array([UNSPACED.search(piece) is not None for piece in vocabulary])
        self._is_space = np.array([piece == _SPACE for piece in vocabulary])

    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(self._processor.EncodeAsIds(caption), dtype=np.int64)
        return ids, _split_words(self._starts_word[ids], self._is_word[ids], self._is_space[ids])


class HuggingFaceTokenizer(Tokenizer):
    """The fast tokenizer of a folder that transformers loads; the workers then need `tokenizers` alone."""

    def __init__(self, path: Path):
        wrapper, self._backend = load_wrapper(path)
        ids = {role: getattr(wrapper, f"{role}_token_id") for role in _ROLES}
        fix = f"give it its own with `python -m data_pipelines adopt {path} -o FOLDER`"
        if missing := [role for role, i in ids.items() if i is None]:
            raise _lacks(path, missing, fix)
        for role, i in ids.items():
            if shared := [other for other in _ROLES if ids[other] == i and other != role]:
                token = getattr(wrapper, f"{role}_token")
                raise DataError(f"The tokenizer at {path} has {token} both as {role} and as {shared[0]} token: {fix}.")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids.values()
        self.special_ids = frozenset(wrapper.all_special_ids)
        self.vocab_size = max(len(wrapper), wrapper.vocab_size)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "[MASK]" in a caption is text like any other
        # Some models hold their special tokens as ordinary pieces, too.
        self._as_text = np.arange(self.vocab_size)
        self._as_text[list(self.special_ids)] = self.unk_id
        texts = self._backend.decode_batch([[i] for i in range(self.vocab_size)], skip_special_tokens=False)
        self._is_fragment = np.array(["\ufffd" in text for text in texts])  # bytes of a character, but not all of them
        self._is_word = np.array([UNSPACED.search(text) is not None for text in texts])
        tokens = [self._backend.id_to_token(i) for i in range(self.vocab_size)]
        self._is_space = np.array([token in (_SPACE, "\u0120") for token in tokens])  # the latter's is GPT-2's
        self.fingerprint = hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def pieces(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._backend.encode(caption, add_special_tokens=False)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        ids = self._as_text[np.array(encoding.ids, dtype=np.int64)]
        starts, is_word = np.diff(words, prepend=-2) != 0, self._is_word[ids]
        is_fragment = self._is_fragment[ids]
        if not is_fragment.any():
            return ids, _split_words(starts, is_word, self._is_space[ids])
        firsts = np.array([first for first, _ in encoding.offsets], dtype=np.int64)
        is_fragment &= [UNSPACED.match(caption, first) is not None for first in firsts]
        starts = _split_words(starts, is_word | is_fragment, self._is_space[ids])
        starts[1:] &= ~is_fragment[1:] | (np.diff(firsts) != 0)  # a word does not begin inside a character
        return ids, starts


def train_sentencepiece(
    captions: Iterable[str], path: Path, vocab_size: int, *, character_coverage: float = 0.99995
) -> None:
    """Trains a byte-pair model on captions and writes it to `path`. The same captions give the same bytes.

    Byte-pair merges make a piece of every frequent word. A unigram model only considers pieces that occur in two
    different words, and cuts a corpus of few words into syllables.

    Text is case-folded and normalised (NFKC): captions differ in case by accident. The special tokens are control
    symbols, which no caption can contain. A small corpus may fill fewer than `vocab_size` pieces.

    A piece has 16 characters at most, and belongs to one script.

    Args:
        captions: All are held in memory: 2,000,000 Chinese ones of 30 characters take 2.4 GiB and 40 s.
        path: File to write.
        vocab_size: Pieces, at most.
        character_coverage: Share of the text whose characters become pieces; the rarest others are unknown. Where a
            tenth of the captions is Chinese, 15 % of those have an unknown character, 32 % at sentencepiece's own
            0.9995, and 13 % at 1, which also keeps all that is rubbish.

    Raises:
        DataError: There is no text, or `vocab_size` is smaller than the alphabet.
    """
    model, num_texts = io.BytesIO(), 0

    def texts() -> Iterator[str]:
        nonlocal num_texts
        for caption in captions:
            if text := " ".join(caption.replace(_UNKNOWN, " ").split()):
                num_texts += 1
                yield text

    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=texts(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="nmt_nfkc_cf",
            character_coverage=character_coverage,
            max_sentence_length=1 << 30,  # by default it skips those above 4,192 bytes in silence
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
            minloglevel=2,  # its only warning left is of fewer pieces than asked for, which the command prints
        )
    except (RuntimeError, ValueError) as error:
        if not num_texts:
            raise DataError("There is no text to train a tokenizer on: every caption is empty.") from None
        if alphabet := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"A tokenizer of {vocab_size:,} pieces is too small for these captions: give a --vocab-size of "
                f"{int(alphabet[1]):,} or more, which is the number of their characters and the special tokens."
            ) from None
        raise DataError(
            f"No tokenizer of {vocab_size:,} pieces can be trained on these captions ({_last_words(error)}): give "
            f"another --vocab-size."
        ) from None
    write_atomically(path, lambda tmp: tmp.write_bytes(model.getvalue()))


def export_tokenizer(model: Path, folder: Path) -> None:
    """Writes a model that `train_sentencepiece` made as a fast Hugging Face tokenizer, for `AutoTokenizer`.

    It gives the same ids, but for signs such as a superscript two that carry a combining mark.
    """
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)  # in the place of a file, save_pretrained would write nothing
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model.read_bytes())
    ids = {p.piece: number for number, p in enumerate(proto.pieces)}
    # sentencepiece merges two neighbours whenever their union is a piece, the earliest piece first.
    splits = ((piece[:cut], piece[cut:]) for piece in ids for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in ids and right in ids]
    backend = Backend(models.BPE(ids, merges, unk_token=_SPECIAL_PIECES[UNK], fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [
            # Precompiled looks up a letter and its marks as one and loses marks: a control character, which it
            # removes, keeps apart what does not compose to one character.
            normalizers.NFC(),
            normalizers.Replace(Regex(r"(?=[\p{M}\u200c\u200d\x{1F3FB}-\x{1F3FF}])"), "\x01"),
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex("^ +| +$"), ""),  # Strip would take other white space, which sentencepiece keeps
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    pad, unk, cls, sep, mask = _SPECIAL_PIECES
    backend.post_processor = template(backend, cls, sep)
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask
    )
    wrapper.save_pretrained(folder)


def adopt_tokenizer(folder: Path, out: Path) -> list[str]:
    """Writes a Hugging Face tokenizer that has all five special tokens, each with an id of its own.

    What stands at the beginning and the end of a text, if anything does, serves as [CLS] and [SEP]. Tokens that are
    missing, or already serve another purpose, get the ids after the last.

    Returns:
        The tokens that were added.

    Raises:
        DataError: `folder` holds no fast tokenizer, or `out` is not empty.
    """
    from transformers import PreTrainedTokenizerFast

    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is already there: remove it, or name another folder for the tokenizer.")
    wrapper, backend = load_wrapper(folder)
    taken: dict[str, str] = {}
    added: list[str] = []
    for role in ("unk", "cls", "sep", "pad", "mask"):  # [UNK] first: it must be what the model itself says
        names = {"cls": ("cls", "bos"), "sep": ("sep", "eos")}.get(role, (role,))
        found = (getattr(wrapper, f"{name}_token") for name in names)
        token = next((token for token in found if token is not None and token not in taken.values()), None)
        if token is None:
            token = f"[{role.upper()}]"
            added.append(token)
        taken[role] = token
    wrapper.add_special_tokens({f"{role}_token": token for role, token in taken.items()})
    backend.post_processor = template(backend, taken["cls"], taken["sep"])
    # No class of its own any more: some build their tokenizer anew and would put other tokens around a text.
    others = [token for token in wrapper.all_special_tokens if token not in taken.values()]
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{role}_token": token for role, token in taken.items()},
        extra_special_tokens=others,
    ).save_pretrained(out)
    return added


def _split_words(starts: np.ndarray, is_word: np.ndarray, is_space: np.ndarray) -> np.ndarray:
    # All (n,) bool. A piece that is a word ends the one before it; a bare space begins the word that follows.
    starts = starts | is_word
    starts[1:] = (starts[1:] | is_word[:-1]) & ~is_space[:-1]
    return starts


def _lacks(path: Path, missing: list[str], fix: str) -> DataError:
    return DataError(
        f"The tokenizer at {path} has no {', '.join(missing)} token, which masked language modelling needs: {fix}."
    )


def _last_words(error: Exception) -> str:
    return str(error).rpartition("]")[2].strip().rstrip(".") or str(error).splitlines()[0]

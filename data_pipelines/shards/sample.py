"""A sample as it lies in a shard: its members, its captions, and what can be wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from data_pipelines.errors import SampleError
from data_pipelines.shards.tar import Member, TarError, TarSample, iter_members, iter_samples
from data_pipelines.text import decode_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_CAPTION_BYTES = 64 * 1024
MAX_JSON_BYTES = 16 << 20  # nested brackets take twenty times as much memory once parsed


class Fault(IntEnum):
    """What a scan finds wrong with a sample; stored in indexes, so the numbers stay."""

    NONE = 0
    NO_IMAGE = 1
    EMPTY_IMAGE = 2
    NO_CAPTION = 3
    EMPTY_CAPTION = 4
    BAD_JSON = 5
    REPEATED_MEMBER = 6
    REPEATED_KEY = 7
    DAMAGED = 8
    BAD_CAPTION = 9
    SCATTERED = 10
    DOTTED_KEY = 11
    LINK = 12
    SPARSE = 13
    NO_TAR = 14
    TRAILING = 15

    @property
    def reason(self) -> str:
        """In words."""
        return _REASONS[self]

    @property
    def is_of_shard(self) -> bool:
        """Whether it is a fault of the whole shard, not of one sample."""
        return self in (Fault.DAMAGED, Fault.NO_TAR, Fault.TRAILING)


_REASONS = {
    Fault.NONE: "",
    Fault.NO_IMAGE: "no image",
    Fault.EMPTY_IMAGE: "empty image",
    Fault.NO_CAPTION: "no caption",
    Fault.EMPTY_CAPTION: "empty caption",
    Fault.BAD_JSON: "unreadable json",
    Fault.REPEATED_MEMBER: "two members of one kind",
    Fault.REPEATED_KEY: "its key came before in the shard",
    Fault.DAMAGED: "the shard is damaged or cut short here",
    Fault.BAD_CAPTION: "unreadable caption",
    Fault.SCATTERED: "its members do not lie together",
    Fault.DOTTED_KEY: "a dot in its key",
    Fault.LINK: "a link in the place of a file",
    Fault.SPARSE: "a sparse member",
    Fault.NO_TAR: "the file is no tar",
    Fault.TRAILING: "bytes that are no tar follow the end of the archive",
}
NEEDED = (
    f"a sample needs an image ({', '.join(IMAGE_EXTENSIONS)}) and a caption (.txt, or `caption` in .json) under one key"
)
_FIXES = {
    Fault.BAD_JSON: "the .json of a sample must be a JSON object",
    Fault.REPEATED_MEMBER: "a sample has one member of each kind: leave one of them out",
    Fault.REPEATED_KEY: "each sample of a shard needs a key of its own",
    Fault.DAMAGED: "fetch or make the shard again",
    Fault.BAD_CAPTION: f"captions are UTF-8, of {MAX_CAPTION_BYTES:,} bytes at most",
    Fault.SCATTERED: "members of a sample must be neighbours: make the shard again with `tar --sort=name`",
    Fault.DOTTED_KEY: "a key ends at the first dot of the file's name: rename the files, as in `a_2.jpg` for `a.2.jpg`",
    Fault.LINK: "`tar --dereference --hard-dereference` stores the bytes of every file",
    Fault.SPARSE: "make the shard again by `tar` without --sparse",
    Fault.NO_TAR: "name shards that are tars",
    Fault.TRAILING: "fetch or make the shard again",
}


def fix_of(reason: str) -> str:
    """What helps against a fault; "" for what is none, or where there is nothing to say."""
    return next((_FIXES.get(fault, NEEDED) for fault in Fault if fault and fault.reason == reason), "")


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in a shard: its members by extension, an image and a caption among them."""

    shard: str
    key: str
    members: Mapping[str, bytes]

    @property
    def image(self) -> bytes:
        """The member that holds the image."""
        return next(self.members[name] for name in IMAGE_EXTENSIONS if name in self.members)

    @property
    def text(self) -> bytes | None:
        """The content of .txt."""
        return self.members.get("txt")

    @property
    def json(self) -> bytes | None:
        """The content of .json."""
        return self.members.get("json")

    def captions(self) -> tuple[str, ...]:
        """The captions of the image, as `read_captions` finds them.

        Raises:
            ContentError: Nothing, or nothing that can be read.
        """
        return read_captions(self.text, self.json)

    def caption(self) -> str:
        """The first of `captions`."""
        return self.captions()[0]

    def metadata(self) -> dict[str, object]:
        """The fields of .json, none where there is no such member.

        Raises:
            ContentError: It is not a JSON object.
        """
        return {} if self.json is None else _parse_json(self.json)


class ContentError(SampleError):
    """What a member of a sample says cannot be used."""

    def __init__(self, fault: Fault, reason: str):
        super().__init__(reason)
        self.fault = fault


def read_captions(text: bytes | None, metadata: bytes | None) -> tuple[str, ...]:
    """The captions of a sample: the texts of the list `captions` of .json, or else .txt, or else `caption` of .json.

    Scans, tools and training all ask here. White space around a caption does not count, and an empty one is none.

    Raises:
        ContentError: There is none, or one is too long or no text.
    """
    if metadata and b'"captions"' in metadata:
        several = _parse_json(metadata).get("captions")
        texts = [_clean(one) for one in several if isinstance(one, str)] if isinstance(several, list) else []
        if any(texts):
            return tuple(one for one in texts if one)
    if text and (caption := _clean(text)):
        return (caption,)
    one = None if metadata is None else _parse_json(metadata).get("caption")
    if isinstance(one, str) and (caption := _clean(one)):
        return (caption,)
    raise ContentError(Fault.NO_CAPTION if text is None else Fault.EMPTY_CAPTION, "caption is empty")


def _clean(text: str | bytes) -> str:
    raw = text.encode(errors="replace") if isinstance(text, str) else text
    if len(raw) > MAX_CAPTION_BYTES:
        reason = f"caption of {len(raw):,} bytes is longer than {MAX_CAPTION_BYTES:,}"
        raise ContentError(Fault.BAD_CAPTION, reason)
    try:
        caption = decode_text(raw).strip()
    except UnicodeDecodeError:
        raise ContentError(Fault.BAD_CAPTION, "caption is not UTF-8") from None
    if "\0" in caption:
        raise ContentError(Fault.BAD_CAPTION, "caption is not UTF-8 text: it holds null bytes, as UTF-16 does")
    return caption


def parse_sample(shard: str, data: bytes) -> Sample:
    """The one sample in a run of a shard's members.

    Raises:
        TarError: It is not the members of exactly one sample.
        SampleError: The sample has a fault, which the message names.
    """

    def read(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    samples = list(iter_samples(iter_members(read, len(data), whole=False)))
    if len(samples) != 1:
        raise TarError(0, f"{len(samples)} samples instead of one")
    found = samples[0]
    if (found.start, found.stop) != (0, len(data)):
        raise TarError(found.stop, "a sample that ends early")
    if fault := fault_of(found, read):
        raise SampleError(fault.reason, found.key)
    members = {extension: read(member.start, member.size) for extension, member in found.members.items()}
    return Sample(shard, found.key, members)


def normalised_caption(caption: str) -> bytes:
    """What two captions must share to be the same: case and white space do not count."""
    return " ".join(caption.lower().split()).encode()


def hash64(content: bytes, dtype: str = "<u8") -> np.ndarray:
    """The first eight bytes of SHA-256, as a 0-d array."""
    return np.frombuffer(hashlib.sha256(content).digest(), dtype=dtype, count=1).reshape(())


def image_member(sample: TarSample) -> Member | None:
    """The member that holds the image."""
    return next((sample.members[name] for name in IMAGE_EXTENSIONS if name in sample.members), None)


def fault_of(sample: TarSample, read: Callable[[int, int], bytes]) -> Fault:
    """The fault that the headers show, or the json of a sample without .txt."""
    if sample.repeated:
        return Fault.REPEATED_MEMBER
    if sample.has_sparse:
        return Fault.SPARSE
    image = image_member(sample)
    if image is None:
        return _missing(sample, Fault.NO_IMAGE, IMAGE_EXTENSIONS)
    if not image.size:
        return Fault.EMPTY_IMAGE
    text, metadata = sample.members.get("txt"), sample.members.get("json")
    if text and text.size:
        return Fault.NONE
    if not (text or metadata):
        return _missing(sample, Fault.NO_CAPTION, ("txt", "json"))
    try:
        read_captions(text and read(text.start, text.size), metadata and read(metadata.start, metadata.size))
    except ContentError as error:
        return error.fault
    return Fault.NONE


def caption_fault_of(sample: TarSample, read: Callable[[int, int], bytes]) -> Fault:
    """The fault of the caption, for a sample without another fault, as `verify` and training find it."""
    text, metadata = sample.members.get("txt"), sample.members.get("json")
    if not (text and text.size):
        return Fault.NONE  # its json was read already
    said = read(text.start, min(text.size, MAX_CAPTION_BYTES + 1))
    with suppress(ContentError):
        if _clean(said):
            return Fault.NONE
    try:
        read_captions(said, metadata and read(metadata.start, metadata.size))
    except ContentError as error:
        return error.fault
    return Fault.NONE


def _missing(sample: TarSample, fault: Fault, extensions: tuple[str, ...]) -> Fault:
    if any(name.endswith(tuple(f".{extension}" for extension in extensions)) for name in sample.members):
        return Fault.DOTTED_KEY
    return Fault.LINK if sample.has_link else fault


def _parse_json(raw: bytes) -> dict[str, object]:
    if len(raw) > MAX_JSON_BYTES:
        raise ContentError(Fault.BAD_JSON, f"json of {len(raw):,} bytes is longer than {MAX_JSON_BYTES:,}")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ContentError(Fault.BAD_JSON, "json is not an object")
    return content

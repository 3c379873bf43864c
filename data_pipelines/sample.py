"""A sample as it lies in a shard: its members, its captions, and what can be wrong with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from data_pipelines.errors import SampleError
from data_pipelines.tar import Member, TarError, TarSample, iter_members, iter_samples

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_CAPTION_BYTES = 64 * 1024
MAX_JSON_BYTES = 16 << 20  # parsed, brackets take twenty times as much memory


class Fault(IntEnum):
    """What a scan of the headers finds wrong with a sample; stored in indexes, so the numbers stay."""

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

    @property
    def reason(self) -> str:
        """In words."""
        return _REASONS[self]


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
}


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
        """What may be said of the image: the list `captions` of .json, else .txt, else `caption` of .json.

        Without white space around them; empty ones of a list are passed over.

        Raises:
            SampleError: There is none, or one is too long or not UTF-8.
        """
        several = self.metadata().get("captions") if self.json and b'"captions"' in self.json else None
        if isinstance(several, list):
            texts = [self._clean(text) for text in several if isinstance(text, str)]
        else:
            texts = [self._clean(self.text or b"")]
            if not any(texts) and isinstance(caption := self.metadata().get("caption"), str):
                texts = [self._clean(caption)]
        if not any(texts):
            raise SampleError("caption is empty")
        return tuple(text for text in texts if text)

    def caption(self) -> str:
        """The first of `captions`."""
        return self.captions()[0]

    def metadata(self) -> dict[str, object]:
        """The fields of .json, none where there is no such member.

        Raises:
            SampleError: It is not a JSON object.
        """
        content = {} if self.json is None else _parse_json(self.json)
        if content is None:
            raise SampleError("json is not an object")
        return content

    @staticmethod
    def _clean(text: str | bytes) -> str:
        raw = text.encode(errors="replace") if isinstance(text, str) else text
        if len(raw) > MAX_CAPTION_BYTES:
            raise SampleError(f"caption of {len(raw):,} bytes is longer than {MAX_CAPTION_BYTES:,}")
        try:
            return raw.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise SampleError("caption is not UTF-8") from None


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
    """What the headers alone, or the json of a sample without .txt, say against it."""
    if sample.repeated:
        return Fault.REPEATED_MEMBER
    image = image_member(sample)
    if image is None:
        return Fault.NO_IMAGE
    if not image.size:
        return Fault.EMPTY_IMAGE
    if text := sample.members.get("txt"):
        return Fault.NONE if text.size or _has_captions(sample, read) else Fault.EMPTY_CAPTION
    if "json" not in sample.members:
        return Fault.NO_CAPTION
    return Fault.NONE if _has_captions(sample, read) else _fault_of_json(sample, read)


def _has_captions(sample: TarSample, read: Callable[[int, int], bytes]) -> bool:
    member = sample.members.get("json")
    content = _parse_json(read(member.start, member.size)) if member else None
    if content is None:
        return False
    several = content.get("captions")
    texts = several if isinstance(several, list) else [content.get("caption")]
    return any(isinstance(text, str) and text.strip() for text in texts)


def _fault_of_json(sample: TarSample, read: Callable[[int, int], bytes]) -> Fault:
    member = sample.members["json"]
    return Fault.BAD_JSON if _parse_json(read(member.start, member.size)) is None else Fault.NO_CAPTION


def _parse_json(raw: bytes) -> dict[str, object] | None:
    if len(raw) > MAX_JSON_BYTES:
        return None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

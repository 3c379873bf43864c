"""What servers and file systems answer, and what is said of it: an error that may pass, or one for the user."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from data_pipelines.errors import DataError, MissingError
from data_pipelines.storage.addresses import shown

INDEX_AGAIN = "write the manifest again with `python -m data_pipelines index`"
AGAIN = f"restore it, or {INDEX_AGAIN}"


@dataclass(frozen=True)
class Answer:
    """What a server says before the bytes, and the bytes."""

    status: int
    reason: str
    headers: Mapping[str, str]  # names in lower case
    pieces: AsyncIterator[bytes] | None = None


class OtherVersionError(Exception):
    """An answer was of another version than those before it."""


class TransientError(Exception):
    """A read went wrong in a way that may pass."""

    def __init__(self, what: str, retry_after_s: float = 0.0):
        super().__init__(what)
        self.retry_after_s = retry_after_s


def explained(location: str, error: Exception) -> Exception:
    """The error to raise for one of a file system."""
    if refusal := s3_refusal(error):
        return refused(location, refusal)
    if isinstance(error, FileNotFoundError):
        return missing_file(location)
    if isinstance(error, PermissionError):
        return refused(location, Answer(403, str(error), {}))
    if type(error).__name__ == "NoCredentialsError":
        return DataError(
            f"Shard {shown(location)} needs credentials ({error}): set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY; for a public bucket, FSSPEC_S3_ANON=true."
        )
    return transient(error)


def s3_refusal(error: Exception) -> Answer | None:
    answer = getattr(error.__cause__ or error, "response", None)  # of botocore's ClientError
    if not isinstance(answer, dict):
        return None
    about = answer["ResponseMetadata"]
    return Answer(about["HTTPStatusCode"], answer["Error"].get("Message", ""), about.get("HTTPHeaders", {}))


def transient(error: Exception) -> TransientError:
    return TransientError(f"{type(error).__name__} ({error})")


def refused(location: str, answer: Answer) -> Exception:
    """The error to raise for an answer that brings no bytes."""
    said = f"the server answered {answer.status} {answer.reason}".rstrip()
    if answer.status in (408, 425, 429) or answer.status >= 500:
        wait = answer.headers.get("retry-after", "")
        return TransientError(said, float(wait) if wait.isdecimal() else 0.0)
    if answer.status in (404, 410):
        return missing_file(location, f" ({said})")
    if answer.status in (401, 403):
        return DataError(
            f"Shard {shown(location)} may not be read ({said}): see that the credentials are set and have not "
            f"expired, and that the name is right."
        )
    return DataError(f"Shard {shown(location)} cannot be read ({said}): see that its URL is right.")


def missing_file(location: str, answer: str = "") -> MissingError:
    return MissingError(f"Shard {shown(location)} cannot be found{answer}: put it back, or {INDEX_AGAIN}.")


def wrong_sum(location: str, found: str, known: str) -> DataError:
    """What to say of a shard whose SHA-256 is another than it was."""
    return DataError(
        f"Shard {shown(location)} has changed: its SHA-256 is {found} but was {known} when it was indexed; {AGAIN}."
    )


def changed(location: str, found: tuple[int, str], known: tuple[int, str]) -> DataError:
    is_now, was = (f"{size:,} bytes{version and f' (version {version})'}" for size, version in (found, known))
    return DataError(
        f"Shard {shown(location)} has changed: it has {is_now} but had {was} when it was indexed; {AGAIN}."
    )

"""How many samples of a shard img2dataset counted as it made it."""

import json

from data_pipelines.errors import DataError
from data_pipelines.storage.addresses import shown
from data_pipelines.storage.files import open_bytes


def maker_count(location: str, patience_s: float) -> int | None:
    """Samples of a shard, as img2dataset counted them; None where it did not."""
    stem = location.removesuffix(".tar")
    for name, count in ((f"{stem}_stats.json", _count_stats), (f"{stem}.parquet", _count_parquet)):
        try:
            source = open_bytes(name, patience_s=patience_s)
        except DataError:
            continue
        try:
            return count(source.read(0, source.size))
        except Exception as error:  # whatever a parser says of bytes that are no such file
            raise DataError(
                f"{shown(name)} does not say how many samples {shown(location)} holds ({type(error).__name__}): index "
                f"it without --trust-stats, which reads its headers."
            ) from None
        finally:
            source.close()
    return None


def _count_stats(content: bytes) -> int:
    return int(json.loads(content)["successes"])


def _count_parquet(content: bytes) -> int:
    from pyarrow import BufferReader, parquet  # takes half a second

    status = parquet.read_table(BufferReader(content), columns=["status"]).column("status")
    return sum(value == "success" for value in status.to_pylist())

"""
Replay on disk: Parquet files that are written once, each with rows of consecutive numbers.

A shard's name is `replay-FIRST-LAST-DIGEST.parquet`: the numbers of its first and last row, and the first 16
hexadecimal digits of the SHA-256 of the whole file. So the name, which appears in one rename, says which rows are in
the file, whether it is as it was written, and which shards a merged one replaces. Another format of shards needs
another form of names.
"""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..records import Observation
from .files import DamagedError, write_file
from .rows import SCHEMA, completed, from_table

logger = logging.getLogger(__name__)

NAME = re.compile(r"replay-(\d{12})-(\d{12})-([0-9a-f]{16})\.parquet")
_FLOATS = ["teacher_log_probs.list.element.list.element", "teacher_tail.list.element"]


@dataclass(frozen=True, order=True, slots=True)
class Shard:
    """
    One file of observations; ordered by its rows.

    Attributes:
        first (`int`): Number of its first row.
        last (`int`): Number of its last row.
        digest (`str`): First 16 hexadecimal digits of its SHA-256.
        path (`Path`): The file.
    """

    first: int
    last: int
    digest: str
    path: Path

    def covers(self, other: "Shard") -> bool:
        """Whether all rows of another shard are in this one too."""
        return self.first <= other.first and other.last <= self.last


def list_shards(folder: Path) -> list[Shard]:
    """Return the shards of a folder, by the number of their first row; other files are ignored."""
    if not folder.is_dir():
        return []
    matches = ((path, NAME.fullmatch(path.name)) for path in folder.iterdir())
    return sorted(Shard(int(m[1]), int(m[2]), m[3], path) for path, m in matches if m and path.is_file())


def write_shard(folder: Path, table: pa.Table) -> Shard:
    """
    Write rows of `SCHEMA` as one file; on disk when this returns.

    Args:
        folder (`Path`): Exists.
        table (`pyarrow.Table`): At least one row, in order.
    """
    sink = pa.BufferOutputStream()
    # Floats compress only with their bytes apart: first all first bytes, then all second ones, and so on.
    options = dict(compression="zstd", compression_level=3, use_dictionary=False)
    pq.write_table(table, sink, use_byte_stream_split=_FLOATS, **options)
    data = sink.getvalue().to_pybytes()
    first, last, name = table["number"][0].as_py(), table["number"][-1].as_py(), _digest(data)
    path = folder / f"replay-{first:012d}-{last:012d}-{name}.parquet"
    write_file(path, data)
    return Shard(first, last, name, path)


def read_shard(shard: Shard) -> pa.Table:
    """
    Read a whole shard.

    Raises:
        DamagedError: It cannot be read, or is not as it was written.
    """
    try:
        data = shard.path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{shard.path} cannot be read: {error}") from error
    if _digest(data) != shard.digest:  # before Parquet sees it: a parser of damaged bytes may do anything
        raise DamagedError(f"{shard.path} is not as it was written")
    try:
        table = completed(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False))
    except (OSError, pa.ArrowException) as error:
        raise DamagedError(f"{shard.path} is no Parquet file: {error}") from error
    if not table.schema.equals(SCHEMA):
        raise DamagedError(f"{shard.path} does not hold observations but {table.schema.names}")
    return table


def read_observations(folder: Path, limit: int | None = None, not_before: datetime | None = None) -> list[Observation]:
    """
    Read the newest observations, oldest first. Damaged shards are skipped with a warning.

    Args:
        folder (`Path`): The folder of shards, which need not exist.
        limit (`int`, *optional*): Observations to read, at most. Shards with older ones are not opened.
        not_before (`datetime`, *optional*): Observations recorded earlier are left out.
    """
    tables: list[pa.Table] = []
    missing = limit
    for table in _newest_first(list_shards(folder)):
        kept = table if not_before is None else table.filter(pc.field("recorded_at") >= not_before)
        kept = kept if missing is None else kept.slice(max(0, kept.num_rows - missing))
        tables.insert(0, kept)
        if missing is not None and (missing := missing - kept.num_rows) <= 0:
            break
    return [observation for table in tables for observation in from_table(table)]


def _newest_first(shards: Sequence[Shard]) -> Iterator[pa.Table]:
    """
    Yield tables without common rows, the newest rows first.

    A crash after a merge leaves the merged shard beside those it stands for. The merged one is tried first, since it
    begins earliest among those that end with the same row; the others count where it is damaged.
    """
    before: int | None = None
    for shard in sorted(shards, key=lambda shard: (-shard.last, shard.first)):
        if before is not None and shard.first >= before:
            continue
        try:
            table = read_shard(shard)
        except DamagedError as error:
            logger.warning("Skipped damaged observations: %s", error)
            continue
        yield table if before is None else table.filter(pc.field("number") < before)
        before = shard.first


def newest_row(shard: Shard) -> datetime:
    """Return when the newest row of a shard was recorded; of a damaged file, when that was written."""
    try:
        return _recorded_at(_row_groups(shard))[1]
    except (OSError, pa.ArrowException, ValueError):
        return datetime.fromtimestamp(shard.path.stat().st_mtime, UTC)


def measure(shard: Shard) -> tuple[int, datetime]:
    """
    Return how many numbers are in a shard, and when its oldest row was recorded, from the end of the file.

    Raises:
        DamagedError: The file cannot be read.
    """
    try:
        groups = _row_groups(shard)
        values = sum(group.column(index).num_values for group in groups for index in range(group.num_columns))
        return values, _recorded_at(groups)[0]
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DamagedError(f"{shard.path} cannot be read: {error}") from error


def _row_groups(shard: Shard) -> list[pq.RowGroupMetaData]:
    metadata = pq.read_metadata(shard.path)
    return [metadata.row_group(index) for index in range(metadata.num_row_groups)]


def _recorded_at(groups: Sequence[pq.RowGroupMetaData]) -> tuple[datetime, datetime]:
    statistics = [group.column(SCHEMA.get_field_index("recorded_at")).statistics for group in groups]
    if not statistics or not all(found is not None and found.has_min_max for found in statistics):
        raise ValueError("recorded_at has no bounds")
    return min(found.min for found in statistics), max(found.max for found in statistics)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

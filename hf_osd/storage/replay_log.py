"""Replay on disk as a whole: it grows by shards, small ones are merged, and the oldest leave."""

import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from ..records import Observation
from .files import DamagedError, clean, make_private
from .rows import Row, to_table
from .shards import Shard, list_shards, measure, newest_row, read_observations, read_shard, write_shard

logger = logging.getLogger(__name__)

_LARGEST_SHARD = 2**24  # bytes of a shard on disk, at most
_MOST_VALUES = 2**22  # numbers in a merged shard, at most: 16 MiB in memory, however well they are compressed
_MANY = 16  # newest shards that are worth merging; fewer wait for more
_MOST_SHARDS = 1000  # shards of a directory, at most; the oldest leave
_SPANS_PER_LIFE = 8  # a merged shard spans at most this fraction of the time to live, since it leaves as a whole


class ReplayLog:
    """
    Appends observations to a folder and keeps it small. Not thread-safe; one writer at a time.

    Args:
        folder (`Path`): Made when the first rows are appended.
        max_bytes (`int`, *optional*): Bound on all shards together; the oldest leave first.
        time_to_live (`float`, *optional*): Seconds until a row no longer counts. Shards leave with their newest row.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None, time_to_live: float | None = None) -> None:
        clean(folder)
        self._folder, self._max_bytes = folder, max_bytes
        self._life = None if time_to_live is None else timedelta(seconds=time_to_live)
        self._largest = _LARGEST_SHARD if max_bytes is None else min(_LARGEST_SHARD, max(1, max_bytes // 8))
        self._damaged: set[str] = set()
        self._measured: dict[str, tuple[int, datetime]] = {}
        self.next_number = max((shard.last for shard in list_shards(folder)), default=0) + 1

    def append(self, rows: Sequence[Row]) -> int:
        """
        Write a shard of as many rows as go into one.

        Args:
            rows (`Sequence[Row]`): At least one, oldest first.

        Returns:
            `int`: How many of the first rows are on disk now.
        """
        make_private(self._folder)
        self._remove_old()  # first, since the disk may be full
        count = self._fitting(rows)
        write_shard(self._folder, to_table(rows[:count], self.next_number))
        self.next_number += count
        return count

    def _fitting(self, rows: Sequence[Row]) -> int:
        size = 0
        for count, row in enumerate(rows):
            size += row.nbytes
            if size > self._largest:
                return max(1, count)
        return len(rows)

    def read(self, limit: int | None = None) -> list[Observation]:
        """Return the newest observations, oldest first; see `read_observations`."""
        return read_observations(self._folder, limit, self._horizon())

    def _horizon(self) -> datetime | None:
        return None if self._life is None else datetime.now(UTC) - self._life

    def remove_before(self, number: int) -> None:
        """Remove the shards of rows before a number."""
        for shard in list_shards(self._folder):
            if shard.last < number:
                self._remove(shard)

    def tidy(self) -> None:
        """Remove shards that are expired, beyond a bound or there twice, and merge small ones."""
        self._remove_covered()
        self._remove_old()
        self._merge_small()

    def _remove_covered(self) -> None:
        """Remove shards that a crash left beside the merged one that stands for them."""
        cover: Shard | None = None
        sound = (shard for shard in list_shards(self._folder) if shard.path.name not in self._damaged)
        for shard in sorted(sound, key=lambda shard: (shard.first, -shard.last)):
            if cover is not None and cover.covers(shard) and self._read([cover]) is not None:
                self._remove(shard)
            else:
                cover = shard

    def _remove_old(self) -> None:
        for shard in reversed(list(self._leaving())):  # the oldest first: a crash in between must not leave a hole
            self._remove(shard)

    def _leaving(self) -> Iterator[Shard]:
        """Yield shards that are expired or beyond a bound, newest first."""
        horizon, size = self._horizon(), 0
        for index, shard in enumerate(reversed(list_shards(self._folder))):
            size += shard.path.stat().st_size
            expired = horizon is not None and newest_row(shard) < horizon
            if expired or index >= _MOST_SHARDS or (self._max_bytes is not None and size > self._max_bytes):
                yield shard

    def _remove(self, shard: Shard) -> None:
        shard.path.unlink(missing_ok=True)
        self._measured.pop(shard.path.name, None)
        self._damaged.discard(shard.path.name)

    def _merge_small(self) -> None:
        groups = list(self._groups(list_shards(self._folder)))
        for group in groups:
            if len(group) >= (_MANY if group is groups[-1] else 2):
                self._merge(group)

    def _merge(self, group: Sequence[Shard]) -> None:
        tables = self._read(group)
        if tables is None:
            return
        write_shard(self._folder, pa.concat_tables(tables))
        for shard in group:
            self._remove(shard)

    def _read(self, shards: Sequence[Shard]) -> list[pa.Table] | None:
        """Read shards; `None` where one is damaged, which will be neither merged nor trusted again."""
        tables = []
        for shard in shards:
            try:
                tables.append(read_shard(shard))
            except DamagedError as error:
                logger.warning("Observations are damaged and will not be used: %s", error)
                self._damaged.add(shard.path.name)
                return None
        return tables

    def _groups(self, shards: Sequence[Shard]) -> Iterator[list[Shard]]:
        """Cut the shards, in order, into groups that may become one. Old groups stay as they are when shards come."""
        group: list[Shard] = []
        for shard in shards:
            if group and not self._fit([*group, shard]):
                yield group
                group = []
            group.append(shard)
        yield group

    def _fit(self, group: Sequence[Shard]) -> bool:
        if any(before.last + 1 != after.first for before, after in pairwise(group)):
            return False  # what lies between is damaged or gone, and a name must not promise it
        try:
            measured = [self._measure(shard) for shard in group]
        except DamagedError:
            return False
        oldest = [recorded_at for _, recorded_at in measured]
        return (
            sum(shard.path.stat().st_size for shard in group) <= self._largest
            and sum(values for values, _ in measured) <= _MOST_VALUES
            and (self._life is None or max(oldest) - min(oldest) <= self._life / _SPANS_PER_LIFE)
        )

    def _measure(self, shard: Shard) -> tuple[int, datetime]:
        name = shard.path.name
        if name in self._damaged:
            raise DamagedError(f"{shard.path} is damaged")
        if name not in self._measured:
            self._measured[name] = measure(shard)
        return self._measured[name]

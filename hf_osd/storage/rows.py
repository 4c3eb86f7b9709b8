"""
Observations as rows of Arrow tables, and back, bit for bit.

Token ids are int32 on disk and int64 in memory; log-probabilities and the tail are float32 in both, since a learner
that resumes must compute what it would have computed without the restart.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..records import Observation

Array = np.ndarray[Any, np.dtype[Any]]

_FLAT = {
    "prompt_ids": np.dtype(np.int32),
    "output_ids": np.dtype(np.int32),
    "teacher_tail": np.dtype(np.float32),
    "draft_ids": np.dtype(np.int32),
    "accepted": np.dtype(np.bool_),
}
_OPTIONAL = {"source_ids": np.dtype(np.int32)}  # null where an observation has none
_NESTED = {"teacher_ids": np.dtype(np.int32), "teacher_log_probs": np.dtype(np.float32)}
_IN_MEMORY = {np.dtype(np.int32): np.dtype(np.int64)}
_LARGEST = np.iinfo(np.int32).max

SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("recorded_at", pa.timestamp("us", tz="UTC")),
        *((name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in _FLAT.items()),
        *((name, pa.list_(pa.list_(pa.from_numpy_dtype(dtype)))) for name, dtype in _NESTED.items()),
        *((name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in _OPTIONAL.items()),
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """
    One observation on its way to disk.

    Attributes:
        recorded_at (`int`): Microseconds since 1970, UTC.
        arrays (`dict[str, numpy.ndarray]`): A copy of each field, by name, in the types of the disk.
    """

    recorded_at: int
    arrays: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def to_row(observation: Observation) -> Row:
    """
    Copy an observation, as recorded now.

    Args:
        observation (`Observation`): Nothing of it is kept.

    Raises:
        ValueError: Its shapes contradict each other, or an id does not fit 32 bits.
    """
    arrays = {name: _array(observation, name, 1, dtype) for name, dtype in _FLAT.items()}
    arrays |= {name: _array(observation, name, 2, dtype) for name, dtype in _NESTED.items()}
    given = {name: dtype for name, dtype in _OPTIONAL.items() if getattr(observation, name) is not None}
    optional = {name: _array(observation, name, 1, dtype) for name, dtype in given.items()}
    lengths = {len(array) for name, array in arrays.items() if name != "prompt_ids"}
    if len(lengths) != 1 or arrays["teacher_ids"].shape != arrays["teacher_log_probs"].shape:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"the shapes of an observation contradict each other: {shapes}")
    return Row(time.time_ns() // 1000, arrays | optional)


def _array(observation: Observation, name: str, dimensions: int, dtype: "np.dtype[Any]") -> Array:
    array = getattr(observation, name).detach().cpu().numpy()
    if array.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension(s), got shape {array.shape}")
    if dtype == np.int32 and array.size and not -1 <= array.min() <= array.max() <= _LARGEST:
        raise ValueError(f"{name} must be token ids in [-1, {_LARGEST}], got {array.min()} to {array.max()}")
    copied: Array = np.array(array, dtype=dtype, order="C")
    return copied


def to_table(rows: Sequence[Row], first: int) -> pa.Table:
    """Arrow table of `SCHEMA`, with rows numbered from `first`."""
    columns = {
        "number": pa.array(range(first, first + len(rows)), pa.int64()),
        "recorded_at": pa.array([row.recorded_at for row in rows], SCHEMA.field("recorded_at").type),
    }
    for name in _FLAT:
        parts = [row.arrays[name] for row in rows]
        columns[name] = _lists([len(part) for part in parts], pa.array(np.concatenate(parts)))
    for name in _NESTED:
        parts = [row.arrays[name] for row in rows]
        widths = np.concatenate([np.full(len(part), part.shape[1]) for part in parts])
        positions = _lists(widths, pa.array(np.concatenate([part.ravel() for part in parts])))
        columns[name] = _lists([len(part) for part in parts], positions)
    for name in _OPTIONAL:
        columns[name] = pa.array([row.arrays.get(name) for row in rows], SCHEMA.field(name).type)
    return pa.table(columns, schema=SCHEMA)


def completed(table: pa.Table) -> pa.Table:
    """Return a table with the columns that earlier versions did not write, all null, where they are missing."""
    for name in _OPTIONAL:
        if name not in table.column_names:
            table = table.append_column(SCHEMA.field(name), pa.nulls(table.num_rows, SCHEMA.field(name).type))
    return table


def _lists(lengths: Sequence[int] | Array, values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def from_table(table: pa.Table) -> list[Observation]:
    """Turn rows of `SCHEMA` into observations, in their order."""
    readers: dict[str, Callable[[int], Array | None]] = {}
    readers |= {name: _flat_reader(table[name].combine_chunks()) for name in _FLAT}
    readers |= {name: _nested_reader(table[name].combine_chunks()) for name in _NESTED}
    readers |= {name: _optional_reader(table[name].combine_chunks()) for name in _OPTIONAL}
    return [
        Observation(**{name: _tensor(read(index)) for name, read in readers.items()})
        for index in range(table.num_rows)
    ]


def _tensor(array: Array | None) -> Any:
    if array is None:
        return None
    return torch.from_numpy(array.astype(_IN_MEMORY.get(array.dtype, array.dtype)))


def _flat_reader(column: pa.ListArray) -> Callable[[int], Array]:
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)  # booleans are single bits in Arrow
    return lambda index: values[offsets[index] : offsets[index + 1]]


def _optional_reader(column: pa.ListArray) -> Callable[[int], Array | None]:
    read, given = _flat_reader(column), column.is_valid().to_numpy(zero_copy_only=False)
    return lambda index: read(index) if given[index] else None


def _nested_reader(column: pa.ListArray) -> Callable[[int], Array]:
    offsets, inner = column.offsets.to_numpy(), column.values.offsets.to_numpy()
    values: Array = column.values.values.to_numpy()

    def read(index: int) -> Array:
        """Return a row's array, `(positions, k)`; its inner lists are of one length."""
        start, end = offsets[index], offsets[index + 1]
        width = inner[start + 1] - inner[start] if end > start else 0
        part: Array = values[inner[start] : inner[end]]
        return part.reshape(end - start, width)

    return read

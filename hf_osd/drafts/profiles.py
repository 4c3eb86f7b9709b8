"""Measured costs of a model's forwards: looked up, interpolated, and kept on disk by machine and model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from huggingface_hub import constants

from ..config import reason_of, shown
from ..errors import InputError

Shape = tuple[int, int, int]
"""Rows, tokens in the cache, and tokens fed to each row."""


@dataclass(frozen=True, slots=True)
class Cost:
    """
    Seconds of a forward.

    Attributes:
        batch (`int`): Rows.
        context (`int`): Tokens of each row that are in the cache.
        tokens (`int`): Tokens fed to each row.
        seconds (`float`): Median.
        low, high (`float`): First and third quartile.
    """

    batch: int
    context: int
    tokens: int
    seconds: float
    low: float
    high: float

    @property
    def shape(self) -> Shape:
        """Batch, context and tokens."""
        return self.batch, self.context, self.tokens


@dataclass(frozen=True)
class Profile:
    """
    Seconds of a model's forwards by batch, context and tokens fed.

    Attributes:
        about (`Mapping[str, Any]`): What was measured, and where: plain data.
        costs (`tuple[Cost, ...]`): One of each shape in a full grid of batches, contexts and tokens.

    Raises:
        InputError: There are no costs, or the grid has holes.
    """

    about: Mapping[str, Any]
    costs: tuple[Cost, ...]
    _grid: dict[int, dict[int, dict[int, float]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid: dict[int, dict[int, dict[int, float]]] = {}
        for cost in self.costs:
            grid.setdefault(cost.batch, {}).setdefault(cost.context, {})[cost.tokens] = cost.seconds
        object.__setattr__(self, "_grid", grid)
        axes = [{cost.shape[axis] for cost in self.costs} for axis in range(3)]
        if not self.costs or len({cost.shape for cost in self.costs}) != len(axes[0]) * len(axes[1]) * len(axes[2]):
            raise InputError(f"a profile needs every shape of a grid, got {shown([c.shape for c in self.costs])}")

    @property
    def longest(self) -> int:
        """Most tokens fed to a row."""
        return max(cost.tokens for cost in self.costs)

    @property
    def spread(self) -> float:
        """Largest interquartile range of a shape, as a share of its median."""
        return max((cost.high - cost.low) / cost.seconds for cost in self.costs)

    def seconds(self, batch: int, context: int, tokens: int) -> float:
        """
        Return the seconds of a forward.

        Measured shapes are looked up. Between them costs are interpolated linearly in each of the three directions;
        below the smallest they are constant, beyond the largest they are extrapolated, never falling.

        Args:
            batch (`int`): Rows, at least 1.
            context (`int`): Tokens of each row in the cache, at least 0.
            tokens (`int`): Tokens fed to each row, at least 1.

        Raises:
            InputError: An argument is below its least value.
        """
        for name, value, least in (("batch", batch, 1), ("context", context, 0), ("tokens", tokens, 1)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {shown(value)}")
        return _read(
            {
                rows: _read({cached: _read(line, tokens) for cached, line in plane.items()}, context)
                for rows, plane in self._grid.items()
            },
            batch,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {"about": dict(self.about), "costs": [asdict(cost) for cost in self.costs]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """
        Return the profile that [`to_dict`] wrote.

        Raises:
            InputError: It wrote something else.
        """
        try:
            return cls(dict(values["about"]), tuple(Cost(**cost) for cost in values["costs"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no profile ({reason_of(error)}), got {shown(values)}") from error

    def save(self, path: str | Path) -> None:
        """
        Write a JSON file, and the folders above it.

        Raises:
            OSError: The file cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")  # a reader never finds half a file
        whole.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        whole.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """
        Read a file of [`save`].

        Raises:
            InputError: The file holds no profile.
            OSError: The file cannot be read.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # JSON's own, too
            raise InputError(f"{path}: {reason_of(error)}") from error


def kept_path(name: str) -> Path:
    """Return where a profile is kept for later runs, below `HF_HOME`."""
    return Path(constants.HF_HOME) / "hf_osd" / "profiles" / f"{name}.json"


def shapes_of(batches: Iterable[int], contexts: Iterable[int], lengths: Iterable[int]) -> list[Shape]:
    """Return every shape of a grid, each once, in order."""
    return sorted({(batch, context, tokens) for batch in batches for context in contexts for tokens in lengths})


def _read(points: Mapping[int, float], at: int) -> float:
    """Interpolate linearly; constant below the first point, and beyond the last where there is only one."""
    known = sorted(points.items())
    if at <= known[0][0] or len(known) == 1:
        return known[0][1]
    for (left, low), (right, high) in pairwise(known):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    (left, low), (right, high) = known[-2:]
    return high + max(high - low, 0.0) * (at - right) / (right - left)

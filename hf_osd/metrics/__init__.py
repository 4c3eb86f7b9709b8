"""Metrics for the `evaluate` library, and functions that turn an assistant's records into their inputs."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from ..records import Observation
    from ..stats import OnlineStats

__all__ = ["from_observations", "from_stats", "load", "path"]

_NAMES = ("speculation",)


def path(name: str) -> str:
    """
    Return the folder of a metric, for [`~evaluate.load`] and [`~evaluate.combine`].

    Args:
        name (`str`): `"speculation"`.

    Raises:
        InputError: There is no metric of that name.

    Example:

    ```python
    >>> import evaluate, hf_osd.metrics
    >>> metric = evaluate.load(hf_osd.metrics.path("speculation"))
    ```
    """
    if name not in _NAMES:
        raise InputError(f"there is no metric {name!r}, only {', '.join(_NAMES)}")
    return str(Path(__file__).parent / name)


def load(name: str, **kwargs: Any) -> Any:
    """
    Load a metric that comes with this package; nothing is downloaded.

    `evaluate` copies the script of a metric to its cache of modules before it imports it, as it does with all, so the
    package may be installed read-only, but that cache (`HF_MODULES_CACHE`, under `HF_HOME`) has to be writable.

    Args:
        name (`str`): `"speculation"`.
        kwargs: For [`~evaluate.load`]: `cache_dir`, `keep_in_memory`, `experiment_id`, `num_process` ...

    Returns:
        `evaluate.Metric`: The metric.

    Raises:
        InputError: There is no metric of that name.
        MissingDependencyError: `evaluate` is not installed.
    """
    folder = path(name)
    if find_spec("evaluate") is None:
        raise MissingDependencyError('the metrics need evaluate: pip install "hf-osd[evaluate]"')
    import evaluate  # type: ignore[import-untyped, unused-ignore]

    return evaluate.load(folder, **kwargs)


def from_stats(requests: "Iterable[OnlineStats]") -> dict[str, list[int]]:
    """
    Turn an assistant's counters into inputs of `"speculation"`.

    Lookups lower `target_passes`, though their tokens are neither `drafted` nor `accepted`.

    Args:
        requests (`Iterable[OnlineStats]`):
            The counters of each request alone; those of a whole batch count as one request.

    Returns:
        `dict[str, list[int]]`: `accepted`, `drafted`, `generated` and `target_passes`, one entry a request.

    Example:

    ```python
    >>> requests = []
    >>> for inputs in stream:
    ...     before = assistant.stats()
    ...     hf_osd.generate(target, **inputs, online_assistant=assistant)
    ...     requests.append(assistant.stats() - before)
    >>> metric.compute(**hf_osd.metrics.from_stats(requests))
    ```
    """
    return _columns(
        (one.accepted_tokens, one.draft_tokens, one.generated_tokens, one.target_passes) for one in requests
    )


def from_observations(observations: "Iterable[Observation]") -> dict[str, list[int]]:
    """
    Turn recorded requests into inputs of `"speculation"`: what the draft alone yields.

    A pass of the target is counted for each position where the draft was wrong. With `prompt_lookup`, accepted lookups
    save some of these passes, and [`from_stats`] has the true number.

    Args:
        observations (`Iterable[Observation]`): Recorded requests.

    Returns:
        `dict[str, list[int]]`: `accepted`, `drafted`, `generated` and `target_passes`, one entry a request.
    """
    return _columns(_counts(observation) for observation in observations)


def _counts(observation: "Observation") -> tuple[int, int, int, int]:
    generated, accepted = len(observation.output_ids), int(observation.accepted.sum())
    cut_short = generated > 0 and bool(observation.accepted[-1])  # a last pass without a token of the target's own
    return accepted, int((observation.draft_ids >= 0).sum()), generated, generated - accepted + cut_short


def _columns(rows: Iterable[tuple[int, int, int, int]]) -> dict[str, list[int]]:
    table = list(rows)
    names = ("accepted", "drafted", "generated", "target_passes")
    return {name: [row[column] for row in table] for column, name in enumerate(names)}

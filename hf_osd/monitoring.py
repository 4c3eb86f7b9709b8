"""
Prometheus metrics of assistants. Their counters are read when Prometheus asks, so serving does no extra work.

Not covered: prometheus_client's multiprocess mode, which keeps values in files of its own; give each process a port.
"""

import re
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Protocol, get_args

from .errors import ConfigError, MissingDependencyError
from .journal import Decision, Journal
from .reporting import mean_acceptance

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    Family = CounterMetricFamily | GaugeMetricFamily

__all__ = ["register", "unregister"]

_RECENT = 100  # scored requests that the gauge `recent_acceptance_ratio` averages over
_TAKEN = ("decision", "reason", "route")  # labels that metrics have by themselves
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

# Fields of `OnlineStats` that become counters, and the help that Prometheus shows for them.
_COUNTERS = {
    "requests": "Prompts served; a batch counts each of its rows.",
    "generated_tokens": "Tokens of the outputs.",
    "target_passes": "Forward passes of the target, once for each row that a pass went on with.",
    "submitted_tokens": "Proposed tokens that the target checked, of the draft and of the lookup.",
    "proposed_tokens": "Tokens that the draft chose.",
    "draft_tokens": "Tokens of the draft that the target judged.",
    "accepted_tokens": "Tokens of the draft that were right.",
    "accepted_other_tokens": "Accepted tokens that were the draft's second, third or fourth choice.",
    "lookup_tokens": "Places where the target judged tokens of the lookup.",
    "accepted_lookup_tokens": "Of these, places where one of them was right.",
    "decode_seconds": "Wall time of speculative decoding, summed over calls.",
    "draft_seconds": "Part of decode_seconds that the draft took.",
    "verify_seconds": "Part of decode_seconds that the passes of the target took.",
    "accept_seconds": "Part of decode_seconds that comparing the two took.",
    "record_seconds": "Part of decode_seconds that recording took.",
    "learned_steps": "Optimiser steps.",
    "learned_positions": "Positions learned from, once for each step.",
    "learn_seconds": "Wall time of learning: training, scoring and imports, without pauses.",
    "saved_seconds": "Estimated time of the target that learning has saved.",
}
_GAUGES = {
    "tokens_per_target_pass": "Tokens that a pass of the target yields for a row, since the start.",
    "recent_acceptance_ratio": f"Positions of the last {_RECENT} scored requests where the draft chose as the target.",
}
_FALLBACKS = "Prompts served without the draft, or by the target's own decoding alone, by reason."
_UPDATES = "Updates of the draft and changes of the live weights, by decision."
_DRIFTS = "Changes of the traffic that were noticed."


class Assistant(Protocol):
    """What monitoring reads of an [`OnlineAssistant`]."""

    @property
    def journal(self) -> Journal:
        """What learning did."""
        ...

    def stats(self) -> Any:
        """Return the counters, an `OnlineStats`, as they are now."""
        ...


def register(
    assistant: Assistant, registry: "CollectorRegistry | None" = None, labels: Mapping[str, str] | None = None
) -> None:
    """
    Show an assistant's counters to Prometheus, for as long as the assistant lives; monitoring does not keep it alive.

    Counters are those of [`OnlineStats`], named `hf_osd_requests_total`, `hf_osd_accepted_tokens_total`,
    `hf_osd_learn_seconds_total` and so on, with `hf_osd_fallbacks_total` by `reason`, `hf_osd_updates_total` by
    `decision` and `hf_osd_drifts_total`; gauges are `hf_osd_recent_acceptance_ratio`, over the last 100 scored
    requests, and `hf_osd_tokens_per_target_pass`. Those of an assistant with routes have the label `route`, which is
    empty for prompts that no draft served, and for other assistants in the registry.

    Args:
        assistant (`OnlineAssistant`): What to show. May be registered in several registries.
        registry ([`~prometheus_client.CollectorRegistry`], *optional*): Defaults to that of `prometheus_client`.
        labels (`Mapping[str, str]`, *optional*): Put on every metric of this assistant. Assistants that share a
            registry need the same names and different values. Registering one again changes its labels.

    Raises:
        MissingDependencyError: `prometheus_client` is not installed.
        ConfigError: A label has no valid name, or the labels do not tell the assistant from others in the registry.

    Example:

    ```python
    >>> from prometheus_client import start_http_server
    >>> hf_osd.monitoring.register(assistant, labels={"draft": "qwen3-0.6b"})
    >>> start_http_server(9400)
    ```
    """
    registry = _resolve(registry)
    labels = {name: str(value) for name, value in (labels or {}).items()}
    for name in labels:
        if not _LABEL.fullmatch(name) or name in _TAKEN:
            raise ConfigError(f"labels: {name!r} is no name of a label, or is taken")
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = _Collector()
            registry.register(collector)
            _collectors[registry] = collector
        collector.add(assistant, labels)


def unregister(assistant: Assistant, registry: "CollectorRegistry | None" = None) -> None:
    """
    Stop showing an assistant. Does nothing where it is not registered.

    Args:
        assistant (`OnlineAssistant`): What to hide.
        registry ([`~prometheus_client.CollectorRegistry`], *optional*): Defaults to that of `prometheus_client`.

    Raises:
        MissingDependencyError: `prometheus_client` is not installed.
    """
    collector = _collectors.get(_resolve(registry))
    if collector is not None:
        collector.remove(assistant)


def _resolve(registry: "CollectorRegistry | None") -> "CollectorRegistry":
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise MissingDependencyError('monitoring needs prometheus_client: pip install "hf-osd[prometheus]"') from error
    return REGISTRY if registry is None else registry


class _Tally:
    """Counts all entries that a bounded list has ever had: each call counts those that are new since the last one."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._last: object = None

    def take(self, entries: Sequence[Any], name: Callable[[Any], str]) -> None:
        """Count the entries that are new since the last call, each under what `name` returns for it."""
        fresh = list(takewhile(lambda entry: entry is not self._last, reversed(entries)))
        self.counts.update(map(name, fresh))
        self._last = entries[-1] if entries else self._last


class _Tallies:
    """What one journal has had."""

    def __init__(self) -> None:
        self.updates, self.drifts = _Tally(), _Tally()


class _Source:
    """One assistant in a registry."""

    def __init__(self, assistant: Assistant, labels: dict[str, str]) -> None:
        self.assistant = weakref.ref(assistant)
        self.labels = labels
        self.tallies: defaultdict[str, _Tallies] = defaultdict(_Tallies)  # by route


class _Collector:
    """The assistants of one registry. One collector for all of them, since a registry takes each metric name once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: list[_Source] = []

    def add(self, assistant: Assistant, labels: dict[str, str]) -> None:
        with self._lock:
            others = self._others(assistant)
            for other in others:
                if other.labels.keys() != labels.keys() or other.labels == labels:
                    raise ConfigError(
                        "labels must tell the assistants of a registry apart, by the same names: one of them has "
                        f"{other.labels}, got {labels}"
                    )
            self._sources = [*others, _Source(assistant, labels)]

    def remove(self, assistant: Assistant) -> None:
        with self._lock:
            self._sources = self._others(assistant)

    def _others(self, assistant: Assistant) -> list[_Source]:
        """Return the sources of other assistants that still exist."""
        return [source for source in self._sources if source.assistant() not in (None, assistant)]

    def describe(self) -> "Iterable[Family]":
        """Return the metrics without samples: prometheus_client reserves their names."""
        return _Families([]).all.values()

    def collect(self) -> "Iterable[Family]":
        """Return the metrics as they are now."""
        with self._lock:
            living = [(source, kept) for source in self._sources if (kept := source.assistant()) is not None]
            counted = [(source, kept, kept.stats()) for source, kept in living]
            names = [*living[0][0].labels] if living else []
            families = _Families(names, any(stats.routes for _, _, stats in counted))
            for source, assistant, stats in counted:
                families.add(source, assistant, stats)
        return families.all.values()


class _Families:
    """The metrics of one answer to Prometheus, by route where any assistant has some."""

    def __init__(self, names: list[str], has_routes: bool = False) -> None:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        self._names, self._has_routes = names, has_routes
        labels = [*names, "route"] if has_routes else names
        self.all: dict[str, Family] = {
            name: CounterMetricFamily(f"hf_osd_{name}", text, labels=labels) for name, text in _COUNTERS.items()
        }
        self.all["fallbacks"] = CounterMetricFamily("hf_osd_fallbacks", _FALLBACKS, labels=[*labels, "reason"])
        self.all["updates"] = CounterMetricFamily("hf_osd_updates", _UPDATES, labels=[*labels, "decision"])
        self.all["drifts"] = CounterMetricFamily("hf_osd_drifts", _DRIFTS, labels=labels)
        self.all |= {name: GaugeMetricFamily(f"hf_osd_{name}", text, labels=labels) for name, text in _GAUGES.items()}

    def add(self, source: _Source, assistant: Any, stats: Any) -> None:
        """Add what an assistant has counted, under the labels of its source."""
        own = [source.labels[name] for name in self._names]
        without = [*own, ""] if self._has_routes else own
        for name, one in stats.routes.items():
            self._add_draft([*own, name], one, assistant.routes[name].journal, source.tallies[name])
        if stats.routes:
            undrafted = stats.requests - sum(one.requests for one in stats.routes.values())
            self.all["requests"].add_metric(without, undrafted)
        else:
            self._add_draft(without, stats, assistant.journal, source.tallies[""])
        for reason, count in stats.fallback_reasons.items():
            self.all["fallbacks"].add_metric([*without, reason], count)

    def _add_draft(self, values: list[str], stats: Any, journal: Journal, tallies: _Tallies) -> None:
        for name in (*_COUNTERS, "tokens_per_target_pass"):
            self.all[name].add_metric(values, getattr(stats, name))
        tallies.updates.take(journal.updates, lambda update: update.decision)
        tallies.drifts.take(journal.drifts, lambda drift: "noticed")
        for decision in get_args(Decision):
            self.all["updates"].add_metric([*values, decision], tallies.updates.counts[decision])
        self.all["drifts"].add_metric(values, tallies.drifts.counts["noticed"])
        acceptance = mean_acceptance(journal.requests[-_RECENT:])
        if acceptance is not None:
            self.all["recent_acceptance_ratio"].add_metric(values, acceptance)


_lock = threading.Lock()
_collectors: "weakref.WeakKeyDictionary[CollectorRegistry, _Collector]" = weakref.WeakKeyDictionary()

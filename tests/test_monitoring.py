"""Prometheus metrics of assistants, and the trackers that `report_to` names."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from fakes import prompts, tiny_model
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import hf_osd
from hf_osd import ConfigError, MissingDependencyError, OnlineAssistant, OnlineConfig, OnlineStats
from hf_osd import journal as journal_module
from hf_osd.journal import Decision, Drift, Journal, JudgedRequest, UpdateRecord
from hf_osd.monitoring import register, unregister


class Assistant:
    """What monitoring reads of an assistant."""

    def __init__(self, **counters: float) -> None:
        self.counters = counters
        self.journal = Journal()

    def stats(self) -> OnlineStats:
        return OnlineStats(**self.counters)


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """What Prometheus reads, by its strictest parser; it refuses a metric that is shown twice."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def update(decision: Decision) -> UpdateRecord:
    return UpdateRecord(request=1, decision=decision, reason="")


def test_counters_and_gauges():
    """Catches a counter under the wrong name or field, and decisions that are missing until they happen."""
    registry = CollectorRegistry()
    assistant = Assistant(requests=3, generated_tokens=30, target_passes=12, draft_tokens=20, learn_seconds=1.5)
    assistant.journal.add(update("refused"))
    assistant.journal.add(Drift(1, 0.1, 0.5))
    for acceptance, positions in ((0.0, 30), (1.0, 10)):
        assistant.journal.add(JudgedRequest(1, acceptance, positions, 0.0))
    register(assistant, registry)
    found = samples(registry)
    assert found["hf_osd_requests_total"] == 3
    assert found["hf_osd_draft_tokens_total"] == 20
    assert found["hf_osd_learn_seconds_total"] == 1.5
    assert found["hf_osd_tokens_per_target_pass"] == 2.5
    assert found["hf_osd_recent_acceptance_ratio"] == 0.25
    assert found["hf_osd_drifts_total"] == 1
    decisions = {name: found[f"hf_osd_updates_total|decision={name}"] for name in get_args(Decision)}
    assert decisions == {name: float(name == "refused") for name in get_args(Decision)}


def test_values_are_those_of_the_moment():
    """Catches counters copied when they were registered."""
    registry = CollectorRegistry()
    assistant = Assistant(requests=1)
    register(assistant, registry)
    assistant.counters["requests"] = 2
    assert samples(registry)["hf_osd_requests_total"] == 2
    assert "hf_osd_recent_acceptance_ratio" not in samples(registry)  # nothing was judged: no figure, not 0


def test_updates_never_fall_when_the_journal_forgets(monkeypatch):
    """Catches counting what the journal holds: once it is full the count would stand still or fall."""
    monkeypatch.setattr(journal_module, "_ENTRIES", 3)
    registry = CollectorRegistry()
    assistant = Assistant()
    register(assistant, registry)
    counted = []
    for decision in ("published", "published", "held", "published", "published", "refused", "published"):
        assistant.journal.add(update(decision))
        counted.append(samples(registry)["hf_osd_updates_total|decision=published"])
    assert counted == [1, 2, 2, 3, 4, 4, 5]
    assert samples(registry)["hf_osd_updates_total|decision=published"] == 5


def test_two_assistants_share_a_registry():
    """Catches the second one being refused, or shown under a heading of its own, which Prometheus refuses."""
    registry = CollectorRegistry(auto_describe=True)
    one, other = Assistant(requests=1), Assistant(requests=2)
    register(one, registry, {"draft": "one"})
    register(other, registry, {"draft": "other"})
    found = samples(registry)
    assert (found["hf_osd_requests_total|draft=one"], found["hf_osd_requests_total|draft=other"]) == (1, 2)
    unregister(one, registry)
    assert "hf_osd_requests_total|draft=one" not in samples(registry)
    assert "hf_osd_requests_total|draft=other" in samples(registry)


def test_routes_have_a_label_of_their_own():
    """Catches counters of all routes beside what one of them learned, and prompts that are counted twice or not."""
    registry = CollectorRegistry()
    single, several = Assistant(requests=1, generated_tokens=4), Assistant()
    routes = {name: Assistant(requests=number, generated_tokens=10 * number) for number, name in enumerate("ab", 2)}
    for number, route in enumerate(routes.values(), 1):
        for _ in range(number):
            route.journal.add(update("published"))
        route.journal.add(JudgedRequest(1, number / 4, 10, 0.0))
    several.counters |= {"requests": 9, "fallbacks": 4, "fallback_reasons": {"beam search": 4}}
    several.routes = routes
    register(single, registry, {"draft": "one"})
    assert "route" not in "".join(samples(registry))
    register(several, registry, {"draft": "more"})
    several.counters["routes"] = {name: route.stats() for name, route in routes.items()}
    found = samples(registry)
    requests = {name: found[f"hf_osd_requests_total|draft=more|route={name}"] for name in ("", "a", "b")}
    assert requests == {"": 4, "a": 2, "b": 3}
    assert found["hf_osd_requests_total|draft=one|route="] == 1
    assert found["hf_osd_generated_tokens_total|draft=more|route=b"] == 30
    assert "hf_osd_generated_tokens_total|draft=more|route=" not in found
    assert found["hf_osd_fallbacks_total|draft=more|reason=beam search|route="] == 4
    assert found["hf_osd_updates_total|decision=published|draft=more|route=b"] == 2
    assert found["hf_osd_recent_acceptance_ratio|draft=more|route=a"] == 0.25


@pytest.mark.parametrize("labels", [None, {"draft": "one"}, {"model": "two"}])
def test_assistants_that_cannot_be_told_apart_are_refused(labels):
    """Catches two assistants whose samples overwrite each other, or label sets that make the whole answer invalid."""
    registry = CollectorRegistry()
    one, other = Assistant(requests=1), Assistant(requests=2)
    register(one, registry, {"draft": "one"})
    with pytest.raises(ConfigError, match="tell the assistants of a registry apart"):
        register(other, registry, labels)
    register(one, registry, {"draft": "renamed"})
    assert [name for name in samples(registry) if "requests" in name] == ["hf_osd_requests_total|draft=renamed"]


@pytest.mark.parametrize("name", ["decision", "route", "__reserved", "with space", "", "9th"])
def test_bad_labels_are_refused(name):
    """Catches a label that breaks every answer to Prometheus from then on, of other libraries too."""
    with pytest.raises(ConfigError, match="no name of a label"):
        register(Assistant(), CollectorRegistry(), {name: "value"})


def test_monitoring_keeps_no_assistant_alive():
    """Catches a registry that holds drafts, and their memory, for ever; and a label that stays taken."""
    registry = CollectorRegistry()
    assistant = Assistant(requests=1)
    register(assistant, registry, {"draft": "one"})
    del assistant
    gc.collect()
    assert samples(registry) == {}
    replacement = Assistant(requests=7)
    register(replacement, registry, {"draft": "one"})
    assert samples(registry)["hf_osd_requests_total|draft=one"] == 7


def test_missing_prometheus_client_is_named(monkeypatch):
    """Catches a bare ImportError where the extra is not installed."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"hf-osd\[prometheus\]"):
        register(Assistant())


def learn(**arguments: object) -> OnlineStats:
    """Serve until a tiny draft has been updated twice."""
    target = tiny_model("llama", dtype=torch.float32)
    draft = tiny_model("llama", seed=5, layers=1, dtype=torch.float32)
    fast = {"update_every": 2, "steps_per_update": 1, "batch_size": 2, "draft_length_schedule": "constant"}
    with OnlineAssistant(draft, target, OnlineConfig(**fast, training_arguments=arguments)) as assistant:
        for seed in range(4):
            hf_osd.generate(target, **prompts(1, seed=seed), online_assistant=assistant, max_new_tokens=6)
        return assistant.stats()


def events(folder: Path) -> Iterator[Path]:
    return folder.rglob("events.out.tfevents.*")


@pytest.mark.parametrize("by", ["output_dir", "TENSORBOARD_LOGGING_DIR"])
def test_tensorboard_gets_the_loss_of_each_update(tmp_path, monkeypatch, by):
    """Catches a tracker that is accepted and never told anything, or that writes elsewhere."""
    monkeypatch.chdir(tmp_path)
    chosen = tmp_path / "chosen"
    if by == "TENSORBOARD_LOGGING_DIR":
        monkeypatch.setenv(by, str(chosen))
        learn(report_to="tensorboard")
    else:
        learn(report_to="tensorboard", output_dir=str(chosen))
    (path,) = events(chosen)
    assert list(events(tmp_path)) == [path]
    read = EventAccumulator(str(path.parent)).Reload()
    assert len(read.Scalars("train/online_loss")) == 2


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    """Catches folders and logs that a server leaves wherever it was started."""
    monkeypatch.chdir(tmp_path)
    assert learn().learned_steps > 0
    assert list(tmp_path.iterdir()) == []


def test_fallbacks_by_reason():
    """Catches requests without speculation that nobody sees, and a label of the caller's of the same name."""
    registry = CollectorRegistry()
    assistant = Assistant(requests=5, fallbacks=3, fallback_reasons={"beam search": 2, "draft: another tokenizer": 1})
    register(assistant, registry)
    found = samples(registry)
    assert found["hf_osd_fallbacks_total|reason=beam search"] == 2
    assert found["hf_osd_fallbacks_total|reason=draft: another tokenizer"] == 1
    with pytest.raises(ConfigError, match="reason"):
        register(assistant, CollectorRegistry(), labels={"reason": "x"})

"""The `evaluate` metric: its arithmetic, its inputs from an assistant, and loading it without a network."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import prompts, tiny_model, wrong_draft

import hf_osd
import hf_osd.metrics
from hf_osd import InputError, MissingDependencyError, OnlineAssistant, OnlineConfig
from hf_osd.metrics.rates import expected_speedup, ratio
from hf_osd.metrics.speculation.speculation import Speculation

TARGET = tiny_model("llama", dtype=torch.float32)
COUNTS = {"accepted": [6, 9], "drafted": [10, 10], "generated": [12, 14], "target_passes": [6, 5]}

OFFLINE = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
import hf_osd.metrics

metric = evaluate.load(hf_osd.metrics.path("speculation"))
assert isinstance(metric, evaluate.Metric)
for counts in json.loads(sys.argv[1]):
    metric.add(**counts)
by_path = metric.compute()
by_name = hf_osd.metrics.load("speculation").compute(**json.loads(sys.argv[2]))
print(json.dumps([by_path, by_name]))
"""


def metric(tmp_path: Path) -> Speculation:
    return Speculation(cache_dir=str(tmp_path), keep_in_memory=True)


def test_loads_without_network_and_leaves_the_package_alone(tmp_path):
    """Catches a script that evaluate cannot copy and import, asks the Hub for, or writes beside (read-only site)."""
    folder = Path(hf_osd.metrics.path("speculation"))
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    rows = [{name: values[row] for name, values in COUNTS.items()} for row in range(2)]
    command = [sys.executable, "-c", OFFLINE, json.dumps(rows), json.dumps(COUNTS)]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    by_path, by_name = json.loads(ran.stdout)
    assert by_path == by_name
    assert by_path["acceptance_rate"] == 0.75
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before
    assert list(tmp_path.rglob("speculation.py"))


def test_rates_are_ratios_of_sums(tmp_path):
    """Catches means of the requests' rates, in which a request of one token weighs as much as one of a hundred."""
    counts = {"accepted": [1, 9], "drafted": [1, 19], "generated": [2, 28], "target_passes": [2, 8]}
    results = metric(tmp_path).compute(**counts, cost_ratio=0.5, draft_length=2)
    assert (results["requests"], results["acceptance_rate"], results["tokens_per_target_pass"]) == (2, 0.5, 3.0)
    assert results["expected_speedup"] == (1 + 0.5 + 0.25) / 2.0
    low, high = results["acceptance_rate_interval"]
    assert 0.0 <= low < 0.5 < high <= 1.0


def test_nothing_drafted_is_no_rate_of_zero(tmp_path):
    """Catches a division by zero, and a 0.0 that reads as a useless draft where there was none."""
    counts = {"accepted": [0], "drafted": [0], "generated": [5], "target_passes": [5]}
    results = metric(tmp_path).compute(**counts, cost_ratio=0.1, draft_length=3)
    assert results["acceptance_rate"] is results["acceptance_rate_interval"] is results["expected_speedup"] is None
    assert results["tokens_per_target_pass"] == 1.0


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"accepted": [6, 11]}, {}, "request 1: accepted must not exceed drafted"),
        ({"generated": [-1, 14]}, {}, "request 0: counts must be integers of at least 0"),
        ({"target_passes": [6, 0]}, {}, "request 1: tokens were generated without a pass"),
        ({}, {"cost_ratio": 0.1}, "needs both cost_ratio and draft_length"),
        ({}, {"confidence_level": 95}, "confidence_level must be in"),
        ({}, {"cost_ratio": -0.1, "draft_length": 2}, "cost_ratio must be at least 0"),
        ({}, {"cost_ratio": 0.1, "draft_length": -2}, "draft_length must be an integer of at least 0"),
    ],
)
def test_impossible_inputs_are_named(tmp_path, changes, options, message):
    """Catches counts in the wrong columns, which would come out as a rate above one or a wrong speed-up."""
    with pytest.raises(InputError, match=message):
        metric(tmp_path).compute(**COUNTS | changes, **options)


def test_interval_covers_the_truth_where_requests_differ():
    """Catches an interval that takes the tokens of a request for independent: it would hold the truth too rarely."""
    source = random.Random(0)
    rounds, held = 300, 0
    for _ in range(rounds):
        drafted = [source.randint(5, 60) for _ in range(60)]
        rates = [source.betavariate(1.2, 1.2) for _ in drafted]  # 0.5 on average, and very different
        accepted = [sum(source.random() < rate for _ in range(k)) for rate, k in zip(rates, drafted, strict=True)]
        interval = ratio(accepted, drafted, 0.95, highest=1.0)[1]
        assert interval is not None
        held += interval[0] <= 0.5 <= interval[1]
    assert 0.91 <= held / rounds <= 0.985


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_expected_speedup_by_counting_outcomes(acceptance, length):
    """Catches an off-by-one in the exponent, and a division by zero for a perfect draft."""
    chances = [acceptance**n * (1 - acceptance) for n in range(length)] + [acceptance**length]
    tokens = sum(chance * (accepted + 1) for accepted, chance in enumerate(chances))
    assert expected_speedup(acceptance, length, 0.2) == pytest.approx(tokens / (length * 0.2 + 1))


def serve(draft, lengths, **options):
    """Serve a request of each length, one after another; what was recorded, and the counters of each."""
    config = OnlineConfig(update_every=1000, draft_length_schedule="constant", draft_length=3)
    observations, requests = [], []
    with OnlineAssistant(draft, TARGET, config) as assistant:
        assistant._learner.observe = observations.append
        for seed, length in enumerate(lengths):
            before = assistant.stats()
            inputs = {**prompts(1, seed=seed), "max_new_tokens": length, "pad_token_id": 0}
            hf_osd.generate(TARGET, **inputs, online_assistant=assistant, **options)
            requests.append(assistant.stats() - before)
    return observations, requests


@pytest.mark.parametrize("sample", [False, True])
def test_observations_and_stats_say_the_same(sample):
    """Catches passes miscounted, and drafted tokens counted beyond the first wrong one."""
    observations, requests = serve(wrong_draft(TARGET, "noisy"), [1, 2, 7, 12, 13], do_sample=sample)
    counts = hf_osd.metrics.from_stats(requests)
    assert hf_osd.metrics.from_observations(observations) == counts
    assert 0 < sum(counts["accepted"]) < sum(counts["drafted"])


def test_a_text_that_ends_in_a_drafted_token_took_a_pass():
    """Catches the last pass going missing where the draft's own end of text was accepted, with no token after it."""
    output = TARGET.generate(**prompts(1), max_new_tokens=9, do_sample=False)[0, 9:].tolist()
    place = next(place for place in (4, 5, 6) if output.index(output[place]) == place)  # rounds are of 3 + 1 tokens
    observations, requests = serve(wrong_draft(TARGET, "perfect"), [9], do_sample=False, eos_token_id=output[place])
    counts = hf_osd.metrics.from_observations(observations)
    assert counts == hf_osd.metrics.from_stats(requests)
    assert (counts["generated"], counts["target_passes"]) == ([place + 1], [2])


def test_no_observations_are_no_requests():
    """Catches columns that vanish with their entries, which evaluate would call missing inputs."""
    assert hf_osd.metrics.from_observations([]) == {name: [] for name in COUNTS}


def test_missing_evaluate_is_named(monkeypatch):
    """Catches an ImportError of another package's depths where the extra is not installed."""
    monkeypatch.setattr(hf_osd.metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"hf-osd\[evaluate\]"):
        hf_osd.metrics.load("speculation")
    with pytest.raises(InputError, match="no metric 'perplexity'"):
        hf_osd.metrics.path("perplexity")

"""Settings are checked when they are made: by type, at both ends of their range, by name and value."""

import dataclasses
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import ConfigError, HfOsdError, OnlineConfig, OnlineStats
from hf_osd.config import RULES, shown

NAMES = [field.name for field in dataclasses.fields(OnlineConfig)]
UNIT = st.floats(0.0, 1.0)
FIRST, LAST = -(2**63), 2**64 - 1  # seeds of torch

# What each field takes, written from its docstring and not from its rule.
VALID: dict[str, st.SearchStrategy[Any]] = {
    "draft_length": st.integers(0, 1024),
    "update_every": st.integers(1, 2**31),
    "background": st.booleans(),
    "learning_share": st.none() | st.floats(1e-6, 1e6),
    "state_dir": st.none() | st.sampled_from(["state", "a/b", ".", Path("state")]),
    "draft_nodes": st.integers(1, 1024),
    "draft_length_schedule": st.sampled_from(["measured", "heuristic", "constant"]),
    "prompt_lookup": st.booleans(),
    "recent_outputs": st.integers(0, 2**24),
    "confidence_threshold": UNIT | st.integers(0, 1),
    "unsupported": st.sampled_from(["warn", "error"]),
    "record_fraction": UNIT,
    "top_k_teacher": st.integers(1, 300_000),
    "replay_size": st.integers(1, 10**6),
    "max_state_bytes": st.integers(0, 2**40),
    "learn": st.booleans(),
    "loss": st.sampled_from(["jsd", "tv", "lk", "lk_hybrid"]),
    "beta": UNIT,
    "lmbda": UNIT,
    "positions": st.sampled_from(["all", "rejected"]),
    "full_teacher": st.booleans(),
    "steps_per_update": st.integers(1, 10**6),
    "batch_size": st.integers(1, 2**16),
    "max_length": st.integers(2, 2**24),
    "learning_rate": st.floats(1e-38, 1e30),
    "adaptive_learning_rate": st.booleans(),
    "duty_cycle": st.floats(1e-6, 1.0),
    "training_arguments": st.dictionaries(st.text(), st.integers() | st.lists(st.floats())),
    "peft_config": st.none() | st.dictionaries(st.text(), st.integers()),
    "gate": st.booleans(),
    "archive_size": st.integers(0, 1024),
    "flush_seconds": st.floats(0.001, 2_592_000.0),
    "max_disk_bytes": st.integers(1, 2**50),
    "time_to_live": st.none() | st.floats(1e-6, 1e9),
    "redact": st.none() | st.just(lambda observation: None),
    "seed": st.integers(FIRST, LAST),
}


class Hostile:
    """Fails at whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    __hash__ = object.__hash__


class HostileMapping(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise OSError(key)

    def __iter__(self) -> Any:
        raise OSError("iter")

    def __len__(self) -> int:
        return 1


LONG = st.sampled_from([10**20, -(10**20), 10**400, -(10**5000), 2**63, 2**64])
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 1e-300, 5e-324, -0.0, 1e300, 1e10])
OBJECTS = st.builds(
    lambda make: make(),
    st.sampled_from([
        object, Hostile, HostileMapping, lambda: Hostile, lambda: np.arange(3), lambda: torch.ones(2, 2),
        lambda: torch.tensor(True), lambda: np.float32("nan"), lambda: np.timedelta64(30, "s"), lambda: len,
        lambda: SimpleNamespace(peft_type="LORA"), lambda: "\ud800", lambda: "\0", lambda: {1: 2},
        lambda: {"lock": threading.Lock()},
    ]),
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
JUNK = SCALARS | LONG | ODD | OBJECTS | st.lists(SCALARS) | st.dictionaries(st.text() | st.integers(), SCALARS)
NUMERIC = [name for name in NAMES if isinstance(getattr(OnlineConfig(), name), int | float)]


@pytest.mark.parametrize("described", [OnlineConfig, OnlineStats])
def test_every_field_is_documented_in_the_order_of_its_declaration(described: type) -> None:
    """Catches a field that nobody is told about, and groups of the docstring that are not those of the code."""
    documented = re.findall(r"^ +(\w+) \(`", described.__doc__ or "", re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(described)]


def test_every_field_has_a_rule_and_is_tried_here() -> None:
    """Catches a field that is added without a check, or without a look at its values below."""
    assert set(RULES) == set(VALID) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_what_a_field_is_documented_to_take_is_taken(name: str, data: st.DataObject) -> None:
    """Catches a rule that refuses what its docstring promises, or that changes a value."""
    value = data.draw(VALID[name])
    assert getattr(OnlineConfig(**{name: value}), name) == value


@pytest.mark.parametrize("name", NAMES)
@given(value=JUNK)
def test_whatever_a_field_is_given_it_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    """Catches any other error than a `ConfigError`, a message that is pages long, and a value that is let through."""
    taken, refusal = made(name, value)
    if refusal is None:
        assert RULES[name].accepts(taken)
        assert type(taken) in (bool, int, float, str, dict, type(None)) or name in ("peft_config", "redact")
    else:
        assert refusal.startswith(f"{name} must be {RULES[name].allowed}, got ")
        assert len(refusal) < 400
        assert "\n" not in refusal


def made(name: str, value: Any) -> tuple[Any, str | None]:
    """What becomes of a value: what is kept of it, or why it is refused."""
    try:
        return getattr(OnlineConfig(**{name: value}), name), None
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("name", [name for name in NUMERIC if type(getattr(OnlineConfig(), name)) is not bool])
@pytest.mark.parametrize("value", [True, None, "1", "1e-3", [], (), {}, math.nan, math.inf, -math.inf, 1j])
def test_no_number_is_taken_from_another_type(name: str, value: Any) -> None:
    """Catches `"1e-3"` out of a shell, which is compared with a number in the middle of serving, and infinity."""
    with pytest.raises(ConfigError, match=rf"^{name} must be in \["):
        OnlineConfig(**{name: value})


@pytest.mark.parametrize("name", [name for name in NAMES if type(getattr(OnlineConfig(), name)) is bool])
@pytest.mark.parametrize("value", ["False", "no", "", 0, 1, 1.0, None, [], math.nan])
def test_a_flag_is_a_bool(name: str, value: Any) -> None:
    """Catches `learn="False"`, which would learn."""
    with pytest.raises(ConfigError, match=f"^{name} must be True or False, got "):
        OnlineConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_length", -1),
        ("draft_length", 2.5),
        ("draft_length", 2.0),
        ("draft_length", 10**20),
        ("draft_nodes", 0),
        ("draft_length_schedule", "some"),
        ("draft_length_schedule", None),
        ("confidence_threshold", 2.0),
        ("unsupported", "ignore"),
        ("update_every", 0),
        ("update_every", 2**64),
        ("duty_cycle", 1e-300),
        ("duty_cycle", 0.0),
        ("duty_cycle", 1.1),
        ("record_fraction", 1.7),
        ("top_k_teacher", 0),
        ("replay_size", True),
        ("replay_size", 10**12),
        ("steps_per_update", 10**9),
        ("batch_size", 10**9),
        ("positions", "some"),
        ("positions", ["all"]),
        ("loss", "kl"),
        ("beta", -0.1),
        ("lmbda", 1.5),
        ("archive_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", 5e-324),
        ("max_length", 1),
        ("training_arguments", None),
        ("training_arguments", [("optim", "sgd")]),
        ("training_arguments", {1: 2}),
        ("peft_config", "lora"),
        ("peft_config", {1: 2}),
        ("state_dir", ""),
        ("state_dir", "  "),
        ("state_dir", 1),
        ("state_dir", b"state"),
        ("state_dir", "a\0b"),
        ("flush_seconds", 0.0),
        ("flush_seconds", 1e-9),
        ("flush_seconds", 1e10),
        ("max_disk_bytes", 0),
        ("time_to_live", float("inf")),
        ("time_to_live", float("nan")),
        ("time_to_live", 0),
        ("time_to_live", 1e12),
        ("redact", "x"),
        ("redact", 0),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("seed", 0.0),
    ],
)
def test_bad_values_name_the_setting_and_the_value(name: str, value: Any) -> None:
    """Catches settings that are only found wrong in the middle of serving."""
    with pytest.raises(ConfigError) as caught:
        OnlineConfig(**{name: value})
    assert str(caught.value) == f"{name} must be {RULES[name].allowed}, got {value!r}"
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, HfOsdError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**5000, "an object of type int"),
        ("x" * 10**6, f"'{'x' * 37}...{'x' * 38}'"),
        (torch.zeros(2, 2), "tensor([[0., 0.], [0., 0.]])"),
        ([[[[[[[[1]]]]]]]], "[[[[[[[...]]]]]]]"),
    ],
    ids=["integer", "text", "tensor", "list"],
)
def test_a_value_is_shown_in_one_short_line(value: Any, text: str) -> None:
    """Catches an error about an error: Python refuses to write integers of more than 4,300 digits."""
    assert shown(value) == text


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("learn", np.bool_(False), False),
        ("draft_length", np.int64(3), 3),
        ("seed", np.uint64(LAST), LAST),
        ("beta", np.float32(0.5), 0.5),
        ("beta", np.float64(0.5), 0.5),
        ("loss", np.str_("tv"), "tv"),
        ("beta", 1, 1.0),
    ],
)
def test_numbers_of_numpy_become_pythons_own(name: str, value: Any, kept: Any) -> None:
    """Catches a setting that JSON cannot hold, found when a draft is saved after hours of learning."""
    taken = getattr(OnlineConfig(**{name: value}), name)
    assert (type(taken), taken) == (type(kept), kept)
    assert json.loads(json.dumps(taken)) == kept


@pytest.mark.parametrize("name", ["draft_length", "flush_seconds", "seed"])
@pytest.mark.parametrize("value", [np.timedelta64(30, "s"), np.array(30), np.array([30]), torch.tensor(30)])
def test_a_time_or_an_array_of_numpy_is_no_number(name: str, value: Any) -> None:
    """Catches nanoseconds that are taken for seconds: numpy counts times among its integers."""
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        OnlineConfig(**{name: value})


@pytest.mark.parametrize("wrap", [dict, MappingProxyType])
@pytest.mark.parametrize("name", ["training_arguments", "peft_config"])
def test_what_the_caller_changes_later_does_not_matter(name: str, wrap: Callable[[Any], Any]) -> None:
    """Catches a learner whose settings change behind its back, between two updates."""
    mine: dict[str, Any] = {"optim": "sgd", "report_to": ["none"]}
    config = OnlineConfig(**{name: wrap(mine)})
    mine["optim"] = "adamw_torch"
    mine["report_to"].append("wandb")
    assert getattr(config, name) == {"optim": "sgd", "report_to": ["none"]}


def test_an_adapter_is_an_instance_and_is_copied() -> None:
    """Catches `peft_config=LoraConfig` without the parentheses, and an adapter that is changed after it was given."""
    peft = pytest.importorskip("peft")
    mine = peft.LoraConfig(r=4)
    config = OnlineConfig(peft_config=mine)
    mine.r = 8
    assert config.peft_config.r == 4
    with pytest.raises(ConfigError, match=r"^peft_config must be a mapping .*, a peft.PeftConfig or None, got "):
        OnlineConfig(peft_config=peft.LoraConfig)


def test_a_divergence_is_chosen_for_the_loss_that_has_one() -> None:
    """Catches `beta` being dropped without a word by a loss that knows none."""
    assert OnlineConfig(loss="jsd", beta=0.5).beta == 0.5
    with pytest.raises(ConfigError, match=r"beta=0.5 means nothing with loss='lk': leave it out"):
        OnlineConfig(loss="lk", beta=0.5)


def test_every_wait_is_one_that_threads_can_wait() -> None:
    """Catches an OverflowError in the thread that writes; Windows waits for 49 days at most."""
    longest = OnlineConfig(flush_seconds=2_592_000).flush_seconds
    assert longest < min(threading.TIMEOUT_MAX, (2**32 - 1) / 1000)


def test_the_longest_life_is_a_date() -> None:
    """Catches an OverflowError when the time to live is subtracted from today."""
    from datetime import UTC, datetime, timedelta

    life = OnlineConfig(time_to_live=1e9).time_to_live
    assert life is not None
    assert (datetime.now(UTC) - timedelta(seconds=life)).year > 1900


@pytest.mark.parametrize("seed", [FIRST, LAST])
def test_every_seed_is_one_of_torch(seed: int) -> None:
    """Catches a seed that only the first update finds too large."""
    assert torch.Generator().manual_seed(OnlineConfig(seed=seed).seed) is not None


def test_config_is_frozen() -> None:
    """Catches settings changed behind the back of a running learner."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        OnlineConfig().draft_length = 3  # type: ignore[misc]


def test_settings_survive_json_and_replacement() -> None:
    """Catches saved settings that no longer load, and a copy that is checked otherwise than the original."""
    config = OnlineConfig(learning_rate=1, training_arguments={"optim": "sgd"}, peft_config={"r": 4}, time_to_live=9)
    again = OnlineConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config == dataclasses.replace(config)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, False), ({"full_teacher": True}, True), ({"lmbda": 0.1}, True), ({"lmbda": 0.0}, False)],
)
def test_who_needs_the_target(settings: dict[str, Any], needed: bool) -> None:
    """Catches a target that is kept alive for nothing, and on-policy learning without one."""
    assert OnlineConfig(**settings).needs_target is needed


def test_nothing_is_stored_unless_asked_for() -> None:
    """Catches a default that writes prompts to disk, or lets them live there for ever without a bound in bytes."""
    config = OnlineConfig()
    assert config.state_dir is None
    assert config.max_disk_bytes == 256 * 2**20
    assert OnlineConfig(time_to_live=None).time_to_live is None


def test_what_cannot_be_served_fast_is_served_unless_told_otherwise() -> None:
    """Catches a default that turns a request that `generate` can answer into an error."""
    assert OnlineConfig().unsupported == "warn"
    assert OnlineConfig(unsupported="error").unsupported == "error"

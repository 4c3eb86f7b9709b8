"""Settings are refused when they are made, by name and value."""

import dataclasses

import pytest

from hf_osd import ConfigError, HfOsdError, OnlineConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_length", -1),
        ("draft_length", 2.5),
        ("update_every", 0),
        ("top_k_teacher", 0),
        ("record_fraction", 1.7),
        ("beta", -0.1),
        ("learning_rate", 0.0),
        ("positions", "some"),
        ("draft_length_schedule", "some"),
        ("confidence_threshold", 2.0),
        ("replay_size", True),
        ("loss", "kl"),
        ("lmbda", 1.5),
        ("archive_size", -1),
        ("flush_seconds", 0.0),
        ("time_to_live", float("inf")),
        ("max_disk_bytes", 0),
    ],
)
def test_bad_values_name_the_setting_and_the_value(name, value):
    """Catches settings that are only found wrong in the middle of serving."""
    with pytest.raises(ConfigError, match=f"{name}.*{value!r}"):
        OnlineConfig(**{name: value})
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, HfOsdError)


def test_config_is_frozen():
    """Catches settings changed behind the back of a running learner."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        OnlineConfig().draft_length = 3


@pytest.mark.parametrize(
    ("settings", "needed"),
    [({}, False), ({"full_teacher": True}, True), ({"lmbda": 0.1}, True), ({"lmbda": 0.0}, False)],
)
def test_who_needs_the_target(settings, needed):
    """Catches a target that is kept alive for nothing, and on-policy learning without one."""
    assert OnlineConfig(**settings).needs_target is needed


def test_nothing_is_stored_unless_asked_for():
    """Catches a default that writes prompts to disk, or lets them live there for ever without a bound in bytes."""
    config = OnlineConfig()
    assert config.state_dir is None
    assert config.max_disk_bytes == 256 * 2**20
    assert OnlineConfig(time_to_live=None).time_to_live is None

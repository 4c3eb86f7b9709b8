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

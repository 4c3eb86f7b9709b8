"""Saves and loads the settings of an assistant beside its draft, and loads tokenizers."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import OnlineConfig, reason_of

logger = logging.get_logger(__name__)


def saved_config(config: OnlineConfig) -> dict[str, Any]:
    """Return the settings to save: neither functions nor paths of this machine."""
    here = ("redact", "state_dir", "peft_config")
    saved = {entry.name: getattr(config, entry.name) for entry in fields(config) if entry.name not in here}
    adapter = config.peft_config
    plain = adapter.to_dict() if hasattr(adapter, "to_dict") else adapter
    saved["peft_config"] = plain if plain is None else dict(plain)
    return json.loads(json.dumps(saved, default=_plain))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """Convert what JSON does not take: sets, read-only mappings, enumerations."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def load_config(path: Path) -> OnlineConfig:
    """Load settings of [`saved_config`]; those that this version does not have are left out."""
    known = {field.name for field in fields(OnlineConfig)}
    return OnlineConfig(**{name: value for name, value in json.loads(path.read_text()).items() if name in known})


def load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer, or warn where there is none: tokenizers only help to refuse a wrong pair early."""
    try:
        return AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError) as error:
        logger.warning(
            "No tokenizer can be loaded from %s, so nothing checks that draft and target share one: %s",
            source,
            reason_of(error),
        )
        return None

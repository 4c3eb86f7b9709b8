"""Saves and loads the settings of an assistant beside its draft, and loads drafts."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from .config import OnlineConfig
from .drafts.sharing import share_encoder

_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")  # where a config lies


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


def saved_settings(state: Path) -> OnlineConfig | None:
    """Return the settings that lie in a state, if any; those that this version does not have are left out."""
    path, known = state / "config.json", {field.name for field in fields(OnlineConfig)}
    if not path.is_file():
        return None
    return OnlineConfig(**{name: value for name, value in json.loads(path.read_text()).items() if name in known})


def load_draft(source: str | Path, target: PreTrainedModel, **kwargs: Any) -> Any:
    """
    Load a draft, also one that peft has saved in a folder of its adapter's name.

    Args:
        source (`str` or `Path`): Hub id or local folder.
        target (`PreTrainedModel`): The target. Where it has an encoder, the draft keeps its own. One that hears as the
            target's does, which is so in Distil-Whisper, is the target's from then on: it does not run twice.
        kwargs: For `from_pretrained` of the model's class.
    """
    is_checkpoint = any((Path(source) / name).is_file() for name in ("config.json", "adapter_config.json"))
    named = [] if is_checkpoint else [path.parent for path in Path(source).glob("*/adapter_config.json")]
    if len(named) != 1:
        return _load_model(source, target, **kwargs)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(named[0])).base_model_name_or_path
    return PeftModel.from_pretrained(_load_model(base, target, **kwargs), named[0], adapter_name=named[0].name)


def _load_model(source: str | Path, target: PreTrainedModel, **kwargs: Any) -> Any:
    if not target.config.is_encoder_decoder:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    config = AutoConfig.from_pretrained(source, **{name: kwargs[name] for name in _HUB if name in kwargs})
    reads_text = target.main_input_name == "input_ids"
    draft = auto_class(config, reads_text).from_pretrained(source, **kwargs)
    if draft.config.is_encoder_decoder and not reads_text:  # one that reads text has its encoder to learn with
        share_encoder(draft, target)
    return draft


def auto_class(config: PreTrainedConfig, reads_text: bool) -> Any:
    """
    Return the Auto class of a checkpoint: what has no encoder, or is of no such class, is a decoder alone.

    Args:
        config (`PreTrainedConfig`): Of the checkpoint.
        reads_text (`bool`): What its encoder is to read, where it knows text and sounds.
    """
    speech: Any = AutoModelForSpeechSeq2Seq, MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    text: Any = AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    tried = [text, speech] if reads_text else [speech, text]
    fitting = [auto for auto, known in tried if config.is_encoder_decoder and type(config) in known]
    return [*fitting, AutoModelForCausalLM][0]

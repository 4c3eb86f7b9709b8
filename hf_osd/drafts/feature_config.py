"""The configuration of a draft that reads its target's states."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class FeatureDraftConfig(PreTrainedConfig):
    """
    Configuration of a [`FeatureDraft`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Of the draft's own layers: the target's text config,
            with fewer of them.
        state_layers (`Sequence[int]`, defaults to `()`): Layers of the target after which its states are read,
            counted from 1; none for a draft that reads tokens alone.
        target (`str`, defaults to `""`): Hub id or folder of the target it was made for.
        general_tokens (`int`, defaults to 0): How many tokens it proposes from whatever the traffic.
    """

    model_type = "hf_osd_feature_draft"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 -- transformers' own convention

    def __init__(
        self,
        text_config: Any = None,
        state_layers: Sequence[int] = (),
        target: str = "",
        general_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.state_layers = list(state_layers)
        self.target = target
        self.general_tokens = general_tokens
        super().__init__(**kwargs)


AutoConfig.register(FeatureDraftConfig.model_type, FeatureDraftConfig)

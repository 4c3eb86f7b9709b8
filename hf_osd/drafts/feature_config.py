"""The configuration of a draft that reads its target's states."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

LEARNING: dict[str, Any] = {
    "learning_rate": 3e-4,
    "steps_per_update": 1,
    "learning_share": 0.1,
}
"""Online settings that suit such a draft: updates of one step, and at most a tenth of the time of serving."""


class FeatureDraftConfig(PreTrainedConfig):
    """
    Configuration of a [`FeatureDraft`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): Of the draft's own layers: the target's text config,
            with fewer of them.
        state_layers (`Sequence[int]`, defaults to `()`): Layers of the target after which its states are read,
            counted from 1; none for a draft that reads tokens alone.
        target (`str`, defaults to `""`): Hub id or folder of the target it was made for.
        general_tokens (`int`, defaults to 0): How many tokens it always proposes from, whatever the traffic.
        solved (`int`, *optional*): Positions that the last closed-form solution used, 0 for a cold draft; see
            [`~hf_osd.drafts.starting.is_due`]. `None`, the default, for a draft that was trained: it is never solved
            for again.
        online (`Mapping[str, Any]`, *optional*): Fields of [`~hf_osd.OnlineConfig`] that suit it, used where the user
            gives no config; defaults to [`LEARNING`].
    """

    model_type = "hf_osd_feature_draft"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 -- transformers' own convention

    def __init__(
        self,
        text_config: Any = None,
        state_layers: Sequence[int] = (),
        target: str = "",
        general_tokens: int = 0,
        solved: int | None = None,
        online: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config if text_config is not None else AutoConfig.for_model("llama")
        self.state_layers = list(state_layers)
        self.target = target
        self.general_tokens = general_tokens
        self.solved = solved
        self.online = dict(LEARNING if online is None else online)
        super().__init__(**kwargs)


AutoConfig.register(FeatureDraftConfig.model_type, FeatureDraftConfig)

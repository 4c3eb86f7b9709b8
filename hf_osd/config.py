"""Settings of an `OnlineAssistant`, validated when they are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """
    Settings of an [`OnlineAssistant`]: how it drafts, what it records, and how it learns.

    Args:
        draft_length (`int`, defaults to 8):
            Tokens the draft proposes before each pass of the target, at most. 0 turns speculation off.
        draft_length_schedule (`str`, defaults to `"measured"`):
            `"measured"`: each round proposes as many tokens as promise the most tokens per second, by the measured
            costs of both models and the draft's acceptance so far; none where speculation does not pay.
            `"heuristic"`: within a request, one token less after each proposal that is not accepted in full, two more
            after one that is; transformers' `num_assistant_tokens_schedule`, bounded by `draft_length`. `"constant"`:
            always `draft_length`.
        prompt_lookup (`bool`, defaults to `True`):
            With `"measured"`: propose what followed the last few tokens earlier in the text, or in the outputs of
            recent requests, where that promises more than the draft. Costs no model.
        confidence_threshold (`float`, defaults to 0.0):
            With `"heuristic"` and `"constant"`: stop a proposal early once the product of the draft's own
            probabilities of it is no more than this: what follows would hardly be looked at. 0.0 always proposes in
            full.
        learn (`bool`, defaults to `True`):
            Whether the draft learns. `False` serves with a static draft and records nothing.
        update_every (`int`, defaults to 8):
            Recorded requests between two updates: the interval `I` of Online Speculative Decoding, Algorithm 1
            (https://arxiv.org/abs/2310.07177).
        background (`bool`, defaults to `False`):
            Where an update runs. `False`: inline, the request that completes the interval waits for it, and results
            are deterministic. `True`: in a thread, while serving goes on.
        duty_cycle (`float`, defaults to 0.1):
            With `background`, the share of the time that learning may take while requests are in flight, in (0, 1].
            1.0 learns as fast as it can; while serving is idle, it always does.
        record_fraction (`float`, defaults to 1.0):
            Fraction of requests to record, in [0, 1].
        top_k_teacher (`int`, defaults to 32):
            Log-probabilities of the target to keep at each position; the mass of all others is kept as one number.
        replay_size (`int`, defaults to 256):
            Requests that the replay buffer holds; the oldest leaves first.
        steps_per_update (`int`, defaults to 8):
            Optimiser steps in one update.
        batch_size (`int`, defaults to 8):
            Requests, sampled from the replay buffer, in one optimiser step.
        positions (`str`, defaults to `"all"`):
            Positions to learn from: `"all"` that the target verified, or `"rejected"`, as the paper does.
        beta (`float`, defaults to 0.0):
            Generalised Jensen-Shannon divergence, as in TRL's GKD (https://arxiv.org/abs/2306.13649, eq. 1):
            0.0 is the forward KL, 1.0 the reverse KL.
        learning_rate (`float`, defaults to 2e-3):
            Step size of a draft that accepts nothing; see `adaptive_learning_rate`.
        adaptive_learning_rate (`bool`, defaults to `True`):
            Scale the step size by how much the draft still gets wrong, so that a cold draft learns fast and a good
            one is not harmed. `False` uses `learning_rate` as it is.
        max_length (`int`, defaults to 1024):
            Tokens of a request (its end) that one training example keeps.
        full_teacher (`bool`, defaults to `False`):
            Re-run the target over the recorded requests for its full distribution instead of using the recorded one.
        training_arguments (`Mapping[str, Any]`, *optional*):
            Any other field of TRL's `GKDConfig` (and so of `TrainingArguments`): `report_to`, `optim`,
            `weight_decay`, `max_grad_norm`, `bf16`, `gradient_checkpointing` ...
        seed (`int`, defaults to 0):
            Seed of the replay sampling and of the recording fraction. The global random state is never touched.

    Raises:
        ConfigError: A value is out of its range.

    Example:

    ```python
    >>> from hf_osd import OnlineConfig
    >>> OnlineConfig(update_every=4, draft_length=3).update_every
    4
    ```
    """

    draft_length: int = 8
    draft_length_schedule: Literal["measured", "heuristic", "constant"] = "measured"
    prompt_lookup: bool = True
    confidence_threshold: float = 0.0
    learn: bool = True
    update_every: int = 8
    background: bool = False
    duty_cycle: float = 0.1
    record_fraction: float = 1.0
    top_k_teacher: int = 32
    replay_size: int = 256
    steps_per_update: int = 8
    batch_size: int = 8
    positions: Literal["all", "rejected"] = "all"
    beta: float = 0.0
    learning_rate: float = 2e-3
    adaptive_learning_rate: bool = True
    max_length: int = 1024
    full_teacher: bool = False
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_int("draft_length", minimum=0)
        for name in ("update_every", "top_k_teacher", "replay_size", "steps_per_update", "batch_size"):
            self._check_int(name, minimum=1)
        self._check_int("max_length", minimum=2)
        for name in ("record_fraction", "beta", "confidence_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 < self.duty_cycle <= 1.0:
            raise ConfigError(f"duty_cycle must be in (0, 1], got {self.duty_cycle!r}")
        if self.learning_rate <= 0.0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if self.draft_length_schedule not in ("measured", "heuristic", "constant"):
            raise ConfigError(
                "draft_length_schedule must be 'measured', 'heuristic' or 'constant', got "
                f"{self.draft_length_schedule!r}"
            )
        if self.positions not in ("all", "rejected"):
            raise ConfigError(f"positions must be 'all' or 'rejected', got {self.positions!r}")

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")

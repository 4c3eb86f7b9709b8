"""Settings of an `OnlineAssistant`, validated when they are made."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError

_CHOICES = {
    "draft_length_schedule": ("measured", "heuristic", "constant"),
    "positions": ("all", "rejected"),
    "loss": ("jsd", "tv", "lk", "lk_hybrid"),
}


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
            Requests that the replay buffer holds; the oldest leaves first. As many again of traffic before the last
            change.
        steps_per_update (`int`, defaults to 8):
            Optimiser steps in one update.
        batch_size (`int`, defaults to 8):
            Requests, sampled from the replay buffer, in one optimiser step.
        positions (`str`, defaults to `"all"`):
            Positions to learn from: `"all"` that the target verified, or `"rejected"`, as the paper does.
        loss (`str`, defaults to `"jsd"`):
            `"jsd"`: the divergence that `beta` chooses. `"tv"`: the total variation distance, 1 minus the acceptance
            rate. `"lk"`: minus the logarithm of the acceptance rate, and `"lk_hybrid"`: from the KL divergence to the
            total variation distance as the acceptance rate grows (https://arxiv.org/abs/2602.23881).
        beta (`float`, defaults to 0.0):
            Generalised Jensen-Shannon divergence, as in TRL's GKD (https://arxiv.org/abs/2306.13649, eq. 1):
            0.0 is the forward KL, 1.0 the reverse KL.
        lmbda (`float`, defaults to 0.0):
            As in TRL's GKD, the fraction of batches whose outputs the draft writes itself, from recorded prompts, in
            [0, 1]; the target then runs over them. 0.0 learns from what the target wrote, 1.0 from what the draft
            writes, 0.5 from a mix: the three sampling sources of Online Speculative Decoding.
        gate (`bool`, defaults to `True`):
            Publish only what held-out requests show to be better, as far on the way to what was learned as pays, and
            fall back to earlier weights where the live ones are worse. Holds out one request of four until newer ones
            take its place. `False` publishes every update.
        archive_size (`int`, defaults to 4):
            Drafts of earlier traffic to keep, in memory on the CPU, for when it comes back; besides the initial
            weights.
        learning_rate (`float`, defaults to 1e-3):
            Step size to begin with; see `adaptive_learning_rate`.
        adaptive_learning_rate (`bool`, defaults to `True`):
            Let the gate find the step size: up while updates help, down where they harm or a part of them is better,
            and back to `learning_rate` when the traffic changes. `False`, or `gate=False`, uses `learning_rate` as it
            is.
        max_length (`int`, defaults to 1024):
            Tokens of a request (its end) that one training example keeps.
        full_teacher (`bool`, defaults to `False`):
            Re-run the target over the recorded requests for its full distribution instead of using the recorded one.
        training_arguments (`Mapping[str, Any]`, *optional*):
            Any other field of TRL's `GKDConfig` (and so of `TrainingArguments`): `report_to`, `optim`,
            `weight_decay`, `max_grad_norm`, `bf16`, `gradient_checkpointing` ...
        peft_config (`peft.PeftConfig` or `Mapping[str, Any]`, *optional*):
            Train an adapter such as LoRA instead of all weights, and publish it merged. `{}` is LoRA at settings that
            learn about as fast as training everything. Needs peft.
        state_dir (`str` or `Path`, *optional*):
            Directory to keep recorded requests and what is learned in while serving, and to go on from after a restart
            or a crash; see `docs/durability.md`. It holds the token ids of prompts and outputs. Defaults to keeping
            nothing on disk.
        flush_seconds (`float`, defaults to 30.0):
            With `state_dir`, seconds between two writes; a crash loses no more than that.
        max_disk_bytes (`int`, defaults to 268435456):
            With `state_dir`, bound on the recorded requests on disk, 256 MiB.
        time_to_live (`float`, *optional*):
            With `state_dir`, seconds after which a recorded request is deleted.
        redact (`Callable[[Observation], Observation | None]`, *optional*):
            Applied to each recorded request before it goes to disk, by `state_dir` or `save_pretrained`; `None` drops
            it.
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
    loss: Literal["jsd", "tv", "lk", "lk_hybrid"] = "jsd"
    beta: float = 0.0
    lmbda: float = 0.0
    gate: bool = True
    archive_size: int = 4
    learning_rate: float = 1e-3
    adaptive_learning_rate: bool = True
    max_length: int = 1024
    full_teacher: bool = False
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Any = None
    state_dir: str | Path | None = None
    flush_seconds: float = 30.0
    max_disk_bytes: int = 2**28
    time_to_live: float | None = None
    redact: Callable[[Any], Any] | None = None
    seed: int = 0

    @property
    def needs_target(self) -> bool:
        """Whether learning runs the target itself."""
        return self.full_teacher or self.lmbda > 0.0

    def __post_init__(self) -> None:
        for name in ("draft_length", "archive_size"):
            self._check_int(name, minimum=0)
        for name in (
            "update_every",
            "top_k_teacher",
            "replay_size",
            "steps_per_update",
            "batch_size",
            "max_disk_bytes",
        ):
            self._check_int(name, minimum=1)
        self._check_int("max_length", minimum=2)
        for name in ("record_fraction", "beta", "lmbda", "confidence_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 < self.duty_cycle <= 1.0:
            raise ConfigError(f"duty_cycle must be in (0, 1], got {self.duty_cycle!r}")
        for name in ("learning_rate", "flush_seconds", "time_to_live"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value!r}")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}")

    def _check_int(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")

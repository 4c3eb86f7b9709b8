"""Settings of an `OnlineAssistant`, and the rules that settings are checked by when they are made."""

import copy
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from textwrap import shorten
from typing import Any, Literal, get_args

from .errors import ConfigError

Schedule = Literal["measured", "heuristic", "constant"]
Positions = Literal["all", "rejected"]
Loss = Literal["jsd", "tv", "lk", "lk_hybrid"]
Unsupported = Literal["warn", "error"]

_SHOWN = 80  # characters of a value in a message, at most; of a collection three times as many
_LONGEST_REASON = 300  # characters of another package's error message, at most: some list hundreds of classes


@dataclass(frozen=True, slots=True)
class Rule:
    """
    The values that a setting may have.

    Attributes:
        allowed (`str`): These values in words, to follow "must be".
        accepts (`Callable[[Any], bool]`): Whether a value is allowed.
        keep (`Callable[[Any], Any]`, *optional*): Converts an allowed value; defaults to the value itself.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], Any] = lambda value: value

    def check(self, name: str, value: Any) -> Any:
        """Return a converted value, or raise a `ConfigError` that names it."""
        reason = None
        try:
            value = _without_numpy(value)
            if self.accepts(value):
                return self.keep(value)
        except Exception as error:  # an unknown object may fail at anything
            reason = error
        raise ConfigError(f"{name} must be {self.allowed}, got {shown(value)}") from reason


def check_fields(settings: Any, rules: Mapping[str, Rule]) -> None:
    """
    Check the fields of a frozen dataclass, and replace each by its converted value.

    Raises:
        ConfigError: A value breaks its rule; names the field, the value and what is allowed.
    """
    for name, rule in rules.items():
        object.__setattr__(settings, name, rule.check(name, getattr(settings, name)))


def integer(low: int, high: int) -> Rule:
    """Allow integers in `[low, high]`, but no bools."""

    def accepts(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return Rule(f"in [{low}, {high}] (an integer)", accepts, int)


def number(low: float, high: float) -> Rule:
    """Allow integers and floats in `[low, high]`, but neither NaN nor bools; converts to float."""

    def accepts(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return Rule(f"in [{low:g}, {high:g}] (a number)", accepts, float)


def choice(*known: str) -> Rule:
    """Allow a few names."""
    return Rule(f"one of {', '.join(map(repr, known))}", lambda value: isinstance(value, str) and value in known, str)


def optional(rule: Rule) -> Rule:
    """Allow `None` too."""
    return Rule(
        f"{rule.allowed} or None",
        lambda value: value is None or rule.accepts(value),
        lambda value: None if value is None else rule.keep(value),
    )


def _is_path(value: Any) -> bool:
    """Whether a value is a path, and not empty: an empty one, as of an unset variable, means the current folder."""
    return isinstance(value, str | Path) and bool(str(value).strip()) and b"\0" not in os.fsencode(value)


FLAG = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
PATH = Rule("a path that is not empty", _is_path)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _copied(value: Any) -> Any:
    return copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)


def _is_adapter(value: Any) -> bool:
    return _is_mapping(value) or (hasattr(value, "peft_type") and not isinstance(value, type))


def _without_numpy(value: Any) -> Any:
    """Turn a scalar of numpy into Python's own, which JSON can hold; times are left to be refused."""
    numpy = sys.modules.get("numpy")  # without an import of numpy there are no scalars of it
    is_scalar = numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biuf"
    return value.item() if is_scalar else value


def shown(value: Any) -> str:
    """Write a value in one line of a message, whatever it is and however long."""
    brief = Repr()
    brief.maxstring = brief.maxother = brief.maxlong = _SHOWN
    try:
        line = " ".join(line.strip() for line in brief.repr(value).splitlines())
        return line if len(line) <= 3 * _SHOWN else f"{line[: 3 * _SHOWN]} ..."
    except Exception:  # Python writes no integer of more than 4,300 digits, and objects may fail too
        return f"an object of type {type(value).__name__}"


def reason_of(error: BaseException) -> str:
    """Write another package's error in one line of a message, however long it is."""
    return shorten(str(error), _LONGEST_REASON) or type(error).__name__


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """
    Settings of an [`OnlineAssistant`]: how it drafts, when and what it learns, and what it keeps on disk.

    Args:
        > The five to look at first

        draft_length (`int`, defaults to 8):
            Most tokens that the draft proposes before each pass of the target, in [0, 1024]. 0 turns speculation off.
        update_every (`int`, defaults to 8):
            Recorded requests between two updates of the draft: the interval `I` of Online Speculative Decoding,
            Algorithm 1 (https://arxiv.org/abs/2310.07177).
        background (`bool`, defaults to `False`):
            Where updates run. `False`: inline, in the request that completes the interval, which waits; the same
            recorded requests give the same weights. `True`: in a thread, while serving goes on.
        learning_share (`float`, *optional*):
            Most seconds of learning for each second of serving, in [1e-6, 1e6]; an update that makes a request wait
            ends once it has taken as long as the request itself. Defaults to no limit: a limit depends on the
            clock, so that what is learned does not repeat.
        state_dir (`str` or `Path`, *optional*):
            Directory where the assistant keeps recorded requests and what it has learned while it serves, and from
            which it goes on after a restart or a crash; see `docs/durability.md`. It holds the token ids of prompts
            and outputs. By default nothing goes to disk.

        > Drafting

        draft_nodes (`int`, defaults to 16):
            Most tokens that one pass of the target checks under the schedule `"measured"`, in [1, 1024]: a tree of
            what draft and lookup propose, or the best chain where the target's attention takes no custom mask.
        draft_length_schedule (`str`, defaults to `"measured"`):
            How many tokens each round proposes. `"measured"`: as many as promise the most tokens per second, by the
            measured costs of both models and the acceptance so far; none where speculation does not pay.
            `"heuristic"`: two more after a proposal that was accepted in full, one less after any other, as
            transformers' `num_assistant_tokens_schedule` does, within `draft_length`. `"constant"`: always
            `draft_length`.
        prompt_lookup (`bool`, defaults to `True`):
            With `"measured"`, also propose what followed the last tokens earlier in the text. This runs no model.
        recent_outputs (`int`, defaults to 32768):
            Tokens of other requests' latest outputs that it looks up as well, in memory only; in [0, 2**24].
        confidence_threshold (`float`, defaults to 0.0):
            With `"heuristic"` and `"constant"`, end a proposal once the product of the draft's own probabilities of
            its tokens is at most this, in [0, 1]. 0.0 never ends one early.
        unsupported (`str`, defaults to `"warn"`):
            What happens to a request that plain `generate` can serve and speculation cannot serve losslessly.
            `"warn"`: the target's own decoding serves it, with one warning for each cause, and `stats().fallbacks`
            counts it. `"error"`: an `UnsupportedGenerationError` or `UnsupportedModelError` is raised before any work.

        > Recording

        record_fraction (`float`, defaults to 1.0):
            Fraction of the requests to record, in [0, 1]; with `learning_share`, while time to learn is left.
        top_k_teacher (`int`, defaults to 32):
            How many of the target's largest log-probabilities to record at each position, at least 1; the remaining
            mass is recorded as one number.
        replay_size (`int`, defaults to 256):
            Requests that the replay buffer holds; the oldest leaves first. Half of each sample comes from the newest.
        max_state_bytes (`int`, defaults to 268435456):
            Most bytes of hidden states of the target to keep with recorded requests, 256 MiB; only drafts that read
            these states need them. The target reads requests without states again when they are learned from.

        > Learning

        learn (`bool`, defaults to `True`):
            Whether the draft learns. `False` serves with a static draft and records nothing.
        loss (`str`, defaults to `"jsd"`):
            `"jsd"`: the divergence that `beta` chooses. `"tv"`: the total variation distance, which is 1 minus the
            acceptance rate. `"lk"`: minus the logarithm of the acceptance rate. `"lk_hybrid"`: moves from the KL
            divergence to the total variation distance as acceptance grows (https://arxiv.org/abs/2602.23881).
        beta (`float`, defaults to 0.0):
            With `"jsd"`, which generalised Jensen-Shannon divergence, as in TRL's GKD
            (https://arxiv.org/abs/2306.13649, eq. 1): 0.0 is the forward KL, 1.0 the reverse KL.
        lmbda (`float`, defaults to 0.0):
            As in TRL's GKD, the fraction of batches whose outputs the draft itself writes to recorded prompts, in
            [0, 1]; the target then runs over them. 0.0 learns from what the target wrote, 1.0 from what the draft
            writes: the sampling sources of Online Speculative Decoding.
        positions (`str`, defaults to `"all"`):
            Positions to learn from: `"all"` that the target verified, or `"rejected"` ones only, as in the paper.
        full_teacher (`bool`, defaults to `False`):
            Learn from the target's full distribution, for which the target runs over recorded requests again, instead
            of the recorded log-probabilities.
        steps_per_update (`int`, defaults to 8):
            Optimiser steps of one update.
        batch_size (`int`, defaults to 8):
            Requests, sampled from the replay buffer, in one optimiser step.
        max_length (`int`, defaults to 1024):
            Most tokens of a request that one training example keeps; those at its end stay.
        learning_rate (`float`, defaults to 1e-3):
            Learning rate to begin with; see `adaptive_learning_rate`.
        adaptive_learning_rate (`bool`, defaults to `True`):
            Let the selector (see `gate`) set the learning rate: up while what is learned leads, down where half of it
            does or where training did harm, back to `learning_rate` when the traffic changes. With `False`, or with
            `gate=False`, the rate stays `learning_rate`.
        duty_cycle (`float`, defaults to 0.1):
            With `background`, the fraction of the time that learning may take while requests are in flight, in
            [1e-6, 1]. 1.0 never pauses. Learning never pauses while serving is idle.
        training_arguments (`Mapping[str, Any]`, *optional*):
            Any other field of TRL's `GKDConfig`, and so of `TrainingArguments`: `report_to`, `optim`,
            `weight_decay`, `max_grad_norm`, `bf16`, `gradient_checkpointing` ...
        peft_config (`peft.PeftConfig` or `Mapping[str, Any]`, *optional*):
            Train an adapter such as LoRA instead of all weights, and publish it merged. `{}` is LoRA at settings that
            learn about as fast as training everything. Needs peft.

        > Choosing which weights are live

        gate (`bool`, defaults to `True`):
            Let a selector decide which weights are live, by the score of each candidate on every request before it is
            learned from. The candidates are the static draft, what is learned, half of the way there, and a few
            former leaders. `False` publishes every update.
        archive_size (`int`, defaults to 4):
            Former leaders to keep, on the CPU, for when their traffic comes back.

        > Persistence

        flush_seconds (`float`, defaults to 30.0):
            With `state_dir`, seconds between two writes, in [0.001, 2592000] (30 days): the most that a crash loses.
        max_disk_bytes (`int`, defaults to 268435456):
            With `state_dir`, most bytes of recorded requests on disk, 256 MiB.
        time_to_live (`float`, *optional*):
            With `state_dir`, seconds after which a recorded request is deleted, at most 1e9 (32 years).
        redact (`Callable[[Observation], Observation | None]`, *optional*):
            Applied to each recorded request before it goes to disk, by `state_dir` or `save_pretrained`; `None` drops
            the request.

        > Reproducibility

        seed (`int`, defaults to 0):
            Seed of the replay sampling and of `record_fraction`, in [-2**63, 2**64 - 1]. torch's global random state
            is never touched.

    A draft that reads the target's states brings settings of its own, as a model brings its generation config:
    [`OnlineConfig.for_draft`] starts from them.

    Values are checked when the config is made. Mappings and adapters are copied. Scalars of numpy become Python's own.

    Raises:
        ConfigError: A value has the wrong type, is out of its range or contradicts another; the message names the
            setting, its value and what is allowed.

    Example:

    ```python
    >>> from hf_osd import OnlineConfig
    >>> OnlineConfig(update_every=4, draft_length=3).update_every
    4
    ```
    """

    # The five to look at first
    draft_length: int = 8
    update_every: int = 8
    background: bool = False
    learning_share: float | None = None
    state_dir: str | Path | None = None

    # Drafting
    draft_nodes: int = 16
    draft_length_schedule: Schedule = "measured"
    prompt_lookup: bool = True
    recent_outputs: int = 2**15
    confidence_threshold: float = 0.0
    unsupported: Unsupported = "warn"

    # Recording
    record_fraction: float = 1.0
    top_k_teacher: int = 32
    replay_size: int = 256
    max_state_bytes: int = 2**28

    # Learning
    learn: bool = True
    loss: Loss = "jsd"
    beta: float = 0.0
    lmbda: float = 0.0
    positions: Positions = "all"
    full_teacher: bool = False
    steps_per_update: int = 8
    batch_size: int = 8
    max_length: int = 1024
    learning_rate: float = 1e-3
    adaptive_learning_rate: bool = True
    duty_cycle: float = 0.1
    training_arguments: Mapping[str, Any] = field(default_factory=dict)
    peft_config: Any = None

    # Choosing which weights are live
    gate: bool = True
    archive_size: int = 4

    # Persistence
    flush_seconds: float = 30.0
    max_disk_bytes: int = 2**28
    time_to_live: float | None = None
    redact: Callable[[Any], Any] | None = None

    # Reproducibility
    seed: int = 0

    @classmethod
    def for_draft(cls, draft: Any, **settings: Any) -> "OnlineConfig":
        """
        Return the settings that a draft recommends for itself, some of them replaced.

        Args:
            draft (`PreTrainedModel`): The draft; what it recommends is `draft.config.online`, if anything.
            settings: Fields of the config.

        Raises:
            ConfigError: See the class.
        """
        return cls(**{**getattr(draft.config, "online", {}), **settings})

    @property
    def needs_target(self) -> bool:
        """Whether learning runs the target itself."""
        return self.full_teacher or self.lmbda > 0.0

    def __post_init__(self) -> None:
        check_fields(self, RULES)
        if self.beta != 0.0 and self.loss != "jsd":
            raise ConfigError(f"beta={self.beta!r} means nothing with loss={self.loss!r}: leave it out")


RULES: dict[str, Rule] = {
    "draft_length": integer(0, 1024),  # the cache keeps that many columns free
    "update_every": integer(1, sys.maxsize),  # `sys.maxsize` means never
    "background": FLAG,
    "learning_share": optional(number(1e-6, 1e6)),
    "state_dir": optional(PATH),
    "draft_nodes": integer(1, 1024),  # likewise
    "draft_length_schedule": choice(*get_args(Schedule)),
    "prompt_lookup": FLAG,
    "recent_outputs": integer(0, 2**24),
    "confidence_threshold": number(0, 1),
    "unsupported": choice(*get_args(Unsupported)),
    "record_fraction": number(0, 1),
    "top_k_teacher": integer(1, 2**20),  # larger than any vocabulary
    "replay_size": integer(1, 10**6),
    "max_state_bytes": integer(0, sys.maxsize),
    "learn": FLAG,
    "loss": choice(*get_args(Loss)),
    "beta": number(0, 1),
    "lmbda": number(0, 1),
    "positions": choice(*get_args(Positions)),
    "full_teacher": FLAG,
    "steps_per_update": integer(1, 10**6),
    "batch_size": integer(1, 2**16),
    "max_length": integer(2, 2**24),
    "learning_rate": number(1e-38, 1e38),  # weights are trained in float32
    "adaptive_learning_rate": FLAG,
    "duty_cycle": number(1e-6, 1),  # after a second of work, pauses of up to 12 days
    "training_arguments": Rule("a mapping of names that can be copied", _is_mapping, _copied),
    "peft_config": optional(Rule("a mapping of names that can be copied, a peft.PeftConfig", _is_adapter, _copied)),
    "gate": FLAG,
    "archive_size": integer(0, 1024),
    "flush_seconds": number(0.001, 30 * 86400),  # some systems wait for no more than 49 days: threading.TIMEOUT_MAX
    "max_disk_bytes": integer(1, sys.maxsize),
    "time_to_live": optional(number(1e-6, 1e9)),  # a microsecond is the shortest datetime.timedelta
    "redact": optional(Rule("callable", callable)),
    "seed": integer(-(2**63), 2**64 - 1),  # what torch.Generator takes; random.Random takes any
}
"""The rule of each field of [`OnlineConfig`]."""

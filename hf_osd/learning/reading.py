"""
How recorded requests are read: which of them teach, batches of them, and the forward pass of a draft over a batch.

The same for training and for scoring. Not covered: padding to fixed sizes, for compiled training.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..drafts.encoders import decoder_logits, decoder_options, has_encoder
from ..records import Observation

ALL = 2**31  # tokens: more than any prompt has
_NEVER = -1e4  # logit of tokens that are not proposed; finite in every dtype
LOGITS_BYTES = 2**28  # bytes of a part's logits, at most (256 MiB), unless those of one row are more
LONGEST_PART = 0.01  # seconds that a part of a batch takes at most, since a request may have to wait for it

Batch = dict[str, Any]
"""Tensors by name; see [`ObservationCollator`]."""

_SHARED = ("positions", "vocabulary")  # entries of a batch that belong to all of its rows


def usable(observation: Observation) -> Observation | None:
    """
    Return a request as it can be learned from, `None` where it has no output or its teacher is poisoned.

    Tensors that were made in inference mode are copied: autograd does not take them.
    """
    if observation.output_ids.numel() == 0 or _is_poisoned(observation):
        return None
    fields = {name: getattr(observation, name) for name in observation.__slots__}
    with torch.inference_mode(False):
        copies = {
            name: tensor.clone() for name, tensor in fields.items() if tensor is not None and tensor.is_inference()
        }
    return replace(observation, **copies) if copies else observation


def _is_poisoned(observation: Observation) -> bool:
    """Whether the teacher holds values that are no probabilities, such as NaN."""
    log_probs, tail = observation.teacher_log_probs, observation.teacher_tail
    return not bool((log_probs <= 1e-3).all() and (tail >= 0.0).all() and (tail <= 1.0 + 1e-3).all())


def teaches(observation: Observation, positions: str, known: int | None = None) -> bool:
    """Whether a request has any of the `positions` to learn from; see [`ObservationCollator`]."""
    chosen = observation.rejected if positions == "rejected" else torch.ones_like(observation.rejected)
    return bool((chosen & _is_known(observation.teacher_ids, known)).any())


def _is_known(teacher_ids: torch.Tensor, known: int | None) -> torch.Tensor:
    """Return where the teacher names any token that the draft knows: `(...)`, of ids `(..., k)`."""
    return (teacher_ids < known).any(-1) if known is not None else torch.ones_like(teacher_ids[..., 0]).bool()


class ObservationCollator:
    """
    Pads requests to one batch, on the left, so that the positions to learn from are the last ones of every row.

    Args:
        max_length (`int`): Tokens of a request, its end, that are kept.
        positions (`str`): `"all"` positions that the target verified, or the `"rejected"` ones.
        known (`int`, *optional*): Tokens that the draft knows. Where the teacher names none of them, there is nothing
            to learn. Defaults to counting every position.
        context (`int`, *optional*): Tokens of a prompt, its end, that are read. Defaults to all.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `position_ids` of shape `(batch, time)`;
        `source_ids` and `source_mask` of shape `(batch, source)`, padded on the right; `teacher_ids` and
        `teacher_log_probs` of shape `(batch, verified, k)`, `teacher_tail` and the bool `learn_mask` of shape `(batch,
        verified)`: what the last `verified` inputs have to predict, and where that counts.
    """

    def __init__(self, max_length: int, positions: str, known: int | None = None, context: int = ALL) -> None:
        self.max_length, self.positions, self.known, self.context = max_length, positions, known, context

    def __call__(self, observations: list[Observation]) -> Batch:
        """Pad a batch; see the class."""
        k = min(observation.teacher_ids.shape[1] for observation in observations)
        rows = [self._row(observation, k) for observation in observations]
        sides = {name: "right" if name.startswith("source") else "left" for name in rows[0]}
        batch = {name: pad_sequence([row[name] for row in rows], True, 0.0, side) for name, side in sides.items()}
        batch["learn_mask"] &= _is_known(batch["teacher_ids"], self.known)
        return batch

    def _row(self, observation: Observation, k: int) -> Batch:
        # Nothing is predicted after the last token, so it is no input.
        ids = torch.cat((observation.prompt_ids[-self.context :], observation.output_ids))[:-1][-self.max_length :]
        source = ids[:0] if observation.source_ids is None else observation.source_ids[: self.max_length]
        last = slice(-len(ids), None)  # of the output: it may be longer than what is kept
        log_probs, rejected = observation.teacher_log_probs[last].float(), observation.rejected[last]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(len(ids)),
            "source_ids": source,
            "source_mask": torch.ones_like(source),
            "teacher_ids": observation.teacher_ids[last, :k],
            "teacher_log_probs": log_probs[:, :k],
            # Requests recorded with a larger k fold what is cut off into the tail.
            "teacher_tail": observation.teacher_tail[last].float() + log_probs[:, k:].exp().sum(-1),
            "learn_mask": rejected if self.positions == "rejected" else torch.ones_like(rejected),
        }


def positions_of(inputs: Batch) -> int:
    """Return how many positions of a batch, or of the whole of which it is a part, are learned from."""
    return int(inputs["positions"] if "positions" in inputs else inputs["learn_mask"].sum())


def rows_of(batch: Batch, rows: Any) -> Batch:
    """Return some rows of a batch, by a slice or their numbers; what all rows share stays whole."""
    return {name: value if name in _SHARED else value[rows] for name, value in batch.items()}


@dataclass(frozen=True, slots=True)
class Pass:
    """
    Logits of some rows of a batch, and what they count for: `weight` times the mean loss over `positions`.

    Attributes:
        weight (`float`): Share of this mean in the loss.
        positions (`int`): Positions that the mean is over, those in other passes included.
        inputs (`dict[str, torch.Tensor]`): The rows.
        logits (`torch.FloatTensor` of shape `(rows, verified, vocab)`): What the draft predicts.
    """

    weight: float
    positions: int
    inputs: Batch
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Reader:
    """
    How a model reads recorded requests. It is made before TRL replaces the model's `forward`.

    Draft and target may differ in padded vocabulary. As in serving, a model reads its last token in the place of one
    that it does not know, and proposes none that the other does not know.

    Attributes:
        parameters (`frozenset[str]`): What the model's forward takes.
        known (`int`): Tokens that it can read.
        proposed (`int` or `torch.LongTensor`, *optional*): Tokens that it may propose: the first ones, or these.
    """

    parameters: frozenset[str]
    known: int
    proposed: int | torch.Tensor | None = None

    @classmethod
    def of(cls, model: Any, proposed: int | torch.Tensor | None = None) -> "Reader":
        """Return the reader of a model."""
        parameters = inspect.signature(base_model(model).forward).parameters
        return cls(frozenset(parameters), vocabulary(model), proposed)

    def readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Replace tokens that the model cannot read."""
        return ids.clamp(max=self.known - 1)

    def proposable(self, logits: torch.Tensor) -> torch.Tensor:
        """Leave of logits `(..., vocab)` those of tokens that the model may propose; others are far below them."""
        if not isinstance(self.proposed, torch.Tensor):
            return logits[..., : self.proposed]
        chosen = self.proposed.to(logits.device)
        return torch.full_like(logits, _NEVER).index_copy(-1, chosen, logits.index_select(-1, chosen))

    def options(self, inputs: Batch) -> dict[str, Any]:
        """Return the arguments of a forward pass over a batch of [`ObservationCollator`]."""
        if has_encoder(self.parameters):
            read = {name: self.readable(inputs[name]) for name in ("input_ids", "source_ids")}
            return decoder_options(inputs, read)
        options = {"input_ids": self.readable(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
        if "position_ids" in self.parameters:  # models without it count from the attention mask
            options["position_ids"] = inputs["position_ids"]
        if "logits_to_keep" in self.parameters:
            options["logits_to_keep"] = inputs["learn_mask"].shape[1]
        return {**options, "use_cache": False}

    def collator(self, max_length: int, positions: str) -> ObservationCollator:
        """Return what pads requests for this model; see [`ObservationCollator`]."""
        return ObservationCollator(max_length, positions, self.known)

    def passes(self, model: nn.Module, inputs: Batch) -> Iterator[Pass]:
        """
        Run a draft over a batch, for training: once, or several times where it also learns from its own states.

        Args:
            model (`torch.nn.Module`): The draft.
            inputs (`dict[str, torch.Tensor]`): A batch on the model's device; of a part of one, `positions` is the
                number of positions in all parts.
        """
        yield Pass(1.0, positions_of(inputs), inputs, self.logits(model, inputs))

    def logits(self, model: Callable[..., Any], inputs: Batch) -> torch.Tensor:
        """Run a model over a batch; return its logits where the target was recorded, `(batch, verified, vocab)`."""
        logits: torch.Tensor = model(**self.options(inputs)).logits
        if has_encoder(self.parameters):
            return self.proposable(decoder_logits(logits, inputs))
        return self.proposable(logits[:, -inputs["learn_mask"].shape[1] :])


@torch.no_grad()
def target_logits(target: Any, inputs: Batch) -> torch.Tensor:
    """
    Run the live target over a batch of any device, without the autocast of training: serving has none either.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified, vocab)`: On the target's device.
    """
    device = next(target.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with torch.autocast(device.type, enabled=False):
        return Reader.of(target).logits(target, inputs)


def base_model(model: Any) -> Any:
    """Return the model inside of a PEFT model, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model


def vocabulary(model: Any) -> int:
    """Return how many tokens a model knows."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def longest_request(model: nn.Module, max_length: int) -> int:
    """Return how many tokens of a request both the settings and the model allow."""
    config: Any = model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions) if isinstance(positions, int) and positions > 0 else max_length


class BatchParts:
    """Cuts batches into parts of `LOGITS_BYTES`, for `tokens` each; with `max_rows`, of `LONGEST_PART` seconds too."""

    def __init__(self, tokens: int, max_rows: int | None = None) -> None:
        self._tokens, self._max_rows, self._rows = tokens, max_rows, 1 if max_rows else ALL

    def of(self, batch: Batch) -> Iterator[Batch]:
        """
        Yield smaller batches, without the columns that only other rows need; parts with nothing to learn are left out.

        The size of each is chosen when it is asked for. A batch that is one part stays as it is.
        """
        start, (count, length) = 0, batch["learn_mask"].shape
        fit = max(LOGITS_BYTES // (4 * max(length, 1) * len(batch.get("vocabulary", range(self._tokens)))), 1)
        if min(self._rows, fit) >= count and self._max_rows is None:
            yield batch
            return
        while start < count:
            rows = rows_of(batch, slice(start, start + min(self._rows, fit)))
            start += min(self._rows, fit)
            if bool(rows["learn_mask"].any()):
                yield _trimmed(rows)

    def fit(self, seconds: float) -> None:
        """Halve parts that take too long, and double them where there is room."""
        if self._max_rows is None:
            return
        if seconds > LONGEST_PART:
            self._rows = max(1, self._rows // 2)
        elif seconds < LONGEST_PART / 2:
            self._rows = min(2 * self._rows, self._max_rows)


def _trimmed(rows: Batch) -> Batch:
    first_input = int(rows["attention_mask"].any(0).int().argmax())  # of (rows, time)
    first_learned = int(rows["learn_mask"].any(0).int().argmax())  # of (rows, verified)
    begins = {name: first_learned for name in rows if name.startswith(("teacher", "learn"))}
    begins |= dict.fromkeys(("input_ids", "attention_mask", "position_ids", "states"), first_input)
    return {name: tensor[:, begins[name] :] if name in begins else tensor for name, tensor in rows.items()}

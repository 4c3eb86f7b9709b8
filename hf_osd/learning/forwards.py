"""The forward pass of a batch of recorded requests, for training and for judging alike."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .collation import ObservationCollator


@dataclass(frozen=True, slots=True)
class Reader:
    """
    How a model reads recorded requests. To be made before anybody replaces its `forward`.

    Draft and target may know different tokens: vocabularies are padded to round sizes. As in serving, a model reads
    its last token in the place of one that it does not know, and proposes none that the other does not know.

    Attributes:
        parameters (`frozenset[str]`): What the model's forward takes.
        known (`int`): Tokens that it can read.
        proposed (`int`, *optional*): Tokens that it may propose, the first ones; `None` for all that it has.
    """

    parameters: frozenset[str]
    known: int
    proposed: int | None = None

    @classmethod
    def of(cls, model: Any, proposed: int | None = None) -> "Reader":
        """Return the reader of a model."""
        parameters = inspect.signature(base_model(model).forward).parameters
        return cls(frozenset(parameters), vocabulary(model), proposed)

    def readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Replace tokens that the model cannot read."""
        return ids.clamp(max=self.known - 1)

    def proposable(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut logits of shape `(..., vocab)` to the tokens that the model may propose."""
        return logits[..., : self.proposed]

    def options(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """
        Return the arguments of a forward pass over a batch.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of [`ObservationCollator`].
        """
        options: dict[str, Any] = {
            "input_ids": self.readable(inputs["input_ids"]),
            "attention_mask": inputs["attention_mask"],
        }
        if "position_ids" in self.parameters:  # models without it count from the attention mask
            options["position_ids"] = inputs["position_ids"]
        if "logits_to_keep" in self.parameters:
            options["logits_to_keep"] = inputs["learn_mask"].shape[1]
        return {**options, "use_cache": False}

    def collator(self, max_length: int, positions: str) -> ObservationCollator:
        """Return what makes batches of requests for [`options`]; see [`ObservationCollator`]."""
        return ObservationCollator(max_length, positions, self.known)

    def steps(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Iterator[tuple[float, torch.Tensor]]:
        """
        Run a draft over a batch, for training.

        Args:
            model (`torch.nn.Module`): The draft.
            inputs (`dict[str, torch.Tensor]`): A batch of [`ObservationCollator`], on the model's device.

        Returns:
            `Iterator[tuple[float, torch.FloatTensor]]`: Logits as those of [`logits`], with their weight in the loss;
            several where a draft also learns to go on from its own states.
        """
        return iter([(1.0, self.logits(model, inputs))])

    def logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Run a model over a batch.

        Args:
            model (`torch.nn.Module`): The model.
            inputs (`dict[str, torch.Tensor]`): A batch of [`ObservationCollator`], on the model's device.

        Returns:
            `torch.FloatTensor` of shape `(batch, verified, vocab)`: Logits where the recorded target said something.
        """
        logits: torch.Tensor = model(**self.options(inputs)).logits
        return self.proposable(logits[:, -inputs["learn_mask"].shape[1] :])


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

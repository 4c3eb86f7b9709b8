"""An encoder's side of a request: its outputs for the draft, computed once, and its text for lookup and learning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .._compat import execution_device, parameters_of
from ..errors import UnsupportedModelError
from .preparation import Preparation, prepare
from .weights import describe

Inputs = Mapping[str, torch.Tensor]
"""What an encoder reads, by name; see [`~hf_osd._compat.encoder_inputs`]."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """
    What is known of an encoder's side of a request; empty for a target without one.

    Attributes:
        inputs (`Mapping[str, torch.Tensor]`): What the target's encoder has read; empty where that is not known.
        given (`Mapping[str, Any]`): What every pass of the target gets; see [`Preparation`].
        config (`GenerationConfig`, *optional*): As `generate` prepared it for the target.
    """

    inputs: Inputs = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    config: GenerationConfig | None = None

    def of_rows(self, rows: Sequence[int]) -> "Encoded":
        """Return that of some rows of the batch."""
        return Encoded(_rows_of(self.inputs, rows), _rows_of(self.given, rows), self.config)


def _rows_of(values: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Take rows of tensors `(batch, ...)`, also of those inside of a model's outputs."""
    places = torch.tensor(rows)
    return {
        name: type(value)(**_rows_of(value, rows)) if isinstance(value, Mapping) else value[places.to(value.device)]
        for name, value in values.items()
        if value is not None
    }


def source_texts(inputs: Inputs) -> list[torch.Tensor] | None:
    """Return the tokens that an encoder reads, by row and without padding, 1D each; `None` where it reads no text."""
    ids = inputs.get("input_ids")
    if ids is None:
        return None
    mask = inputs.get("attention_mask")
    return [row if mask is None else row[mask[number].bool()] for number, row in enumerate(ids)]


def reads_encoder(model: PreTrainedModel) -> bool:
    """Whether the passes of a model take the outputs of an encoder."""
    return "encoder_outputs" in parameters_of(model.forward)


def draft_preparation(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompts: torch.Tensor,
    padding: Sequence[int],
    inputs: Inputs,
    given: Mapping[str, Any],
) -> Preparation | None:
    """
    Prepare the passes of a draft for a target with an encoder.

    A draft with an encoder of its own runs it here. One without, or whose encoder is the target's, reads the target's
    outputs.

    Args:
        draft, target (`PreTrainedModel`): The models.
        prompts (`torch.LongTensor` of shape `(batch, prompt)`): What the target's decoder begins with.
        padding (`Sequence[int]`): Padding columns of each row.
        inputs (`Mapping[str, torch.Tensor]`): What the target's encoder has read; empty where that is not known.
        given (`Mapping[str, Any]`): What every pass of the target gets; see [`Preparation`].

    Returns:
        [`Preparation`]: `None` where the draft, or the target, reads no encoder.

    Raises:
        UnsupportedModelError: The draft has an encoder of its own, and its input is not known.
    """
    if not given or not reads_encoder(draft):
        return None
    place = execution_device(draft), draft.dtype
    kept = {name: value for name, value in given.items() if name != "encoder_outputs"}
    outputs = given["encoder_outputs"]
    if not draft.config.is_encoder_decoder:
        kept = {}  # its mask would be one of the text
    elif draft.get_encoder() is not target.get_encoder():
        outputs = _encode(draft, {name: _placed(value, *place) for name, value in inputs.items()})
    made = type(outputs)(**{name: _placed(value, *place) for name, value in outputs.items()})
    kept = {name: _placed(value, *place) for name, value in kept.items()}
    return prepare(draft, prompts.to(place[0]), {**kept, "encoder_outputs": made}, padding)


@torch.no_grad()
def _encode(model: PreTrainedModel, inputs: Inputs) -> Any:
    if not inputs:
        raise UnsupportedModelError(
            f"the draft {describe(model)} has an encoder of its own, and encoder_outputs do not say what that is to "
            "read: pass the input of the encoder",
            "draft: unknown input of its encoder",
        )
    encoder: Any = model.get_encoder()
    taken = parameters_of(encoder.forward)
    if "input_ids" in inputs:  # the target may know more tokens
        inputs = {**inputs, "input_ids": inputs["input_ids"].clamp(max=encoder.config.vocab_size - 1)}
    return encoder(**{name: value for name, value in inputs.items() if name in taken}, return_dict=True)


def _placed(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)

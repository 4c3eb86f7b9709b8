"""
How a model with an encoder reads recorded requests: the source by its encoder, prompt and output by its decoder.

Requests are padded on the left, so that what is to be predicted ends every row. Such decoders count positions by
column, so they read the same rows with the padding behind them.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch


def has_encoder(parameters: Collection[str]) -> bool:
    """Whether a forward with these parameters is that of a model with an encoder."""
    return "decoder_input_ids" in parameters


def decoder_options(inputs: Mapping[str, torch.Tensor], read: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    Return the arguments of a forward pass.

    Args:
        inputs (`Mapping[str, torch.Tensor]`): A batch of [`~hf_osd.learning.reading.ObservationCollator`].
        read (`Mapping[str, torch.Tensor]`): Its `input_ids` and `source_ids`, as the model can read them.
    """
    text, padding = read["input_ids"], _padding(inputs)
    columns = torch.arange(text.shape[1], device=text.device) + padding[:, None]
    return {
        "input_ids": read["source_ids"],
        "attention_mask": inputs["source_mask"],
        "decoder_input_ids": text.gather(1, columns % text.shape[1]),  # the padding comes back behind the row
        "use_cache": False,
    }


def decoder_logits(logits: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Pick, from logits of the rows with their padding behind them, what the end of every row predicts.

    Args:
        logits (`torch.FloatTensor` of shape `(batch, time, vocab)`): Of a pass with [`decoder_options`].
        inputs (`Mapping[str, torch.Tensor]`): The batch.

    Returns:
        `torch.FloatTensor` of shape `(batch, verified, vocab)`: As other models give them for the padded rows.
    """
    rows, time = inputs["input_ids"].shape
    last = torch.arange(time - inputs["learn_mask"].shape[1], time, device=logits.device)
    columns = (last - _padding(inputs)[:, None]).clamp(min=0)
    return logits[torch.arange(rows, device=logits.device)[:, None], columns]


def _padding(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (1 - inputs["attention_mask"]).sum(dim=1)

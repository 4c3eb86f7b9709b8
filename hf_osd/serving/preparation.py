"""The inputs that a model's own code makes for the first pass of a request, which decoders have to feed as well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from .._caches import CACHE_NAMES, cache_argument, cache_of
from .._compat import FIRST_PASS_INPUTS, decoder_prefix

_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids"}  # perhaps behind a prefix
_OURS = {"use_cache", "logits_to_keep", *CACHE_NAMES}
_TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"}  # (batch, prompt) each


@dataclass(frozen=True, slots=True)
class Preparation:
    """
    The inputs of a target's first pass, as its own `prepare_inputs_for_generation` makes them.

    Attributes:
        model_kwargs (`dict[str, Any]`): What `generate` prepared, without the cache.
        width (`int`): Columns of the prompt.
        extras (`dict[str, Any]`): What the first pass gets beside tokens, positions, mask and cache: image features
            and the like. Later passes do not get it.
        every_pass (`dict[str, Any]`): What every pass gets beside these: an encoder's outputs, and their mask.
        positions (`torch.LongTensor` of shape `(..., batch, prompt)`, *optional*): Position ids of the prompt, where
            they are not 0, 1, 2, ... from each row's first token; later tokens continue from the last one.
        feeds_tokens (`bool`): Whether the first pass reads the prompt as tokens, and nothing before them. A soft
            prompt takes the place of tokens by embeddings, or of a cache by a filled one.
    """

    model_kwargs: dict[str, Any]
    width: int
    extras: dict[str, Any] = field(default_factory=dict)
    every_pass: dict[str, Any] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    feeds_tokens: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the first pass takes no more than later ones, and tokens are at their usual positions."""
        return self.feeds_tokens and not self.extras and self.positions is None

    @property
    def next_position(self) -> int:
        """The first position behind the prompt, where positions are unusual; else 0."""
        return int(self.positions.max()) + 1 if self.positions is not None else 0

    @property
    def kind(self) -> tuple[str, ...]:
        """Names of the inputs beside tokens; a "+" marks token types that are not all zero."""
        names = (f"{name}{_marks(value)}" for name, value in (self.extras | self.every_pass).items())
        unusual = {"positions": self.positions is not None, "soft prompt": not self.feeds_tokens}
        return (*sorted(names), *(name for name, applies in unusual.items() if applies))

    def unknown_extras(self) -> list[str]:
        """Names of inputs that later passes might need as well."""
        return [name for name in self.extras if name not in FIRST_PASS_INPUTS | _TOKEN_TYPES]

    def extras_of(self, columns: int) -> dict[str, Any]:
        """Return the extras of a pass over the last `columns` columns of the prompt."""
        return {name: value[..., -columns:] if name in _TOKEN_TYPES else value for name, value in self.extras.items()}

    def token_types(self, padding: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what the first pass says of the type of each token, by position: without the padding of each row."""
        columns = torch.arange(self.width)[None] + torch.tensor(padding)[:, None]
        return {
            name: value.gather(-1, columns.clamp(max=self.width - 1).to(value.device))
            for name, value in self.extras.items()
            if name in _TOKEN_TYPES
        }

    def positions_at(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the position ids of tokens in `columns`, shape `(batch, q)`: `(..., batch, q)`."""
        assert self.positions is not None
        inside = columns.clamp(0, self.width - 1).expand(*self.positions.shape[:-2], -1, -1)
        return self.positions.gather(-1, inside) + (columns - self.width + 1).clamp(min=0)


def prepare(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: Mapping[str, Any], padding: Sequence[int]
) -> Preparation:
    """
    Let a target's own code make the inputs of its first pass.

    Args:
        model (`PreTrainedModel`): The target.
        input_ids (`torch.LongTensor` of shape `(batch, prompt)`): The prompts.
        model_kwargs (`Mapping[str, Any]`): What `generate` prepared for the model.
        padding (`Sequence[int]`): Padding columns of each row.
    """
    kept = {name: value for name, value in model_kwargs.items() if name not in CACHE_NAMES and is_given(value)}
    prefix = decoder_prefix(model)
    ours = _OURS | {prefix + name for name in _TEXT}
    every_pass = {"encoder_outputs", "attention_mask"} - ours
    own: Any = model.prepare_inputs_for_generation
    made = own(input_ids, is_first_iteration=True, **cache_argument((), None), **kept)
    made = {name: value for name, value in made.items() if is_given(value)}
    tokens = made.get(prefix + "input_ids")
    return Preparation(
        model_kwargs=kept,
        width=input_ids.shape[1],
        extras={name: value for name, value in made.items() if name not in ours | every_pass},
        every_pass={name: value for name, value in made.items() if name in every_pass},
        positions=_unusual(made.get(prefix + "position_ids"), padding, input_ids),
        feeds_tokens=tokens is not None
        and tokens.shape == input_ids.shape
        and made.get(prefix + "inputs_embeds") is None
        and cache_of(made) is None,
    )


def is_given(value: Any) -> bool:
    """Whether a model input says anything: transformers hands on `None`, `False` and empty collections."""
    return value is not None and value is not False and not (isinstance(value, dict | list | tuple) and not value)


def _unusual(positions: Any, padding: Sequence[int], input_ids: torch.Tensor) -> torch.Tensor | None:
    """Return position ids, for every row, unless they count from zero behind the padding."""
    if not isinstance(positions, torch.Tensor):
        return None
    batch, width = input_ids.shape
    positions = positions[..., -width:].to(input_ids.device).expand(*positions.shape[:-2], batch, -1)
    columns = torch.arange(width, device=input_ids.device)
    usual = columns - torch.tensor(padding, device=input_ids.device)[:, None]  # (batch, width)
    is_usual = bool(((positions == usual) | (usual < 0)).all()) and positions.shape[-1] == width
    return None if is_usual else positions


def _marks(value: Any) -> str:
    return "+" if isinstance(value, torch.Tensor) and value.dtype == torch.long and bool(value.any()) else ""

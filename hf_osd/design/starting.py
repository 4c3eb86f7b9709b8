"""
Where a draft starts: at the least squares solution for what its layers are going to read.

A draft's layers are copied from the target's last ones, and in the target they read a state of many times the size of
an embedding. So the map in front of them is solved for in closed form: from the states at the position before and the
newest token's embedding, to the state that the target itself feeds these layers. On SmolLM2-135M-Instruct, 49,000
positions give a draft whose first token is the target's for .35 of an unseen gsm8k, without one step of gradient;
gradient alone takes eight minutes to get there. Not covered: drafts that read tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..drafts.features import FeatureDraft
from ..drafts.states import StateTap, layers_of
from ..errors import UnsupportedModelError
from ..records import Observation

POSITIONS = 50_000
"""Positions that are solved for, at most: twenty for each of 2,880 inputs, those of four levels of 576 and a token."""

_RIDGE = 1e-2  # added to the diagonal at 50,000 positions, relative to its mean
_RIDGE_GROWTH = (
    0.75  # with fewer positions it is as many times more, to this power: .1 was best at 2,500, .03 at 10,000
)
_TEXTS = 8  # read by the target at a time
_PROBES = (0.0, 1.0, 2.0)  # inputs that tell what a model does with embeddings before its first layer
_TOLERANCE = 1e-2  # relative to the result, in bfloat16


@torch.no_grad()
def start(draft: FeatureDraft, texts: Sequence[Observation], positions: int = POSITIONS) -> bool:
    """
    Solve for the map in front of a cold draft's layers, in place.

    Args:
        draft (`FeatureDraft`): A cold draft that borrows from its target. Its norms are of weight one.
        texts (`Sequence[Observation]`): Recorded texts with states, in any order. They are read once more, for the
            state that enters the copied layers.
        positions (`int`, defaults to 50000): How many of them to use, at most.

    Returns:
        `bool`: Whether it was done. It is not where the draft reads no states, where its architecture does more to its
        inputs than to scale them and to add positions, or where the target has no layers in front of those copied.

    Raises:
        UnsupportedModelError: The target is gone.
    """
    target = draft.target
    if target is None:
        raise UnsupportedModelError("the target of this draft is gone: call borrow(target) first")
    before = len(layers_of(target)) - len(_stack(draft))
    longest = max((len(one.prompt_ids) + len(one.output_ids) for one in texts), default=0)
    entrance = _entrance(draft, longest)
    if not draft.state_layers or before < 1 or entrance is None or longest < 3:
        return False
    sums = _Sums(draft)
    for first in range(0, len(texts), _TEXTS):
        if sums.positions >= positions:
            break
        some = [*texts[first : first + _TEXTS]]
        for text, *found in zip(some, *_entering(target, some, before), strict=True):
            time = len(text.prompt_ids) + len(text.output_ids) - 1
            sums.add(text, found[0][:time], entrance.embeddings(found[1][:time]))
    sums.solve()
    return True


def _entering(target: Any, texts: Sequence[Observation], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings of texts and the target's states after a layer, both `(batch, time, hidden)`."""
    ids = [torch.cat((text.prompt_ids, text.output_ids))[:-1] for text in texts]
    batch = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(target.device)  # on the right: nobody looks there
    _, states = StateTap.of(target, (layer,)).read(lambda: target.get_decoder()(batch, use_cache=False))
    return target.get_input_embeddings()(batch), states


@dataclass(frozen=True, slots=True)
class _Entrance:
    """What a model does to embeddings in front of its first layer: `scale * x + offset`, `(time, hidden)`."""

    scale: float
    offset: torch.Tensor

    def embeddings(self, states: torch.Tensor) -> torch.Tensor:
        """Return what to feed for such states to enter the first layer, `(time, hidden)`."""
        return (states.float() - self.offset[: len(states)]) / self.scale


def _entrance(draft: FeatureDraft, length: int) -> _Entrance | None:
    """Probe a draft with constant embeddings; `None` where it is no scale and offset that lead to its first layer."""
    body: Any = draft.body
    size = (1, max(length, 1), draft.config.text_config.hidden_size)
    seen: list[torch.Tensor] = []
    hook = _stack(draft)[0].register_forward_pre_hook(
        lambda module, inputs, options: seen.append((*inputs, *options.values())[0].float()), with_kwargs=True
    )
    try:
        for value in _PROBES:
            body(inputs_embeds=torch.full(size, value, dtype=draft.dtype, device=draft.device), use_cache=False)
    finally:
        hook.remove()
    zero, one, two = seen
    scale = (one - zero).mean().item()
    straight = all(
        torch.allclose(found, zero + scale * value, atol=_TOLERANCE * (abs(scale) + 1e-6))
        for value, found in zip(_PROBES[1:], (one, two), strict=True)
    )
    return _Entrance(scale, zero[0]) if straight and scale else None


def _stack(draft: FeatureDraft) -> nn.ModuleList:
    return next(module for module in draft.body.modules() if isinstance(module, nn.ModuleList))


class _Sums:
    """The normal equations, added up text by text: inputs are the normed levels, then the token's embedding."""

    def __init__(self, draft: FeatureDraft) -> None:
        self._draft, self._hidden = draft, draft.config.text_config.hidden_size
        width = (len(draft.state_layers) + 1) * self._hidden
        self._inputs = torch.zeros(width, width, device=draft.device)
        self._outputs = torch.zeros(width, self._hidden, device=draft.device)
        self._unit = 0.0
        self.positions = 0

    def add(self, text: Observation, embeddings: torch.Tensor, wanted: torch.Tensor) -> None:
        """
        Add the positions of a text, but the first, which has no states before it, and the last, which has none itself.

        Args:
            text (`Observation`): The text.
            embeddings (`torch.Tensor` of shape `(time, hidden)`): Of all its tokens but the last.
            wanted (`torch.Tensor` of shape `(time, hidden)`): What is to enter the draft's layers there.
        """
        assert text.states is not None
        tokens = embeddings[1:].float()
        levels = text.states[:-1].to(tokens.device).float().chunk(len(self._draft.state_layers), dim=-1)
        self._unit = self._unit or tokens.pow(2).mean().sqrt().item()  # so that the ridge means the same to all inputs
        inputs = torch.cat([*map(_normed, levels), tokens / self._unit], dim=-1)
        self._inputs += inputs.T @ inputs
        self._outputs += inputs.T @ wanted[1:].float()
        self.positions += len(inputs)

    def solve(self) -> None:
        """Write the solution to the draft."""
        draft, hidden = self._draft, self._hidden
        strength = _RIDGE * max(POSITIONS / self.positions, 1.0) ** _RIDGE_GROWTH
        weights = _ridge(self._inputs, self._outputs, strength)
        states, token = weights[:-hidden], weights[-hidden:]
        # From its own states: what the token leaves open, by the last level, which they are going to resemble.
        last = slice(len(weights) - 2 * hidden, len(weights) - hidden)
        rest = self._outputs[last] - self._inputs[last, -hidden:] @ token
        draft.from_self.weight.copy_(_ridge(self._inputs[last, last], rest, strength).T)
        draft.from_states.weight.copy_(states.T)
        draft.from_token.weight.copy_((token / self._unit).T)


def _normed(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor, strength: float) -> torch.Tensor:
    """Solve the normal equations: `inputs` of shape `(n, n)`, `outputs` and result of shape `(n, hidden)`."""
    diagonal = strength * inputs.diagonal().mean() * torch.eye(len(inputs), device=inputs.device)
    solved: torch.Tensor = torch.linalg.solve(inputs + diagonal, outputs)
    return solved

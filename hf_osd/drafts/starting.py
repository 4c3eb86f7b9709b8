"""
Where a draft starts: at the least squares solution for what its layers are going to read.

A draft's layers are copied from the target's last ones, and in the target they read a state of many times the size of
an embedding. So the map in front of them is solved for in closed form: from the states at the position before and the
newest token's embedding, to the state that the target itself feeds these layers. On SmolLM2-135M-Instruct, 49,000
positions give a draft whose first token is the target's for .35 of an unseen gsm8k, without one step of gradient;
gradient alone takes eight minutes to get there. Not covered: drafts that read tokens alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..records import Observation
from .features import FeatureDraft
from .states import StateTap, layers_of

POSITIONS = 50_000
"""Positions that are solved for, at most: twenty for each of 2,880 inputs, those of four levels of 576 and a token."""

ONLINE_POSITIONS = 8192
"""Positions from which on a draft that began cold learns by gradient alone; a solution takes three seconds by then."""

_RIDGE = 1e-2  # added to the diagonal at 50,000 positions, relative to its mean
_RIDGE_GROWTH = (
    0.75  # with fewer positions it is as many times more, to this power: .1 was best at 2,500, .03 at 10,000
)
_TEXTS = 8  # read by the target at a time
_ROWS = 8192  # of the inputs that are multiplied in float32 at a time
_PROBES = (0.0, 1.0, 2.0)  # inputs that tell what a model does with embeddings before its first layer
_TOLERANCE = 1e-2  # relative to the result, in bfloat16


def start(draft: FeatureDraft, texts: Sequence[Observation], positions: int = POSITIONS) -> bool:
    """
    Solve for the map in front of a cold draft's layers, and put the solution into it.

    Args:
        draft, texts, positions: See [`solve`].

    Returns:
        `bool`: Whether there is a solution; without one, the draft stays as it was.

    Raises:
        UnsupportedModelError: The target is gone.
    """
    found = solve(draft, texts, positions)
    draft.load_state_dict(found, strict=False)
    return bool(found)


def is_due(solved: int | None, positions: int) -> bool:
    """
    Say whether a draft that serves already is to be solved for, again.

    At first, and whenever there are twice as many positions, until there are enough. Online, on SmolLM2-135M-Instruct,
    that gives in 100 requests of gsm8k an acceptance of .50, a single solution from the first eight requests .40, and
    gradient alone .20.

    Args:
        solved (`int`, *optional*): Positions of the last solution, 0 before the first: `config.solved` of the draft.
            `None` for a draft that has been taught otherwise, which a solution would set back.
        positions (`int`): Positions that there are now.
    """
    return solved is not None and solved < ONLINE_POSITIONS and positions >= max(2 * solved, 1)


@torch.no_grad()
def solve(draft: FeatureDraft, texts: Sequence[Observation], positions: int = POSITIONS) -> dict[str, torch.Tensor]:
    """
    Solve for the map in front of a draft's layers.

    The states of the texts that were recorded are used where the draft reads the layer in front of those that it is
    made of, as it does by default. Otherwise, or where they are not kept, the target reads the texts once more.

    Args:
        draft (`FeatureDraft`): A draft that borrows from its target, or a copy of it, which nobody else may run
            meanwhile. Its norms are taken to be of weight one. It is not changed.
        texts (`Sequence[Observation]`): Texts of the target, in any order.
        positions (`int`, defaults to 50000): How many of them to use, at most. With fewer of them than inputs, what
            it costs grows with their square: 2,500 take a second where 49,000 take twelve.

    Returns:
        `dict[str, torch.Tensor]`: Weights by name, float32. Empty where there is no solution: the draft reads no
        states, its architecture does more to its inputs than to scale them and to add positions, the target has no
        layers in front of those copied, or the texts are too short.

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
        return {}
    pairs = _Pairs(draft)
    for first in range(0, len(texts), _TEXTS):
        if pairs.positions >= positions:
            break
        some = texts[first : first + _TEXTS]
        for text, states in zip(some, _states(draft, target, some, before), strict=True):
            ids = torch.cat((text.prompt_ids, text.output_ids))[:-1].to(target.device)
            pairs.add(target.get_input_embeddings()(ids), states, entrance)
    return pairs.solution()


def _states(
    draft: FeatureDraft, target: PreTrainedModel, texts: Sequence[Observation], before: int
) -> Iterator[torch.Tensor]:
    """Yield the states of each text after the layers that the draft reads, and after one more, `(time, size)`."""
    if before not in draft.state_layers or any(text.states is None for text in texts):
        ids = [torch.cat((text.prompt_ids, text.output_ids))[:-1] for text in texts]
        read = _read(target, ids, (*draft.state_layers, before))
        yield from (states[: len(one)] for states, one in zip(read, ids, strict=True))
        return
    for text in texts:
        assert text.states is not None
        levels = text.states.to(target.device).chunk(len(draft.state_layers), dim=-1)
        yield torch.cat([*levels, levels[draft.state_layers.index(before)]], dim=-1)


def _read(target: Any, texts: Sequence[torch.Tensor], layers: Sequence[int]) -> torch.Tensor:
    """Return the states of texts, `(batch, time, layers * hidden)`."""
    ids = nn.utils.rnn.pad_sequence([*texts], batch_first=True).to(target.device)  # on the right: nobody looks there
    with torch.autocast(target.device.type, enabled=False):
        _, states = StateTap.of(target, layers).read(lambda: target.get_decoder()(ids, use_cache=False))
    return states


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


class _Pairs:
    """What the map is given at each position, and what it is to return: normed levels and a token, and a state."""

    def __init__(self, draft: FeatureDraft) -> None:
        self._hidden: int = draft.config.text_config.hidden_size
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []
        self._unit = 0.0
        self.positions = 0

    def add(self, tokens: torch.Tensor, states: torch.Tensor, entrance: _Entrance) -> None:
        """
        Add the positions of a text, but the first, which has no states before it.

        Args:
            tokens (`torch.Tensor` of shape `(time, hidden)`): Embeddings of its tokens.
            states (`torch.Tensor` of shape `(time, (levels + 1) * hidden)`): Of the target, level by level; the last
                are those that are to enter the draft's layers.
            entrance ([`_Entrance`]): What is in front of these layers.
        """
        *levels, wanted = states.float().chunk(states.shape[-1] // self._hidden, dim=-1)
        newest = tokens[1:].float()
        self._unit = self._unit or newest.pow(2).mean().sqrt().item()  # so that the ridge means the same to all inputs
        inputs = torch.cat([*(_normed(level[:-1]) for level in levels), newest / self._unit], dim=-1)
        self._inputs.append(inputs.to(states.dtype))
        self._outputs.append(entrance.embeddings(wanted)[1:].to(states.dtype))
        self.positions += len(inputs)

    def solution(self) -> dict[str, torch.Tensor]:
        """Return the weights of the map, each `(hidden, inputs)`."""
        inputs, outputs, hidden = torch.cat(self._inputs), torch.cat(self._outputs), self._hidden
        strength = _RIDGE * max(POSITIONS / self.positions, 1.0) ** _RIDGE_GROWTH
        weights = _ridge(inputs, outputs, strength)
        states, token = weights[:-hidden], weights[-hidden:]
        # From its own states: what the token leaves open, by the last level, which they are going to resemble.
        rest = outputs - inputs[:, -hidden:] @ token.to(inputs.dtype)
        own = _ridge(inputs[:, -2 * hidden : -hidden], rest, strength)
        found = {"from_states": states, "from_token": token / self._unit, "from_self": own}
        return {f"{name}.weight": value.T.contiguous() for name, value in found.items()}


def _normed(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor, strength: float) -> torch.Tensor:
    """
    Return the weights of a ridge regression, `(n, hidden)` float32, from `(rows, n)` and `(rows, hidden)`.

    By the normal equations, or by their dual where there are fewer rows than inputs: the same weights for less.
    """
    rows, count = inputs.shape
    if rows < count:
        inputs = inputs.float()
        return inputs.T @ _solved(inputs @ inputs.T, outputs.float(), strength * inputs.pow(2).sum() / count)
    products = torch.zeros(count, count + outputs.shape[1], device=inputs.device)
    for first in range(0, rows, _ROWS):
        some = slice(first, first + _ROWS)
        products += inputs[some].float().T @ torch.cat((inputs[some], outputs[some]), dim=1).float()
    squares = products[:, :count]
    return _solved(squares, products[:, count:], strength * squares.diagonal().mean())


def _solved(squares: torch.Tensor, outputs: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.solve(squares + ridge * torch.eye(len(squares), device=squares.device), outputs)
    return found

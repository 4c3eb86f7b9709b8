"""
Starts a draft in closed form: the map in front of its layers is the least squares solution for their input.

A draft's layers are copies of the target's last ones. In the target they read a state that is many times as large as
an embedding, so the copies work only behind a map that gives them such states. Its inputs are the target's states at
the position before and the newest token's embedding; its output is the state that the target itself feeds these
layers. On SmolLM2-135M-Instruct, a solution from 49,000 positions has a first token equal to the target's at .35 of
the positions of an unseen gsm8k; training by gradient alone takes eight minutes to get there. Not covered: drafts that
read tokens alone.
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
"""Most positions that a solution uses: twenty for each of 2,880 inputs (of SmolLM2: four states and a token)."""

ONLINE_POSITIONS = 8192
"""Positions from which on an online draft is not solved for again: a solution then takes three seconds."""

_RIDGE = 1e-2  # ridge at 50,000 positions, in means of the diagonal
_RIDGE_GROWTH = 0.75  # exponent by which the ridge grows with fewer positions: .1 was best at 2,500, .03 at 10,000
_TEXTS = 8  # texts that the target reads at a time
_ROWS = 8192  # positions whose products are taken in float32 at a time
_PROBES = (0.0, 1.0, 2.0)  # constant embeddings that show what a model does with its inputs before its first layer
_TOLERANCE = 1e-2  # relative error up to which that counts as scaling and adding positions, in bfloat16


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
    Return whether a draft that serves already is to be solved for again.

    It is at first, and whenever there are twice as many positions, up to `ONLINE_POSITIONS`. On SmolLM2-135M-Instruct,
    100 requests of gsm8k so reach an acceptance of .50, against .40 by a single solution from the first eight requests
    and .20 by gradient alone.

    Args:
        solved (`int`, *optional*): Positions of the last solution, 0 before the first: `config.solved` of the draft.
            `None` for a trained draft, which a solution would make worse.
        positions (`int`): Positions that there are now.
    """
    return solved is not None and solved < ONLINE_POSITIONS and positions >= max(2 * solved, 1)


def solve_again(draft: Any, copied: FeatureDraft, observations: Sequence[Observation]) -> dict[str, torch.Tensor]:
    """
    Solve for a draft that serves, where that is due, and note in its configuration that it was.

    Args:
        draft (`PreTrainedModel`): The live draft; see [`is_due`].
        copied (`FeatureDraft`): Its training copy; see [`solve`].
        observations (`Sequence[Observation]`): What was recorded so far, the newest last.

    Returns:
        `dict[str, torch.Tensor]`: Weights by name; empty where nothing is due, as for every other kind of draft.
    """
    positions = sum(len(one.prompt_ids) + len(one.output_ids) - 2 for one in observations)
    if not isinstance(draft, FeatureDraft) or not is_due(draft.config.solved, positions):
        return {}
    draft.config.solved = positions
    return solve(copied, observations[::-1], ONLINE_POSITIONS)


@torch.no_grad()
def solve(draft: FeatureDraft, texts: Sequence[Observation], positions: int = POSITIONS) -> dict[str, torch.Tensor]:
    """
    Solve for the map in front of a draft's layers.

    If the draft reads the state in front of the layers that it copies, as it does by default, the recorded states of
    the texts are used. Otherwise, or if none were kept, the target reads the texts again.

    Args:
        draft (`FeatureDraft`): A draft that borrows from its target, or a copy of it, which must not run
            elsewhere meanwhile. Its norms are taken to be of weight one. It is not changed.
        texts (`Sequence[Observation]`): Texts of the target, in any order.
        positions (`int`, defaults to 50000): How many of them to use, at most. 2,500 take a second, 49,000 twelve.

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
    ids = nn.utils.rnn.pad_sequence([*texts], batch_first=True).to(target.device)  # right padding is never read
    with torch.autocast(target.device.type, enabled=False):
        _, states = StateTap.of(target, layers).read(lambda: target.get_decoder()(ids, use_cache=False))
    return states


@dataclass(frozen=True, slots=True)
class _Entrance:
    """What a model does to embeddings before its first layer: `scale * x + offset`, `(time, hidden)`."""

    scale: float
    offset: torch.Tensor

    def embeddings(self, states: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `(time, hidden)` for which these states enter the first layer."""
        return (states.float() - self.offset[: len(states)]) / self.scale


def _entrance(draft: FeatureDraft, length: int) -> _Entrance | None:
    """Probe a draft with constant embeddings; `None` where it does more to them than to scale and to add."""
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
    """Inputs of the map at each position (normed states and a token), and the states that it is to return."""

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
            states (`torch.Tensor` of shape `(time, (levels + 1) * hidden)`): Those of the target, layer by layer; the
                last are those that shall enter the draft's layers.
            entrance ([`_Entrance`]): What the model does before these layers.
        """
        *levels, wanted = states.float().chunk(states.shape[-1] // self._hidden, dim=-1)
        newest = tokens[1:].float()
        self._unit = self._unit or newest.pow(2).mean().sqrt().item()  # so that the ridge weighs equally on all inputs
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
        # The draft's own states come to resemble the last level: their map is fitted to what the token leaves open.
        rest = outputs - inputs[:, -hidden:] @ token.to(inputs.dtype)
        own = _ridge(inputs[:, -2 * hidden : -hidden], rest, strength)
        found = {"from_states": states, "from_token": token / self._unit, "from_self": own}
        return {f"{name}.weight": value.T.contiguous() for name, value in found.items()}


def _normed(states: torch.Tensor) -> torch.Tensor:
    return nn.functional.rms_norm(states, states.shape[-1:], eps=1e-6)


def _ridge(inputs: torch.Tensor, outputs: torch.Tensor, strength: float) -> torch.Tensor:
    """
    Return the weights of a ridge regression, `(n, hidden)` float32, from `(rows, n)` and `(rows, hidden)`.

    Solves the normal equations, or their dual where there are fewer rows than inputs; the weights are the same.
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

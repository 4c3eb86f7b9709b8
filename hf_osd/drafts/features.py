"""
A draft that reads its target's hidden states: one or two of the target's own layers behind a map of these states.

The input of EAGLE-3 (https://arxiv.org/abs/2503.01840): states of several layers at the position before, and the
embedding of the newest token. Embedding and output head are the target's, borrowed and never trained, so that the
vocabulary that is proposed from can change with the traffic. Not covered: what serves it; see
`serving/feature_decoder.py`.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .._caches import cache_argument, cache_of
from .._compat import attention_implementation
from ..errors import UnsupportedModelError, is_out_of_memory
from .borrowing import Borrowed
from .feature_config import FeatureDraftConfig
from .states import decoder_of, layers_of
from .vocabulary import TrafficVocabulary

_GENERAL = 4096  # tokens that a cold draft always proposes from: the first of the vocabulary
_STATES_SHARE = 0.3  # weight of the target's last state, relative to the token, in a cold draft's input


class FeatureDraft(PreTrainedModel, GenerationMixin):
    """
    A few layers behind a map of the target's states and the newest token's embedding.

    Args:
        config ([`FeatureDraftConfig`]): Its configuration.

    Example:

    ```python
    >>> draft = FeatureDraft.of(target, state_layers=(3, 15, 29, 30))
    >>> draft.save_pretrained("draft")
    >>> AutoModelForCausalLM.from_pretrained("draft").borrow(target)
    ```
    """

    config_class = FeatureDraftConfig
    base_model_prefix = "body"
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: FeatureDraftConfig) -> None:
        super().__init__(config)
        hidden = config.text_config.hidden_size
        self.body: Any = AutoModel.from_config(config.text_config)
        self.body.set_input_embeddings(nn.Identity())  # the target's, borrowed, takes its place
        self._body_parameters = frozenset(inspect.signature(self.body.forward).parameters)
        levels = len(config.state_layers)
        if levels:
            self.state_norms = nn.ModuleList(nn.RMSNorm(hidden, eps=1e-6) for _ in range(levels))
            self.from_states = nn.Linear(levels * hidden, hidden, bias=False)
            self.from_token = nn.Linear(hidden, hidden, bias=False)
            self.own_norm = nn.RMSNorm(hidden, eps=1e-6)
            self.from_self = nn.Linear(hidden, hidden, bias=False)
        self.general: torch.Tensor
        self.register_buffer("general", torch.zeros(config.general_tokens, dtype=torch.long))
        self._borrowed = Borrowed()
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def of(
        cls,
        target: PreTrainedModel,
        *,
        layers: int = 1,
        source: PreTrainedModel | None = None,
        state_layers: Sequence[int] | None = None,
        general: torch.Tensor | None = None,
    ) -> "FeatureDraft":
        """
        Make a cold draft for a target: its last layers behind a map that passes the last state and the token on.

        Args:
            target (`PreTrainedModel`): A decoder-only model.
            layers (`int`, defaults to 1): Layers of the draft.
            source (`PreTrainedModel`, *optional*): Whose last layers are copied: a model of the target's class, such
                as [`~hf_osd.drafts.pruning.prune`] makes. Defaults to the target.
            state_layers (`Sequence[int]`, *optional*): See [`FeatureDraftConfig`]; defaults to an early and a
                middle one, and the last two.
            general (`torch.LongTensor` of shape `(tokens,)`, *optional*): Tokens that it always proposes from.
                Defaults to the first 4,096, which are the most frequent pieces of a vocabulary made by merging.

        Raises:
            UnsupportedModelError: Nothing can be made of this architecture.
        """
        chosen = default_state_layers(target) if state_layers is None else tuple(state_layers)
        if general is None:
            general = torch.arange(min(_GENERAL, target.config.get_text_config(decoder=True).vocab_size))
        options: dict[str, Any] = {"target": target.config._name_or_path, "general_tokens": len(general)}
        try:
            body = _body_config(source or target, layers)
            draft = cls(FeatureDraftConfig(text_config=body, state_layers=chosen, solved=0, **options))
            draft._start_from(source or target)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # as architectures fail
            if isinstance(error, UnsupportedModelError) or is_out_of_memory(error):
                raise
            raise UnsupportedModelError(
                f"no draft can be made of the layers of {type(target).__name__}: {error}", "draft: cannot be made"
            ) from error
        draft.general.copy_(general)
        model: nn.Module = draft
        model.to(device=target.device, dtype=target.dtype)
        model.eval()
        return draft.borrow(target)

    @torch.no_grad()
    def _start_from(self, source: PreTrainedModel) -> None:
        stack, own = layers_of(source), self.body.state_dict()
        layers = next(m for m in self.body.modules() if isinstance(m, nn.ModuleList))
        rest = {name: value for name, value in decoder_of(source).state_dict().items() if name in own}
        self.body.load_state_dict({**own, **{n: v for n, v in rest.items() if v.shape == own[n].shape}})
        for layer, copied in zip(layers, stack[len(stack) - len(layers) :], strict=True):
            layer.load_state_dict(copied.state_dict())
        if self.config.state_layers:
            hidden = self.from_token.weight.shape[0]
            self.from_states.weight.zero_()[:, -hidden:] = _STATES_SHARE * torch.eye(hidden)
            self.from_token.weight.copy_(torch.eye(hidden))
            self.from_self.weight.copy_(_STATES_SHARE * torch.eye(hidden))

    def borrow(self, target: PreTrainedModel) -> "FeatureDraft":
        """
        Use embedding and output head of a target in place, from now on.

        Args:
            target (`PreTrainedModel`): The target.

        Raises:
            UnsupportedModelError: It has other dimensions than the one the draft was made for.
        """
        head: Any = target.get_output_embeddings()
        if head is None or tuple(head.weight.shape) != (self.vocab_size, self.config.text_config.hidden_size):
            raise UnsupportedModelError(
                f"the draft was made for {self.config.target or 'another target'}, and {type(target).__name__} has an "
                "output head of another shape: design a draft for this target",
                "draft: made for another target",
            )
        self._borrowed = Borrowed(target, self.general.tolist())
        return self

    @property
    def target(self) -> PreTrainedModel | None:
        """The target it borrows from, or `None` once nobody else uses it."""
        return self._borrowed.target()

    @property
    def vocabulary(self) -> TrafficVocabulary:
        """The tokens that it proposes from, which follow the traffic; the copies of a draft share them."""
        return self._borrowed.vocabulary

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        return int(self.config.text_config.vocab_size)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Layers of the target whose states it reads."""
        return tuple(self.config.state_layers)

    @property
    def state_size(self) -> int:
        """Size of the states that it reads at a position: layers times hidden size."""
        return len(self.config.state_layers) * int(self.config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """Return the target's embedding, which is no module of this draft."""
        embedding: nn.Module = self._borrowed.embedding
        return embedding

    def get_output_embeddings(self) -> None:
        """Return nothing: the output head is the target's, and must not be tied or resized here."""
        return

    def _embed(self, input_ids: torch.Tensor, states: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor:
        """Return what the layers read, `(batch, time, hidden)`."""
        if self._borrowed.embedding is None:
            raise UnsupportedModelError("this draft has no embedding of its own: call borrow(target) first")
        dtype = next(self.body.parameters()).dtype
        tokens: torch.Tensor = self._borrowed.embedding(input_ids).to(dtype)
        if not self.config.state_layers:
            return tokens
        embeds: torch.Tensor = self.from_token(tokens)
        if own is not None:
            embeds = embeds + self.from_self(self.own_norm(own.to(dtype)))
        elif states is not None:
            levels = states.to(dtype).chunk(len(self.state_norms), dim=-1)
            normed = [norm(level) for norm, level in zip(self.state_norms, levels, strict=True)]
            embeds = embeds + self.from_states(torch.cat(normed, dim=-1))
        return embeds

    def head_of(self, vocabulary: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Return the target's output head for some tokens, in the draft's dtype.

        Args:
            vocabulary (`torch.LongTensor` of shape `(tokens,)`, *optional*): Which tokens; defaults to all.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Weights `(tokens, hidden)`, and biases `(tokens,)` where it
            has any. Of all tokens, the target's own memory where the dtype is the same.
        """
        head, dtype = self._borrowed.head, next(self.body.parameters()).dtype
        found = [None if part is None else part.detach() for part in (head.weight, head.bias)]
        if vocabulary is not None:
            found = [None if part is None else part[vocabulary] for part in found]
        weight, bias = (None if part is None else part.to(dtype) for part in found)
        assert weight is not None
        return weight, bias

    def hidden(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Return its last states, `(batch, time, hidden)`, for the inputs of [`forward`] with a cache."""
        embeds = self._embed(input_ids, inputs.get("states"), inputs.get("own_states"))
        return self._run(embeds, inputs.get("attention_mask"), inputs.get("position_ids"), cache_of(inputs), True)[0]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        states: torch.Tensor | None = None,
        own_states: torch.Tensor | None = None,
        own_steps: int = 0,
        vocabulary: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """
        Score the next token behind each position.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, time)`): The newest tokens.
            attention_mask, position_ids, past_key_values, use_cache: As in any causal model of transformers.
            states (`torch.FloatTensor` of shape `(batch, time, state_size)`, *optional*): The target's states at the
                position before each token; zeros where they are not known.
            own_states (`torch.FloatTensor` of shape `(batch, time, hidden)`, *optional*): In place of `states`, its
                own last states there.
            own_steps (`int`, defaults to 0): For training: how many further tokens it drafts at each position, from
                its own states, as it will when it serves. Goes with `states`, and without a cache.
            vocabulary (`torch.LongTensor` of shape `(tokens,)`, *optional*): Score these tokens only.
            logits_to_keep (`int`, defaults to 0): Positions to score, from the end; 0 for all.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: Logits of shape `(batch, keep, tokens)`, the
            cache and, as the only one of `hidden_states`, the last states. With `own_steps`, nothing but logits of
            shape `(own_steps + 1, batch, keep, tokens)`.

        Raises:
            UnsupportedModelError: [`borrow`] has not been called.
        """
        cache = cache_of({"past_key_values": past_key_values, **others})
        if own_steps:
            steps = self._unrolled(input_ids, states, attention_mask, position_ids, own_steps, logits_to_keep)
            return _output(nn.functional.linear(torch.stack(steps), *self.head_of(vocabulary)))
        embeds = self._embed(input_ids, states, own_states)
        hidden, cache = self._run(embeds, attention_mask, position_ids, cache, bool(use_cache))
        logits = nn.functional.linear(hidden[:, -logits_to_keep:], *self.head_of(vocabulary))
        return _output(logits, hidden, cache)

    def _run(
        self, embeds: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, cache: Any, keeps: bool
    ) -> tuple[torch.Tensor, Cache | None]:
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "use_cache": keeps}
        output = self.body(**inputs, **cache_argument(self._body_parameters, cache), return_dict=True)
        return output.last_hidden_state, cache_of(output) if keeps else None

    def _unrolled(
        self,
        input_ids: torch.Tensor,
        states: torch.Tensor | None,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        own_steps: int,
        keep: int,
    ) -> list[torch.Tensor]:
        """
        Draft behind each of the last `keep` positions at once; returns states `(batch, keep, hidden)` of each step.

        The token of step s reads the target's states up to s positions before it, and the draft's own states behind
        them (EAGLE-3's training-time test). All steps share one cache; masks select from it what each may see. Only
        the first step reads the positions before, such as those of a prompt.
        """
        known = torch.ones_like(input_ids) if mask is None else mask
        positions = (known.cumsum(-1) - 1).clamp(min=0) if positions is None else positions
        cache = DynamicCache(config=self.config.text_config)
        width, keep = input_ids.shape[1], keep or input_ids.shape[1]
        last = min(width, keep + own_steps - 1)  # each step continues the one before it, from a position earlier
        hidden: list[torch.Tensor] = []
        for step in range(own_steps + 1):
            count = last if step else width
            own = nn.functional.pad(hidden[-1], (0, 0, 1, 0))[:, -count - 1 : -1] if step else None
            seen = self._as_mask(_seen_by_step(known.bool(), step, last))
            embeds = self._embed(input_ids[:, -count:], states, own)
            hidden.append(self._run(embeds, seen, positions[:, -count:], cache, True)[0])
        return [states_of_step[:, -keep:] for states_of_step in hidden]

    def _as_mask(self, seen: torch.Tensor) -> torch.Tensor:
        if attention_implementation(self.body) != "eager":
            return seen
        dtype = next(self.body.parameters()).dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _output(
    logits: torch.Tensor, hidden: torch.Tensor | None = None, cache: Cache | None = None
) -> CausalLMOutputWithPast:
    states: Any = None if hidden is None else (hidden,)
    return CausalLMOutputWithPast(logits=logits, hidden_states=states, **cache_argument((), cache))


def _seen_by_step(known: torch.Tensor, step: int, last: int) -> torch.Tensor:
    """
    Return which keys a step of [`FeatureDraft._unrolled`] looks at.

    Args:
        known (`torch.BoolTensor` of shape `(batch, time)`): False where a row is padded.
        step (`int`): Keys of this step and of all before it are in the cache: `time` of the first, `last` of others.
        last (`int`): Positions, from the end, of the steps behind the first.

    Returns:
        `torch.BoolTensor` of shape `(batch, 1, queries, time + step * last)`.
    """
    place = torch.arange(known.shape[1], device=known.device)
    late = place[-last:]
    queries = late if step else place
    distance = queries[:, None] - late  # from the query back to the key
    blocks = [queries[:, None] - place >= step, *(distance == step - later for later in range(1, step + 1))]
    seen = torch.cat(blocks, dim=1) & torch.cat([known, *[known[:, -last:]] * step], dim=1)[:, None, :]
    itself = torch.eye(len(queries), dtype=torch.bool, device=known.device)  # the newest keys are the queries' own
    itself = nn.functional.pad(itself, (seen.shape[-1] - len(queries), 0))
    return (seen | itself)[:, None]  # padding sees itself, for a row without keys would turn into nan


def default_state_layers(target: PreTrainedModel) -> tuple[int, ...]:
    """
    Return after which layers a draft reads its target: an early and a middle one, and the last two.

    The last layer of the target reads the state after the one before it. A draft that reads this state, too, can be
    solved for by recorded states alone; see [`~hf_osd.drafts.starting.solve`].
    """
    count = len(layers_of(target))
    return tuple(sorted({layer for layer in (count // 10, count // 2, count - 1, count) if layer > 0}))


def _body_config(target: PreTrainedModel, layers: int) -> Any:
    config = copy.deepcopy(target.config.get_text_config(decoder=True))
    if not 1 <= layers <= config.num_hidden_layers:
        raise UnsupportedModelError(f"layers must be in [1, {config.num_hidden_layers}], got {layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * layers
    return config


AutoModelForCausalLM.register(FeatureDraftConfig, FeatureDraft)

"""
The training copy of a draft: all of it in float32, or an adapter on a frozen copy.

Written against peft 0.18 to 0.21. Not covered: quantised drafts, and several adapters at once.
"""

import copy
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._compat import attention_implementation
from ..drafts.sharing import copy_beside, in_float32, modules_of
from ..errors import ConfigError, LearningError, MissingDependencyError

# What peft raises where an adapter cannot be made, or cannot be merged.
_REFUSALS = (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

_RANK = 32
# Of peft: what it corrects by itself, what _tie makes true, and a name of transformers that is going away.
_NOISE = "(?s).*(fan_in_fan_out|ensure_weight_tying|tie_word_embeddings|gradient_checkpointing)"


class Student:
    """
    What is trained in place of the live draft, which is only read.

    Without `peft_config` it is a float32 copy of the draft; parameters that the draft has frozen stay so, unless all
    of them are. A draft that carries an adapter already trains that adapter alone, and publishes it under the
    adapter's own names. With `peft_config` the copy stays as it is, in the draft's dtype where that is bfloat16, and
    a float32 adapter on it is trained (LoRA, https://arxiv.org/abs/2106.09685, and whatever else of peft merges);
    what is published is merged, so the live draft has the same modules and the same speed as before.

    A draft whose output layer shares the weight of its embedding keeps doing so: an adapter of the embedding changes
    both. What a draft shares with its target is read where it lies: it is neither copied, trained nor adapted.

    Args:
        draft ([`~transformers.PreTrainedModel`]):
            The live draft.
        peft_config (`peft.PeftConfig` or `Mapping[str, Any]`, *optional*):
            The adapter. A mapping has the fields of the config, or some of them: the others of a LoRA, `{}` being
            one, are chosen so that it learns about as fast as full training at the same learning rate. Defaults to
            training everything.
        seed (`int`, defaults to 0):
            Seed of the adapter's weights. The global random state is left as it was.
        frozen (`Collection[str]`, *optional*):
            Parameters of the draft that are not to be trained; see [`~hf_osd.drafts.sharing.shared_with`].

    Attributes:
        model (`torch.nn.Module`): What the trainer trains.

    Raises:
        ConfigError: The adapter does not fit the draft, cannot be merged into it, or the draft has one already; or the
            one that it has is merged into it.
        MissingDependencyError: peft is not installed.

    Example:

    ```python
    >>> student = Student(draft, {"r": 16})
    >>> trainer = OnlineGKDTrainer(student.model, sample, config, callback)
    >>> draft.load_state_dict(student.weights(), strict=False)
    ```
    """

    def __init__(
        self, draft: PreTrainedModel, peft_config: Any = None, seed: int = 0, frozen: Collection[str] = ()
    ) -> None:
        self._names = [name for name, _ in draft.named_parameters()]
        self._merges = peft_config is not None
        with torch.inference_mode(False):  # whoever calls may be in it
            self.model: Any = (
                _copy(draft, frozen) if peft_config is None else _with_adapter(draft, peft_config, seed, frozen)
            )
        if self._merges:
            self._check_mergeable(_type_name(self.model))

    def weights(self) -> dict[str, torch.Tensor]:
        """
        What to publish: the trained parameters, detached, under their names in the draft.

        Of an adapter, these are all parameters of the modules that it changes, merged in float32. The model is not
        touched; one module at a time is copied.
        """
        if not self._merges:
            return {name: weight.detach() for name, weight in self._trained()}
        merged = dict(self._merged())
        return {name: merged[name] for name in self._names if name in merged}

    def state(self, base: bool = False) -> dict[str, torch.Tensor]:
        """
        The trained parameters, detached, under their names in `model`: what to go back to, and what to save.

        Args:
            base (`bool`, defaults to `False`): Whether to add the frozen weights that an adapter is relative to. They
                never change; a student of a draft that has been published to needs them to go on.
        """
        return {name: weight.detach() for name, weight in (self._all() if base else self._trained())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Take an earlier state, in place: an optimiser of these parameters goes on working.

        Args:
            state (`Mapping[str, torch.Tensor]`): As `state` returned it, with the base or without; any dtype and
                device.

        Raises:
            LearningError: A parameter is missing, is unknown or has another shape; nothing has been changed.
        """
        known, needed = dict(self._all()), dict(self._trained())
        for name in needed:
            if name not in state:
                raise LearningError(f"the state of the training copy has no {name}")
        for name, value in state.items():
            if name not in known or known[name].shape != value.shape:
                expected = tuple(known[name].shape) if name in known else "no such parameter"
                raise LearningError(f"{name} has shape {tuple(value.shape)}, the training copy has {expected}")
        for name, value in state.items():
            known[name].copy_(value)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)

    def _all(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters, and those of the modules that they adapt."""
        inside = {id(weight) for _, module in self._adapted() for weight in module.parameters()}
        for name, weight in self.model.named_parameters():
            if weight.requires_grad or id(weight) in inside:
                yield name, weight

    def _adapted(self) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules that peft has put in the place of the draft's, under the names of the draft's."""
        if not self._merges:
            return
        outer = ""
        for name, module in self.model.get_base_model().named_modules():
            if (not outer or not name.startswith(outer)) and isinstance(module, adapter_kinds()):
                outer = f"{name}."
                yield name, module

    def _merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.model.get_base_model().named_parameters():
            if weight.requires_grad:  # such as biases and norms beside the adapter; what is inside has other names
                yield name, weight.detach().float()
        for name, module in self._adapted():
            for inner, weight in _plain(module).named_parameters():
                yield f"{name}.{inner}", weight.detach()

    def _check_mergeable(self, kind: str) -> None:
        try:
            published = self.weights()
        except _REFUSALS as error:
            raise ConfigError(f"peft_config: {kind} cannot be merged into the draft: {error}") from error
        base = self.model.get_base_model()
        reached = {id(weight) for name, weight in base.named_parameters() if name in published}
        for name, module in self._adapted():
            if any(other.startswith(f"{name}.") for other in published):
                reached |= {id(weight) for weight in module.parameters()}
        for name, weight in self._trained():
            if id(weight) not in reached:
                raise ConfigError(
                    f"peft_config: {kind} cannot be merged into the draft: it trains {name}, which has no weight of "
                    "its own there; where two modules share one, adapt the embedding"
                )


def _trainable_copy(draft: PreTrainedModel, frozen: Collection[str]) -> Any:
    model = copy_beside(draft, frozen)
    if attention_implementation(draft) == "flex_attention" and draft.device.type == "cpu":
        model.set_attn_implementation("sdpa")  # flex attention has no backward pass there (torch 2.13)
    return model


def _copy(draft: PreTrainedModel, frozen: Collection[str]) -> Any:
    has_adapter = carries_adapter(draft)
    if has_adapter:
        check_adapter(draft)
    model = _trainable_copy(draft, frozen)
    in_float32(model, frozen)
    if has_adapter:
        enable_adapter(model)
    own = [weight for name, weight in model.named_parameters() if name not in frozen]
    is_idle = not any(weight.requires_grad for weight in own)  # for serving, not on purpose
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen and (weight.requires_grad or (is_idle and not has_adapter)))
    return model


def _with_adapter(draft: PreTrainedModel, peft_config: Any, seed: int, frozen: Collection[str]) -> Any:
    if carries_adapter(draft):
        raise ConfigError("peft_config: the draft has an adapter already, which is what is trained; leave it out")
    peft = _peft()
    base = _trainable_copy(draft, frozen)
    if base.dtype != torch.bfloat16:  # float16 has no range for gradients
        in_float32(base, frozen)
    borrowed = {name: weight for name, weight in base.named_parameters() if name in frozen}
    try:
        config = _adapter_config(peft_config, base)
        _exclude(config, modules_of(base, frozen))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_NOISE)
            torch.manual_seed(seed)
            model = peft.get_peft_model(base, config)
    except _REFUSALS as error:
        raise ConfigError(f"peft_config: {error}") from error
    if config.is_prompt_learning:
        raise ConfigError(f"peft_config: {_type_name(model)} cannot be merged into the draft")
    _leave_alone(base, borrowed)
    if any(weight.requires_grad and weight.dtype != torch.float32 for weight in model.parameters()):
        in_float32(base, frozen)  # it trains weights of the draft as well, and other types do not mix with those
    _even_out(base)
    _tie(draft, base)
    return model


def _exclude(config: Any, modules: Sequence[str]) -> None:
    """Have peft leave modules alone, besides what the config excludes: by a list of names' ends, or by a pattern."""
    if not modules or not hasattr(config, "exclude_modules"):
        return
    given = config.exclude_modules or []
    patterns = [f"(?:{given})"] if isinstance(given, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in given]
    config.exclude_modules = "|".join([*map(re.escape, modules), *patterns])


def _leave_alone(base: nn.Module, borrowed: Mapping[str, nn.Parameter]) -> None:
    """Refuse an adapter that would be merged into what the draft shares with the target; peft may unfreeze biases."""
    adapted = [module for module in base.modules() if isinstance(module, adapter_kinds())] if borrowed else []
    reached = {id(weight) for module in adapted for weight in module.parameters()}
    for name, weight in borrowed.items():
        if id(weight) in reached:
            raise ConfigError(f"peft_config: it adapts {name}, which is the target's own memory: leave it out")
        weight.requires_grad_(False)


def _adapter_config(peft_config: Any, base: PreTrainedModel) -> Any:
    """A config of one's own: peft writes to it."""
    if isinstance(peft_config, Mapping):
        fields = {"peft_type": "LORA", **peft_config}
        return _peft().get_peft_config(_lora_defaults(base) | fields if fields["peft_type"] == "LORA" else fields)
    if not isinstance(peft_config, _peft().PeftConfig):
        raise TypeError(f"expected a PeftConfig or a mapping, got {type(peft_config).__name__}")
    return copy.deepcopy(peft_config)


def _lora_defaults(base: PreTrainedModel) -> dict[str, Any]:
    """
    All matrices, and a scale at which a step of Adam moves them as far as it would without the adapter.

    The half of an adapter that is not zero starts at a variance of 1 / (3 * width), and the product sums over the
    rank, which rank-stabilised scaling (https://arxiv.org/abs/2312.03732) divides by its square root.
    """
    embedding: Any = base.get_input_embeddings()
    output: Any = base.get_output_embeddings()
    shared = output is not None and output.weight is embedding.weight
    matrices = (
        name
        for name, module in base.named_modules()
        if module is embedding or (isinstance(module, nn.Linear | Conv1D) and not (shared and module is output))
    )
    width = embedding.weight.shape[1]
    return {"r": _RANK, "use_rslora": True, "lora_alpha": round((3 * width) ** 0.5), "target_modules": [*matrices]}


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError('an adapter needs peft: pip install "hf-osd[peft]"') from error
    return peft


def _type_name(model: Any) -> str:
    return str(model.active_peft_config.peft_type.value)


def _plain(module: Any) -> Any:
    """The module that does what an adapted one does, in float32; a copy."""
    copied = copy.deepcopy(module).float()
    if hasattr(copied, "unload_and_optionally_merge_module"):
        return copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    copied.merge()
    return copied.get_base_layer()


@torch.no_grad()
def _even_out(base: nn.Module) -> None:
    """
    Let an embedding learn as fast as linear layers do.

    peft draws one half of its adapter from N(0, 1), that of a linear layer of `width` inputs from a variance of
    1 / (3 * width). The other half is zero, so the function stays the same.
    """
    for module in base.modules():
        for half in getattr(module, "lora_embedding_B", {}).values():  # (width, rank)
            half /= (3 * half.shape[0]) ** 0.5


def _tie(draft: PreTrainedModel, base: Any) -> None:
    """
    Let the output layer follow the adapter of the embedding whose weight it shares.

    peft (0.21) ties copies of the embedding for some models, and adapters by two parameters over one storage, which
    casting to float32 parts. This can go once `ensure_weight_tying` trains one parameter for all models.
    """
    output, embedding = draft.get_output_embeddings(), base.get_input_embeddings()
    if output is None or getattr(output, "weight", None) is not draft.get_input_embeddings().weight:
        return
    if isinstance(embedding, adapter_kinds()) and not hasattr(embedding, "token_adapter"):
        base.set_output_embeddings(_TiedOutput(embedding, getattr(output, "bias", None)))


class _TiedOutput(nn.Module):
    """The output layer of a draft with an adapted embedding. It owns nothing but its bias."""

    def __init__(self, embedding: Any, bias: nn.Parameter | None) -> None:
        super().__init__()
        self._embedding = (embedding,)  # a tuple, so that it is no submodule
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        if getattr(embedding, "lora_variant", None):
            raise ConfigError("peft_config: variants of LoRA cannot adapt an embedding that is also the output layer")

    @property
    def weight(self) -> torch.Tensor:
        """Without the adapter; `(vocab, hidden)`."""
        weight: torch.Tensor = self._embedding[0].weight
        return weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(batch, time, vocab)` from hidden states of shape `(batch, time, hidden)`."""
        layer = self._embedding[0]
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        for name, down in getattr(layer, "lora_embedding_B", {}).items():  # (hidden, rank)
            up = layer.lora_embedding_A[name]  # (rank, vocab)
            low = (hidden.to(down.dtype) @ down * layer.scaling[name]).to(logits.dtype)
            # In place: more tensors of this size would cost as much as all that the adapter saves.
            logits.view(-1, logits.shape[-1]).addmm_(low.flatten(0, -2), up.to(logits.dtype))
        return logits


def adapter_kinds() -> tuple[type[Any], ...]:
    """Layers with an adapter, and modules of which peft trains a copy."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, adapter_kinds()))


def carries_adapter(model: nn.Module) -> bool:
    """Whether a model has adapters in its layers; peft (0.18) leaves its config behind where it takes them out."""
    return hasattr(model, "peft_config") and any(True for _ in _adapted(model))


def check_adapter(draft: nn.Module) -> None:
    """
    Refuse an adapter that is merged into the draft: it has no part in what the draft computes, so it cannot learn.

    Args:
        draft ([`~transformers.PreTrainedModel`]): A draft that carries an adapter.

    Raises:
        ConfigError: Names a module.
    """
    for name, module in _adapted(draft):
        if getattr(module, "merged", False):
            raise ConfigError(
                f"the draft's adapter is merged into {name}, where it cannot learn: unmerge_adapter() before, or "
                "merge_and_unload() and pass the result"
            )


def enable_adapter(model: Any) -> None:
    """
    Put the active adapters of a copy in use, whatever the draft does at this moment: a request may have disabled them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The copy. Where nothing in it is trainable, as in a draft loaded for
            inference, its active adapters are.
    """
    is_idle = not any(weight.requires_grad for weight in model.parameters())
    for _, module in _adapted(model):
        if module.disable_adapters:
            module.enable_adapters(True)
        elif is_idle:
            module.set_adapter(module.active_adapters)

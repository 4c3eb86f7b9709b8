"""
Adapters of a draft, by peft: one that is added for training and merged for serving, or one that it carries already.

Written against peft 0.18 to 0.21. Not covered: quantised drafts, and several active adapters at once.
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

from ..errors import ConfigError, MissingDependencyError
from .sharing import copy_beside, in_float32, modules_of

# What peft raises where an adapter cannot be made, or cannot be merged.
_REFUSALS = (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

_RANK = 32  # of a LoRA whose mapping names none
# Warnings of peft: what it corrects by itself, what _tie makes true, and a name of transformers that is going away.
_NOISE = "(?s).*(fan_in_fan_out|ensure_weight_tying|tie_word_embeddings|gradient_checkpointing)"


def add_adapter(base: PreTrainedModel, peft_config: Any, seed: int = 0, frozen: Collection[str] = ()) -> Any:
    """
    Put a float32 adapter on a copy of a draft, which stays in bfloat16 if it is.

    Args:
        base ([`~transformers.PreTrainedModel`]): The copy; see [`~hf_osd.drafts.sharing.copy_beside`]. It is changed.
        peft_config (`peft.PeftConfig` or `Mapping[str, Any]`): The adapter. A mapping has some fields of the config;
            the others of a LoRA, `{}` being one, are chosen so that it learns about as fast as full training does.
        seed (`int`, defaults to 0): Seed of the adapter's weights. The global random state is left as it was.
        frozen (`Collection[str]`, *optional*): Parameters of the target, which are not adapted.

    Returns:
        `peft.PeftModel`: What to train.

    Raises:
        ConfigError: The adapter does not fit the draft, cannot be merged into it, or the draft has one already.
        MissingDependencyError: peft is not installed.
    """
    if carries_adapter(base):
        raise ConfigError("peft_config: the draft has an adapter already, which is what is trained; leave it out")
    peft, names = _peft(), [name for name, _ in base.named_parameters()]
    output, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = output is not None and getattr(output, "weight", None) is embedding.weight
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
    if is_tied:
        _tie(base, output)
    _check_mergeable(model, names)
    return model


def outermost(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that peft has put in the place of the draft's, under the names of the draft's."""
    outer = ""
    for name, module in model.get_base_model().named_modules():
        if (not outer or not name.startswith(outer)) and isinstance(module, adapter_kinds()):
            outer = f"{name}."
            yield name, module


def merged(model: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """
    Return what the trained adapter of a model comes to: all parameters of the modules that it changes, in float32.

    The model is not touched; one module at a time is copied.

    Args:
        model (`peft.PeftModel`): Of [`add_adapter`].
        names (`Sequence[str]`): Parameters of the draft; others are left out.
    """
    found = dict(_merged(model))
    return {name: found[name] for name in names if name in found}


def _merged(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in model.get_base_model().named_parameters():
        if weight.requires_grad:  # such as biases and norms beside the adapter; what is inside has other names
            yield name, weight.detach().float()
    for name, module in outermost(model):
        for inner, weight in _plain(module).named_parameters():
            yield f"{name}.{inner}", weight.detach()


def _check_mergeable(model: Any, names: Sequence[str]) -> None:
    """Refuse an adapter that trains what has no place in the draft."""
    kind = _type_name(model)
    try:
        published = merged(model, names)
    except _REFUSALS as error:
        raise ConfigError(f"peft_config: {kind} cannot be merged into the draft: {error}") from error
    reached = {id(weight) for name, weight in model.get_base_model().named_parameters() if name in published}
    for name, module in outermost(model):
        if any(other.startswith(f"{name}.") for other in published):
            reached |= {id(weight) for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if weight.requires_grad and id(weight) not in reached:
            raise ConfigError(
                f"peft_config: {kind} cannot be merged into the draft: it trains {name}, which has no weight of "
                "its own there; where two modules share one, adapt the embedding"
            )


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


def _tie(base: Any, output: Any) -> None:
    """
    Let the output layer follow the adapter of the embedding whose weight it shares.

    peft (0.21) ties copies of the embedding for some models, and adapters by two parameters over one storage, which
    casting to float32 parts. This can go once `ensure_weight_tying` trains one parameter for all models.
    """
    embedding = base.get_input_embeddings()
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


def _plain(module: Any) -> Any:
    """The module that does what an adapted one does, in float32; a copy."""
    copied = copy.deepcopy(module).float()
    if hasattr(copied, "unload_and_optionally_merge_module"):
        return copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    copied.merge()
    return copied.get_base_layer()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError('an adapter needs peft: pip install "hf-osd[peft]"') from error
    return peft


def _type_name(model: Any) -> str:
    return str(model.active_peft_config.peft_type.value)


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


def base_of(model: nn.Module) -> frozenset[str]:
    """Name the parameters that the adapters of a model leave alone; none where it carries no adapter."""
    if not carries_adapter(model):
        return frozenset()
    inside = ("base_layer.", "original_module.")
    own = {
        f"{name}.{inner}"
        for name, module in _adapted(model)
        for inner, _ in module.named_parameters()
        if not inner.startswith(inside)
    }
    return frozenset(name for name, _ in model.named_parameters() if name not in own)


def by_adapter(model: Any) -> dict[str, Any]:
    """
    Turn the adapters of one model into one model each, all over the same memory of the base.

    Args:
        model (`peft.PeftModel`): With any number of adapters; left as it is.

    Returns:
        `dict[str, peft.PeftModel]`: By the adapter's name.
    """
    base, found = base_of(model), {}
    for name in model.peft_config:
        found[name] = copied = copy_beside(model, base)
        copied.set_adapter(name)
        for other in model.peft_config:
            if other != name:
                copied.delete_adapter(other)
        copied.eval()
    return found

"""A Llama in what users wrap models in: adapters, compilation, device maps, quantisation."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .building import Missing, find, llama
from .cases import Case, as_target

_WIDE = dict(hidden_size=64, intermediate_size=128)  # sizes that kernels for few bits take
_LORA = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # weights that do something


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"{name.partition('.')[0]} is not installed ({error})") from error


def _adapted(model: PreTrainedModel, kind: str, **settings: Any) -> Any:
    peft = _package("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **settings)).eval()


def _base_of_lora(model: PreTrainedModel) -> PreTrainedModel:
    return _adapted(model, "LoraConfig", **_LORA).get_base_model()


def _with_added_lora(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    try:
        model.add_adapter(_package("peft").LoraConfig(**_LORA))
    except ValueError as error:  # of transformers, where it wants another peft
        raise Missing(str(error)) from error
    return model.eval()


def _compiled(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


def _compiled_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def _compiled_forward(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def _loaded(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Save and load; whoever runs the row deletes its temporary files."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


_PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def _on_disk(model: PreTrainedModel, part: str) -> PreTrainedModel:
    places = {**dict.fromkeys(_PARTS, "cpu"), part: "disk"}
    return _loaded(model, device_map=places, offload_folder=tempfile.mkdtemp())


def _dispatched(model: PreTrainedModel) -> PreTrainedModel:
    return _package("accelerate").dispatch_model(model, dict.fromkeys(_PARTS, "cpu"), force_hooks=True)


def _offloaded(model: PreTrainedModel) -> PreTrainedModel:
    return _package("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))


def _dynamic_int8(model: PreTrainedModel) -> PreTrainedModel:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _torchao_int8(model: PreTrainedModel) -> PreTrainedModel:
    torchao = _package("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return model


def _bitsandbytes(model: PreTrainedModel, **bits: Any) -> PreTrainedModel:
    _package("bitsandbytes")
    return _loaded(model, quantization_config=find("BitsAndBytesConfig")(**bits), device_map="cpu")


def _with_integers(model: PreTrainedModel) -> PreTrainedModel:
    """Integer parameters beside the weights, as packed weights are."""
    for layer in model.model.layers:
        packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
        layer.register_parameter("packed", packed)
    return model


_VIRTUAL = dict(num_virtual_tokens=4)
# Title -> what is done to a Llama.
_WRAPPERS: Mapping[str, Callable[[PreTrainedModel], Any]] = {
    "LoRA (peft)": partial(_adapted, kind="LoraConfig", **_LORA),
    "the base model of a LoRA": _base_of_lora,
    "LoRA by `add_adapter`": _with_added_lora,
    "prompt tuning (peft)": partial(_adapted, kind="PromptTuningConfig", **_VIRTUAL),
    "P-tuning (peft)": partial(_adapted, kind="PromptEncoderConfig", encoder_hidden_size=32, **_VIRTUAL),
    "prefix tuning (peft)": partial(_adapted, kind="PrefixTuningConfig", **_VIRTUAL),
    "`torch.compile(model)`": _compiled,
    "`model.compile()`": _compiled_in_place,
    "`model.forward = torch.compile(model.forward)`": _compiled_forward,
    "`DataParallel`": torch.nn.DataParallel,
    "`device_map`": partial(_loaded, device_map="cpu"),
    "`device_map` with hooks (accelerate)": _dispatched,
    "a layer offloaded to disk": partial(_on_disk, part="model.layers.1"),
    "embeddings offloaded to disk": partial(_on_disk, part="model.embed_tokens"),
    "offloaded to the CPU": _offloaded,
    "dynamic int8 (torch)": _dynamic_int8,
    "int8 weights (torchao)": _torchao_int8,
    "8 bits (bitsandbytes)": partial(_bitsandbytes, load_in_8bit=True),
    "4 bits (bitsandbytes)": partial(_bitsandbytes, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "packed integer weights": _with_integers,
}


def _case(wrap: Callable[[PreTrainedModel], Any]) -> Case:
    target, draft = (wrap(llama(seed, **_WIDE)) for seed in (0, 3))
    return as_target(target, near=llama(**_WIDE), draft=draft, host=llama())


ROWS: Mapping[str, Callable[[], Case]] = {title: partial(_case, wrap) for title, wrap in _WRAPPERS.items()}

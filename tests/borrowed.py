"""Drafts that share their embedding and output layer with the target, in the ways in which that can happen."""

from collections.abc import Callable

import torch
from torch import nn
from traffic import llama
from transformers import LlamaForCausalLM

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Share = Callable[[LlamaForCausalLM, LlamaForCausalLM], None]


def objects(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    draft.set_input_embeddings(target.get_input_embeddings())
    draft.set_output_embeddings(target.get_output_embeddings())


def memory(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    draft.load_state_dict({name: target.state_dict()[name] for name in (EMBEDDING, OUTPUT)}, strict=False, assign=True)


def views(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    """Each lies in a part of a tensor of the target's that is larger."""
    for name in (EMBEDDING, OUTPUT):
        weight = draft.get_parameter(name)
        larger = nn.Parameter(torch.cat((weight.detach(), weight.detach())))
        target.register_parameter(name.replace(".", "_"), larger)
        module, _, _ = name.rpartition(".")
        draft.get_submodule(module).weight = nn.Parameter(larger.detach()[7 : 7 + len(weight)])


def buffers(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> None:
    target.register_buffer("one", draft.get_parameter(EMBEDDING).detach())
    target.register_buffer("other", draft.get_parameter(OUTPUT).detach())


SHARES: dict[str, Share] = {"objects": objects, "memory": memory, "views": views, "buffers": buffers}


def pair(share: Share = objects, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    target, draft = llama(seed=1, layers=2).to(dtype), llama().to(dtype)
    share(draft, target)
    return draft, target


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = dict([*model.named_parameters(), *model.named_buffers()])
    return now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())

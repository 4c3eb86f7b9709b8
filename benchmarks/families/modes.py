"""A Llama asked in unusual ways: other types of numbers, attention and caches, and drafts that share with it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast, StaticCache

from .building import VOCAB, llama, prompts, small_draft
from .cases import Case, as_draft, as_target

_PREFIX = 6  # tokens of a prompt that a cache of the caller's holds already


def _typed(target: torch.dtype, draft: torch.dtype) -> Case:
    return Case(target=llama().to(target), drafts={"wrong": small_draft().to(draft)}, precision=target)


def _autocast() -> Case:
    around = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    return as_target(llama(), around=around, precision=torch.bfloat16)


def _attention(target: str, draft: str) -> Case:
    case = as_target(llama())
    case.target.set_attn_implementation(target)
    for one in case.drafts.values():
        one.set_attn_implementation(draft)
    return case


@torch.no_grad()
def _going_on(target: PreTrainedModel, make: Callable[[], Any], batch: int, seed: int) -> dict[str, Any]:
    """Prompts without padding whose first tokens a cache of the caller's holds."""
    inputs, cache = prompts(batch, seed, padded=False), make()
    target(input_ids=inputs["input_ids"][:, :_PREFIX], past_key_values=cache, use_cache=True)
    return {**inputs, "past_key_values": cache}


def _own_cache(make: Callable[[Any], Any]) -> Case:
    target = llama()
    return as_target(target, inputs=partial(_going_on, target, partial(make, target.config)))


def _dynamic(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


def _static(config: Any) -> StaticCache:
    return StaticCache(config=config, max_cache_len=128)


def _embedded(target: PreTrainedModel, batch: int, seed: int) -> dict[str, torch.Tensor]:
    inputs = prompts(batch, seed)
    embeds = target.get_input_embeddings()(inputs["input_ids"]).detach()
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}


def _embeddings_given() -> Case:
    target = llama()
    return as_target(target, inputs=partial(_embedded, target))


def _shares_embeddings() -> Case:
    """A draft that saves memory: embedding and output layer are the target's own."""
    target, draft = llama(), small_draft()
    draft.model.embed_tokens, draft.lm_head = target.model.embed_tokens, target.lm_head
    return Case(target=target, drafts={"shared": draft})


def _shares_layers() -> Case:
    """An early exit of the target, as a model of its own that shares all of its layers."""
    target, draft = llama(num_hidden_layers=4), llama(seed=1, num_hidden_layers=2)
    draft.model.layers = target.model.layers[:2]
    draft.model.embed_tokens, draft.model.norm, draft.lm_head = (
        target.model.embed_tokens, target.model.norm, target.lm_head,
    )  # fmt: skip
    return Case(target=target, drafts={"early exit": draft})


def _target_itself() -> Case:
    target = llama()
    return Case(target=target, drafts={"itself": target})


def letter_tokenizer(letters: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has a token for each letter, in this order, behind three that mark a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *letters]
    words_to_ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _other_tokenizer(more: int = 0) -> Case:
    """Both in folders with their tokenizers, of which one numbers the letters backwards, and may have `more`."""
    import tempfile

    letters = [chr(0x100 + index) for index in range(VOCAB - 3 + more)]
    folders = [tempfile.mkdtemp() for _ in range(2)]
    models = [llama(), small_draft(VOCAB + more)]
    for folder, model, order in zip(folders, models, (letters[: VOCAB - 3], letters[::-1]), strict=True):
        model.save_pretrained(folder)
        letter_tokenizer(order).save_pretrained(folder)
    models[0].config._name_or_path = folders[0]
    return Case(draft=folders[1], host=models[0])


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
ROWS: Mapping[str, Callable[[], Case]] = {
    "bfloat16": partial(_typed, _BF16, _BF16),
    "bfloat16 with a float32 draft": partial(_typed, _BF16, _F32),
    "float16 with a float32 draft": partial(_typed, _F16, _F32),
    "float32 with a bfloat16 draft": partial(_typed, _F32, _BF16),
    "autocast to bfloat16": _autocast,
    "eager attention": partial(_attention, "eager", "eager"),
    "sdpa attention": partial(_attention, "sdpa", "sdpa"),
    "eager attention with an sdpa draft": partial(_attention, "eager", "sdpa"),
    "flex attention with an sdpa draft": partial(_attention, "flex_attention", "sdpa"),
    "`past_key_values`, a `DynamicCache`": partial(_own_cache, _dynamic),
    "`past_key_values`, a `StaticCache`": partial(_own_cache, _static),
    "`inputs_embeds`": _embeddings_given,
    "a draft that shares embeddings": _shares_embeddings,
    "a draft that shares layers (early exit)": _shares_layers,
    "the target itself as draft": _target_itself,
    "a draft with another vocabulary, and no tokenizers": lambda: as_draft(small_draft(vocab=1700)),
    "a draft with another tokenizer": partial(_other_tokenizer, more=1500),
    "a draft with another tokenizer of as many tokens": _other_tokenizer,
}

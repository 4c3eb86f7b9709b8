"""Two tokenizers of the same letters: a target's, and that of a draft, which numbers and joins them differently."""

import string
from collections.abc import Sequence

import torch
from fakes import VOCAB, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_osd.drafts.translation import Translation

_MARKS = ["<pad>", "<bos>", "<eos>"]
LETTERS = [*string.ascii_letters[: VOCAB - 9], "ab", "bcd", "ea", "é", "aaa", "zz"]  # with the marks, all of VOCAB
OTHERS = [*string.ascii_letters[VOCAB - 9 :: -1], "bc", "da", "e", "aaa", "éé"]


def tokenizer(words: Sequence[str], begins: bool = True) -> PreTrainedTokenizerFast:
    """A token for each word; decoded texts are joined without spaces, and a text begins with a mark."""
    names = list(dict.fromkeys([*_MARKS, *words]))
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<eos>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    if begins:
        made.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


TARGET, DRAFT = tokenizer(LETTERS), tokenizer(OTHERS)
PERMUTED = tokenizer(LETTERS[::-1])


def translation(draft: PreTrainedTokenizerFast = DRAFT) -> Translation:
    """Between these tokenizers."""
    return Translation.between(TARGET, draft, (len(TARGET), len(draft)))


def random_draft(seed: int = 99, **options: object) -> PreTrainedModel:
    """A draft that is hardly ever right."""
    return tiny_model("llama", seed=seed, layers=1, vocab_size=len(DRAFT), **options)


@torch.no_grad()
def permuted(target: PreTrainedModel) -> PreTrainedModel:
    """The target itself, with its tokens numbered as `PERMUTED` does."""
    draft = type(target)(target.config).to(target.dtype).eval()
    draft.load_state_dict(target.state_dict())
    found = translation(PERMUTED)
    order = torch.arange(VOCAB)
    order[found.drafts] = found.targets
    for layer in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        layer.weight.copy_(layer.weight[order].clone())
    return draft


def begun(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts that begin with the mark that the target's tokenizer puts there."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    ids[torch.arange(len(ids)), mask.argmax(1)] = 1
    return {"input_ids": ids, "attention_mask": mask}

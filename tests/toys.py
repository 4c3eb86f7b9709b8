"""A tokenizer of words for the tiny models, with and without a chat template."""

from fakes import VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

END = 2
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_SPECIAL = ["<pad>", "<s>", "<end>", "<user>", "<assistant>"]


def word_tokenizer(template: str | None = TEMPLATE, size: int = VOCAB) -> PreTrainedTokenizerFast:
    """Words `w7`, `w8`, ... are the tokens 7, 8, ...; those that it does not know are `What`."""
    known = [*_SPECIAL, "What", "123", *(f"w{index}" for index in range(7, size))]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(known)}, unk_token="What"))
    made.pre_tokenizer = WhitespaceSplit()
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="<end>")
    more = {"additional_special_tokens": ["<user>", "<assistant>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named, **more)
    tokenizer.chat_template = template
    return tokenizer

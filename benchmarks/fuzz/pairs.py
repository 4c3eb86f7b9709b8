"""Targets of every kind, and assistants for them whose drafts are wrong in some way; small random models, float32."""

import copy
import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hf_osd
from hf_osd.errors import UnsupportedModelError

from ..families.building import VOCAB, build, configure, llama, with_noise
from ..families.cases import Case
from ..families.models import ROWS
from ..families.modes import letter_tokenizer

TARGETS = (
    "Llama", "Qwen3", "GPT-2", "GPT-NeoX", "Gemma", "OPT", "MPT", "Mixtral", "DeepSeek-V3", "BLOOM", "GPT",
    "Mistral, past the window", "Qwen2 with windows, past the window", "Gemma 2, past the window",
    "Gemma 3, past the window", "Gemma 3n with shared layers, past the window", "GPT-OSS, past the window",
    "Llama 4, past the window", "GPT-Neo, past the window", "DeepSeek-V3.2, past the selection",
    "Mamba", "Mamba 2", "Bamba", "Falcon-H1", "Qwen3-Next", "Qwen3.5", "LFM2", "GraniteMoeHybrid",
    "LLaVA, with images", "Qwen2.5-VL, with images", "Gemma 3 (vision), with images", "PaliGemma, with images",
    "T5", "mT5", "BART", "Marian", "Pegasus", "Whisper", "Moonshine", "Whisper with the decoder of Distil-Whisper",
    "LoRA (peft)", "prefix tuning (peft)", "`model.forward = torch.compile(model.forward)`",
)  # fmt: skip
"""
Rows of `benchmarks.families`; a window or selection is of eight tokens. Not RecurrentGemma: a part of its state goes
from one call of `generate` to the next, so that what it gives for a prompt of one token depends on the call before.
"""

ROUTES = ("near", "wrong")
LETTERS = [*string.ascii_letters, *(chr(0x100 + index) for index in range(VOCAB - 3 - 52))]
TOKENIZER = letter_tokenizer(LETTERS)  # of every target: a token for each letter

MakeAssistant = Callable[[Case, hf_osd.OnlineConfig], hf_osd.OnlineAssistant]


@dataclass
class Pair:
    """
    A target, and its assistants by the kind of their drafts.

    Attributes:
        case (`Case`): The row of the target; its inputs are for what does not read text alone.
        assistants (`dict[str, OnlineAssistant]`): See `KINDS`.
        reads_text (`bool`): Whether the target takes any text alone, as tokens, before its output.
        takes_threads (`bool`): Whether the target's own `generate` serves several threads at once: peft's changes the
            model while it runs.
    """

    case: Case
    assistants: dict[str, hf_osd.OnlineAssistant]
    reads_text: bool
    takes_threads: bool

    def close(self) -> None:
        """Stop learning."""
        for one in self.assistants.values():
            one.close()


def _noisy(case: Case) -> Any:
    return copy.deepcopy(list(case.drafts.values())[-1])


def _first(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    return hf_osd.OnlineAssistant(next(iter(case.drafts.values())), case.target, config)


def _last(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    return hf_osd.OnlineAssistant(_noisy(case), case.target, config)


def _routed(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    drafts = dict(zip(ROUTES, (_noisy(case), copy.deepcopy(next(iter(case.drafts.values())))), strict=True))
    return hf_osd.OnlineAssistant(None, case.target, config, drafts=drafts)


def _adapters(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    """Two adapters on one base are two routes."""
    import peft

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    draft = peft.get_peft_model(with_noise(llama()), lora, adapter_name=ROUTES[0])
    draft.add_adapter(ROUTES[1], lora)
    return hf_osd.OnlineAssistant(None, case.target, config, drafts=draft.eval())


def _auto(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    return hf_osd.OnlineAssistant("auto", case.target, config)


def _recurrent(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    draft = build(configure("Lfm2", layer_types=["conv", "full_attention"], conv_L_cache=3), seed=9)
    return hf_osd.OnlineAssistant(draft, case.target, config)


def _foreign(case: Case, config: hf_osd.OnlineConfig) -> hf_osd.OnlineAssistant:
    """A draft that numbers the letters backwards, and knows some more."""
    own = letter_tokenizer([*LETTERS, "more"][::-1])
    draft = llama(seed=77, num_hidden_layers=1, vocab_size=VOCAB + 1)
    return hf_osd.OnlineAssistant(draft, case.target, config, tokenizer=own, target_tokenizer=TOKENIZER)


KINDS: Mapping[str, MakeAssistant] = {
    "wrong": _first, "near": _last, "routes": _routed, "adapters": _adapters, "auto": _auto, "recurrent": _recurrent,
    "another tokenizer": _foreign,
}  # fmt: skip
"""Kinds of drafts, of which some do not go with every target."""


def make_pair(name: str, choose: random.Random) -> Pair:
    """Build a target and, with settings drawn at random, its assistants."""
    case, assistants = ROWS[name].make(), {}
    for kind, make in KINDS.items():
        try:
            assistants[kind] = make(case, settings(choose))
        except UnsupportedModelError:
            continue
    target: Any = case.target
    reads_text = not target.config.is_encoder_decoder and "images" not in name
    return Pair(case, assistants, reads_text, takes_threads="peft" not in name)


def settings(choose: random.Random) -> hf_osd.OnlineConfig:
    """Draw settings; where the draft learns, updates come every few requests, in the thread that serves."""
    return hf_osd.OnlineConfig(
        draft_length=choose.choice([1, 4, 8]),
        draft_nodes=choose.choice([1, 5, 16]),
        draft_length_schedule=choose.choice(["measured", "measured", "constant", "heuristic"]),
        prompt_lookup=choose.random() < 0.7,
        confidence_threshold=choose.choice([0.0, 0.0, 0.4]),
        learn=choose.random() < 0.7,
        gate=choose.random() < 0.5,
        update_every=choose.choice([3, 8]),
        steps_per_update=2,
        batch_size=2,
        max_length=64,
    )

"""A Llama asked for every way to generate."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, WatermarkingConfig

from .building import FIRST_TOKEN, llama
from .cases import Case, as_target

_SURE = dict(do_sample=True, top_k=1)  # sampling whose outcome is known
_SCORES = dict(return_dict_in_generate=True, output_scores=True)


def _no_odd_token(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    scores = scores.clone()
    scores[:, 1::2] = -torch.inf
    return scores


def _until_even(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """A row is done at the first token that 16 divides."""
    return input_ids[:, -1] % 16 == 0


# Setting -> what is given to `generate`.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "sampling": _SURE,
    "`num_return_sequences`": dict(_SURE, num_return_sequences=2),
    "`temperature`, `top_k`, `top_p`, `min_p`, `typical_p`": dict(
        _SURE, temperature=0.7, top_p=0.9, min_p=0.1, typical_p=0.9
    ),
    "`repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`, `min_new_tokens`": dict(
        repetition_penalty=1.3, no_repeat_ngram_size=2, bad_words_ids=[[7], [8, 9]], min_new_tokens=5
    ),
    "`forced_bos_token_id`, `forced_eos_token_id`, `suppress_tokens`": dict(
        forced_bos_token_id=6, forced_eos_token_id=7, suppress_tokens=[8, 9]
    ),
    "`watermarking_config` (green and red tokens)": dict(watermarking_config=WatermarkingConfig()),
    "`logits_processor`: your own": dict(logits_processor=LogitsProcessorList([_no_odd_token])),
    "`stopping_criteria`: your own": dict(stopping_criteria=StoppingCriteriaList([_until_even])),
    "several `eos_token_id`": dict(eos_token_id=list(range(FIRST_TOKEN, FIRST_TOKEN + 10))),
    "`return_dict_in_generate`, `output_scores`, `output_logits`": dict(_SCORES, output_logits=True),
    "`output_attentions`": dict(_SCORES, output_attentions=True),
    "`output_hidden_states`": dict(_SCORES, output_hidden_states=True),
    "`num_beams`": dict(num_beams=3),
    "`guidance_scale`": dict(guidance_scale=1.5),
    "`prompt_lookup_num_tokens`": dict(prompt_lookup_num_tokens=3),
    "`assistant_early_exit`": dict(assistant_early_exit=1),
    "`penalty_alpha` (contrastive search)": dict(penalty_alpha=0.6, top_k=4),
    "`dola_layers`": dict(dola_layers="low"),
    "`force_words_ids` (constrained beams)": dict(force_words_ids=[[7]], num_beams=3),
    "`use_cache=False`": dict(use_cache=False),
    "`cache_implementation='static'`": dict(cache_implementation="static"),
    "`cache_implementation='offloaded'`": dict(cache_implementation="offloaded"),
    "`cache_implementation='quantized'`": dict(cache_implementation="quantized"),
}


def _case(settings: Mapping[str, Any]) -> Case:
    return as_target(llama(), settings=settings, samples=False, learns=False)


ROWS: Mapping[str, Callable[[], Case]] = {title: partial(_case, one) for title, one in _SETTINGS.items()}

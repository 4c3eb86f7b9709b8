"""The run itself: every request goes to every contender, interleaved, in one process, with the same weights."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from ..config import OnlineConfig
from ..evaluation.contenders import Assisted, Contender, Generate, assistant_of, stock
from ..evaluation.encoding import encode_prompts
from ..evaluation.models import Pair, generate_options
from ..evaluation.prompts import Prompt
from ..evaluation.race import Race, run_race
from .results import ONLINE, PLAIN, RECALLING, STATIC, STOCK


def run_demo(
    pair: Pair,
    prompts: Sequence[Prompt],
    config: OnlineConfig,
    observer: Callable[[Race], None] = lambda race: None,
    *,
    requests: int,
    max_new_tokens: int,
    sample: bool = False,
    deadline: float = float("inf"),
) -> Race:
    """
    Serve the prompts by every contender and compare them.

    Args:
        pair (`Pair`): The models.
        prompts (`Sequence[Prompt]`): One more than the requests, where there are enough: the last one warms up.
        config (`OnlineConfig`): Settings of the online contender. The static ones have the same, but do not learn; one
            of them remembers recent outputs all the same.
        observer (`Callable[[Race], None]`, *optional*): Hears of every round.
        requests (`int`): Requests to serve.
        max_new_tokens (`int`): Longest answer.
        sample (`bool`, defaults to `False`): Sample instead of decoding greedily; outputs are then not compared.
        deadline (`float`, *optional*): Time, by `time.perf_counter`, after which no further request starts.
    """
    inputs = encode_prompts(pair, prompts, max_new_tokens)
    with open_contenders(pair, config) as contenders:
        return run_race(
            contenders,
            inputs[:requests],
            generate_options(pair, max_new_tokens, sample=sample),
            observer,
            warm_up=inputs[-1],
            seed=config.seed,
            deadline=deadline,
        )


@contextmanager
def open_contenders(pair: Pair, config: OnlineConfig) -> Iterator[list[Contender]]:
    """Set up plain, transformers' assisted, static and online decoding; none sees what another one has learned."""
    configs = {
        STATIC: replace(config, learn=False, recent_outputs=0),
        RECALLING: replace(config, learn=False),
        ONLINE: config,
    }
    with ExitStack() as stack:
        ours = (
            Assisted(name, pair.target, stack.enter_context(assistant_of(pair, one, copy.deepcopy(pair.draft))))
            for name, one in configs.items()
        )
        yield [Generate(PLAIN, pair.target), stock(STOCK, pair), *ours]

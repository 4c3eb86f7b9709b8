"""
Serve requests made at random both ways, for targets and drafts of every kind, and compare greedy outputs.

Every request draws what is read, its length and padding, processors, what ends it, what is returned and streamed, the
kind of draft, and routes; now and then two are served at once. Drafts learn meanwhile. See `requests` and `pairs`.

    python -m benchmarks.fuzz --cases 60 --output benchmarks/results/fuzz.json
    python -m benchmarks.fuzz "^mamba" t5 --cases 200 --seed 1
"""

import argparse
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.progress import track

from hf_osd.serving.measured import MeasuredSpeculator
from hf_osd.serving.speculation import DraftSpeculator

from ..common import write_result
from .answers import Answer, difference, going_on, ours, plain
from .pairs import TARGETS, Pair, make_pair
from .requests import Request, draw

AT_ONCE = (1, 1, 1, 1, 1, 1, 1, 2)  # requests that are served at once, each as likely
COUNTED = ("accepted_tokens", "accepted_lookup_tokens", "fallbacks", "updates", "failed_updates")

Found = list[dict[str, Any]]


def serve(name: str, cases: int, seed: int, counts: Counter[str]) -> Found:
    """Serve requests of one target, and return those whose answers differ."""
    found: Found = []
    pair = make_pair(name, random.Random(f"{seed} {name}"))
    for case in range(cases):
        choose = random.Random(f"{seed} {name} {case}")
        requests = [draw(pair, choose) for _ in range(choose.choice(AT_ONCE) if pair.takes_threads else 1)]
        for request, answer in zip(requests, answers(pair, requests), strict=True):
            if why := compare(pair, request, answer, counts):
                about = {"target": name, "case": case, "draft": request.kind, "why": why}
                found.append({**about, "settings": repr({**request.settings, **request.own})})
                print(found[-1], file=sys.stderr, flush=True)
    for assistant in pair.assistants.values():
        counts.update({key: getattr(assistant.stats(), key) for key in COUNTED})
    pair.close()
    return found


def answers(pair: Pair, requests: Sequence[Request]) -> list[Answer]:
    """Serve some requests at once, each in a thread of its own."""
    found = [Answer() for _ in requests]

    def one(place: int) -> None:
        assistant = pair.assistants[requests[place].kind]
        found[place] = ours(pair.case.target, requests[place], assistant)

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def compare(pair: Pair, request: Request, answer: Answer, counts: Counter[str]) -> str | None:
    """Say how an answer differs from that of the target alone, if it does."""
    target, expected = pair.case.target, plain(pair.case.target, request)
    why = difference(target, request, expected, answer)
    counts["requests"] += 1
    counts["rows"] += request.rows
    counts["refused by both"] += expected.error is not None and why is None
    if why or expected.error is not None or not pair.reads_text:
        return why
    return compare_caches(target, request, expected, answer, counts)


def compare_caches(
    target: Any, request: Request, expected: Answer, answer: Answer, counts: Counter[str]
) -> str | None:
    """Likewise, of what the target gives when it goes on from the caches that both calls returned, if they did."""
    theirs, own = going_on(request, expected), going_on(request, answer)
    if theirs is None or own is None or not torch.equal(expected.sequences, answer.sequences):
        return None
    counts["went on from the cache"] += 1
    why = difference(target, theirs, plain(target, theirs), plain(target, own))
    return f"going on from the cache: {why}" if why else None


def count_rounds(counts: Counter[str]) -> None:
    """Count the rounds that submit a tree, a chain, or nothing."""

    def counting(propose: Any) -> Any:
        def proposed(*given: Any) -> Any:
            proposal = propose(*given)
            chain = "chains" if proposal.tokens.shape[1] else "plain rounds"
            counts["trees" if proposal.parents is not None else chain] += 1
            return proposal

        return proposed

    for kind in (MeasuredSpeculator, DraftSpeculator):
        kind.propose = counting(kind.propose)  # type: ignore[method-assign]


def main() -> None:
    """Parse options, serve, compare, write; exits with 1 where answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", metavar="REGEX", help="targets to try, whatever the case; all by default"
    )
    parser.add_argument("--cases", type=int, default=60, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = re.compile("|".join(options.targets), re.IGNORECASE)
    names = [name for name in TARGETS if wanted.search(name)]
    counts, differing = Counter[str](), Found()
    count_rounds(counts)
    for name in track(names, transient=True):
        differing += serve(name, options.cases, options.seed, counts)
    about = {"cases": options.cases, "seed": options.seed, "targets": len(names), **counts}
    write_result({**about, "differences": differing}, options.output)
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()

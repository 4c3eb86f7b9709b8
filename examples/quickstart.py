"""
Serve a few requests and watch the draft learn from them. Runs offline, on the embedded pair, in about a minute.

    python examples/quickstart.py
"""

import hf_osd
from hf_osd.evaluation.encoding import encode_prompts
from hf_osd.evaluation.models import EMBEDDED_PAIR, load_pair
from hf_osd.evaluation.prompts import load_prompts

ROUNDS, REQUESTS = 4, 8


def main() -> None:
    """Serve the same kind of requests in rounds; after each, print what the draft got right."""
    pair = load_pair(str(EMBEDDED_PAIR / "target"), str(EMBEDDED_PAIR / "draft"))
    requests = encode_prompts(pair, load_prompts(None, ROUNDS * REQUESTS), max_new_tokens=64)
    config = hf_osd.OnlineConfig(update_every=REQUESTS)
    with hf_osd.OnlineAssistant(pair.draft, pair.target, config) as assistant:
        judged = accepted = 0
        for start in range(0, len(requests), REQUESTS):
            for inputs in requests[start : start + REQUESTS]:
                output = hf_osd.generate(pair.target, **inputs, online_assistant=assistant, max_new_tokens=64)
            stats = assistant.stats()
            rate = (stats.accepted_tokens - accepted) / max(stats.draft_tokens - judged, 1)  # a cold draft rests
            judged, accepted = stats.draft_tokens, stats.accepted_tokens
            print(f"{stats.requests} requests, {stats.updates} updates: accepted {rate:.0%} of the last judged tokens")
    print("The last answer:", pair.tokenizer.decode(output[0], skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    main()

"""
Acceptance rate and tokens per target pass, as an `evaluate` metric.

`evaluate` copies this file to its cache and imports the copy, so imports from hf_osd are absolute; and it takes the
first metric among the names of the module for the one to load, so none may be imported by name.
"""

import datasets
import evaluate  # type: ignore[import-untyped, unused-ignore]

from hf_osd.errors import InputError
from hf_osd.metrics.rates import expected_speedup, ratio

_DESCRIPTION = """\
Acceptance rate and tokens per target pass of speculative decoding, with confidence intervals over requests, and the
speed-up to expect of them.
"""

_CITATION = """\
@inproceedings{leviathan2023fast,
  title={Fast Inference from Transformers via Speculative Decoding},
  author={Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  booktitle={International Conference on Machine Learning},
  year={2023},
  url={https://arxiv.org/abs/2211.17192}
}
"""

_INPUTS = """
Args:
    accepted (`list[int]`): Draft tokens that the target accepted, one count a request.
    drafted (`list[int]`): Draft tokens that the target judged, one count a request: of each round, those up to and
        including the first wrong one. Later ones follow a wrong token and say nothing about the draft.
    generated (`list[int]`): Tokens generated, one count a request.
    target_passes (`list[int]`): Forward passes of the target, one count a request.
    confidence_level (`float`, defaults to 0.95): Of the intervals, in (0, 1).
    cost_ratio (`float`, *optional*): Time of a pass of the draft over that of one of the target; for the speed-up.
    draft_length (`int`, *optional*): Tokens that the draft proposes in a round; goes with `cost_ratio`.

Returns:
    `dict`:
    - **requests** (`int`): Requests counted.
    - **acceptance_rate** (`float` or `None`): Accepted over drafted tokens; `None` where nothing was drafted.
    - **acceptance_rate_interval** (`list[float]` or `None`): Its confidence interval; `None` for one request.
    - **tokens_per_target_pass** (`float` or `None`): 1.0 is plain decoding.
    - **tokens_per_target_pass_interval** (`list[float]` or `None`): Its confidence interval.
    - **expected_speedup** (`float` or `None`): Only with `cost_ratio`: over plain decoding, by the acceptance rate.

Examples:

    >>> metric = evaluate.load(hf_osd.metrics.path("speculation"))
    >>> results = metric.compute(accepted=[6, 9], drafted=[10, 10], generated=[12, 14], target_passes=[6, 5])
    >>> results["acceptance_rate"]
    0.75
"""

_COUNTS = ("accepted", "drafted", "generated", "target_passes")


class Speculation(evaluate.Metric):  # type: ignore[misc, unused-ignore]
    """Acceptance rate and tokens per target pass of speculative decoding; its inputs are in `inputs_description`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in _COUNTS}),
            reference_urls=["https://arxiv.org/abs/2211.17192", "https://arxiv.org/abs/2310.07177"],
        )

    def _compute(
        self,
        accepted: list[int],
        drafted: list[int],
        generated: list[int],
        target_passes: list[int],
        confidence_level: float = 0.95,
        cost_ratio: float | None = None,
        draft_length: int | None = None,
    ) -> dict[str, int | float | list[float] | None]:
        _check(accepted, drafted, generated, target_passes)
        if (cost_ratio is None) != (draft_length is None):
            raise InputError("expected_speedup needs both cost_ratio and draft_length, got one of them")
        rate, rate_interval = ratio(accepted, drafted, confidence_level, highest=1.0)
        yielded, yielded_interval = ratio(generated, target_passes, confidence_level)
        results = {
            "requests": len(accepted),
            "acceptance_rate": rate,
            "acceptance_rate_interval": rate_interval,
            "tokens_per_target_pass": yielded,
            "tokens_per_target_pass_interval": yielded_interval,
        }
        if cost_ratio is not None and draft_length is not None:
            results["expected_speedup"] = None if rate is None else expected_speedup(rate, draft_length, cost_ratio)
        return results


def _check(accepted: list[int], drafted: list[int], generated: list[int], target_passes: list[int]) -> None:
    for request, row in enumerate(zip(accepted, drafted, generated, target_passes, strict=True)):
        counts = dict(zip(_COUNTS, row, strict=True))
        if any(count is None or count < 0 for count in row):
            raise InputError(f"request {request}: counts must be integers of at least 0, got {counts}")
        if row[0] > row[1]:
            raise InputError(f"request {request}: accepted must not exceed drafted, got {counts}")
        if row[2] and not row[3]:
            raise InputError(f"request {request}: tokens were generated without a pass of the target, got {counts}")

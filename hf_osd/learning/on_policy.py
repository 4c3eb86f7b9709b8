"""On-policy requests: the training copy writes the output, and the target is asked for its distributions."""

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from .._caches import cache_argument, cache_of
from ..config import OnlineConfig
from ..records import Observation, sparse_teacher
from .reading import ObservationCollator, Reader, longest_request, target_logits, vocabulary


class OnPolicySource:
    """
    Draws batches, in some of which the training copy has written the outputs to the recorded prompts.

    On-policy distillation, https://arxiv.org/abs/2306.13649, algorithm 1; the "student" and "mixed" sampling of Online
    Speculative Decoding.

    Args:
        sample (`Callable[[int], list[Observation]]`): Draws recorded requests.
        student (`torch.nn.Module`): The training copy.
        target (`PreTrainedModel`): The live target.
        config (`OnlineConfig`): `lmbda`, `top_k_teacher`, `max_length` and `seed`.
        pause (`Callable[[], object]`, *optional*): Called after each forward pass of the student.
    """

    def __init__(
        self,
        sample: Callable[[int], list[Observation]],
        student: Any,
        target: PreTrainedModel,
        config: OnlineConfig,
        pause: Callable[[], object] = lambda: None,
    ) -> None:
        self._sample, self._student, self._target, self._pause = sample, student, target, pause
        self._lmbda, self._top_k = config.lmbda, config.top_k_teacher
        self._reader = Reader.of(student, vocabulary(target))
        self._length = min(longest_request(model, config.max_length) for model in (student, target))
        self._last_position = longest_request(student, sys.maxsize) - 1
        self._collate = ObservationCollator(self._length, "all")
        self._coin = random.Random(config.seed)
        self._generator = torch.Generator().manual_seed(config.seed)

    def sample(self, size: int) -> list[Observation]:
        """Draw a batch; a share `lmbda` of all batches has the student's outputs."""
        observations = self._sample(size)
        if self._coin.random() >= self._lmbda:
            return observations
        return self._judged(self._written(observations))

    @torch.no_grad()
    def _written(self, observations: list[Observation]) -> list[Observation]:
        """Return the same requests, each with as many tokens as it had, sampled from the student."""
        self._student.eval()  # the trainer turns its dropout on again
        device = next(self._student.parameters()).device
        prompts = self._collate([_with_output(one, one.output_ids[:1]) for one in observations])
        inputs = {name: prompts[name].to(device) for name in ("input_ids", "attention_mask", "position_ids")}
        counts = [min(len(observation.output_ids), self._length) for observation in observations]
        written = self._continue(inputs, max(counts))
        return [
            _with_output(observation, text[:count])
            for observation, text, count in zip(observations, written, counts, strict=True)
        ]

    def _continue(self, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """Sample tokens after left-padded prompts, without the global random state; `(batch, count)`."""
        mask, position, cache = inputs["attention_mask"], inputs["position_ids"], None
        fed, tokens = self._reader.readable(inputs["input_ids"]), []
        for _ in range(count):
            options: dict[str, Any] = {"position_ids": position} if "position_ids" in self._reader.parameters else {}
            options |= cache_argument(self._reader.parameters, cache)
            outputs = self._student(input_ids=fed, attention_mask=mask, use_cache=True, **options)
            probabilities = self._reader.proposable(outputs.logits[:, -1]).float().softmax(dim=-1).cpu()
            fed = torch.multinomial(probabilities, 1, generator=self._generator).to(mask.device)
            # All rows get `count` tokens; those that a row has no room for are cut off by the caller.
            cache, position = cache_of(outputs), (position[:, -1:] + 1).clamp(max=self._last_position)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            tokens.append(fed)
            self._pause()
        return torch.cat(tokens, dim=1).cpu()

    def _judged(self, observations: list[Observation]) -> list[Observation]:
        """Return the same requests with the target's distributions."""
        logits = target_logits(self._target, self._collate(observations)).float()
        ids, log_probs, tail = (tensor.cpu() for tensor in sparse_teacher(logits, self._top_k))
        judged = []
        for row, one in enumerate(observations):
            at = row, slice(-len(one.output_ids), None)  # the output is the end of a padded row
            teacher = {"teacher_ids": ids[at], "teacher_log_probs": log_probs[at], "teacher_tail": tail[at]}
            judged.append(replace(one, **teacher, accepted=one.output_ids == ids[at][:, 0]))
        return judged


def _with_output(observation: Observation, output_ids: torch.Tensor) -> Observation:
    """Return a request with another output, and a teacher that is still to be asked."""
    nobody = torch.zeros(len(output_ids), 1)
    return replace(
        observation,
        output_ids=output_ids,
        teacher_ids=nobody.long(),
        teacher_log_probs=nobody,
        teacher_tail=nobody[:, 0],
        draft_ids=output_ids,
        accepted=nobody[:, 0].bool(),
    )

"""User code in the middle of a request that comes back to the same assistant: right or refused, never a deadlock."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from traffic import llama
from transformers import LogitsProcessorList

import hf_osd
from hf_osd.errors import ClosedError, HfOsdError, LearningError
from hf_osd.serving import weights

TARGET = llama(seed=1, layers=2)


def assistant_of(**settings: Any) -> hf_osd.OnlineAssistant:
    """Updates after every request, and a draft that always proposes: its processors run while its weights are held."""
    chosen = {"update_every": 1, "batch_size": 2, "steps_per_update": 1, "gate": False, **settings}
    return hf_osd.OnlineAssistant(llama(), TARGET, hf_osd.OnlineConfig(draft_length_schedule="constant", **chosen))


def prompt(number: int) -> torch.Tensor:
    return torch.randint(3, 64, (1, 5), generator=torch.Generator().manual_seed(number))


CALL: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def serve(assistant: hf_osd.OnlineAssistant, number: int, **more: Any) -> torch.Tensor:
    x = prompt(number)
    call = {**CALL, "attention_mask": torch.ones_like(x), **more}
    return hf_osd.generate(TARGET, x, online_assistant=assistant, **call)


def plain(number: int) -> torch.Tensor:
    x = prompt(number)
    return TARGET.generate(x, attention_mask=torch.ones_like(x), **CALL)


def within(seconds: float, *functions: Callable[[], Any]) -> list[Any]:
    """Run functions at the same time; fail where one of them does not come back, or raises."""
    found: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(number: int, function: Callable[[], Any]) -> None:
        try:
            found[number] = function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=entry, daemon=True) for entry in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    assert not errors, errors
    return [found[number] for number in range(len(functions))]


class Does:
    """A logits processor that does something else at some of its calls."""

    def __init__(self, work: Callable[[int], Any], times: int = 6) -> None:
        self._work, self._left = work, times
        self.found: list[Any] = []

    def options(self) -> dict[str, Any]:
        """What makes it a part of a request."""
        return {"logits_processor": LogitsProcessorList([self])}  # type: ignore[list-item]

    def _do(self) -> None:
        if self._left:
            self._left -= 1
            try:
                self.found.append(self._work(self._left))
            except HfOsdError as error:
                self.found.append(error)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._do()
        return scores


class Criterion(Does):
    """The same as a stopping criterion."""

    def options(self) -> dict[str, Any]:
        return {"stopping_criteria": [self]}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self._do()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Streamer(Does):
    """The same as a streamer. It gets the prompt before the request has begun."""

    def options(self) -> dict[str, Any]:
        self._prompts = 1
        return {"streamer": self}

    def put(self, value: torch.Tensor) -> None:
        self._prompts -= 1
        if self._prompts < 0:
            self._do()

    def end(self) -> None:
        self._do()


KINDS = (Does, Criterion, Streamer)


@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_inside_a_request(kind: type[Does], background: bool) -> None:
    """Catches a request inside another one that waits for an update, which waits for the other one."""
    assistant = assistant_of(background=background, duty_cycle=1.0)
    inner = kind(lambda number: serve(assistant, number))
    outer, other = within(60.0, lambda: serve(assistant, 20, **inner.options()), lambda: serve(assistant, 21))
    assert torch.equal(outer, plain(20))
    assert torch.equal(other, plain(21))
    assert len(inner.found) == 6
    assert all(torch.equal(found, plain(number)) for number, found in zip(range(5, -1, -1), inner.found, strict=True))
    within(60.0, lambda: serve(assistant, 22))
    within(30.0, assistant.close)
    assert assistant.stats().failed_updates == 0
    assert assistant.stats().updates > 0
    assert len(assistant.journal.requests) == 9 or background


def test_the_outermost_request_waits_for_the_updates_of_all() -> None:
    """Catches an inline update of an inner request that nobody waits for: the next request would come too early."""
    assistant = assistant_of()
    inner = Does(lambda number: serve(assistant, number), times=3)
    within(60.0, lambda: serve(assistant, 20, **inner.options()))
    assert len(assistant.journal.requests) == 4
    assistant.close()


@pytest.mark.parametrize("kind", KINDS)
def test_update_inside_a_request_is_refused(kind: type[Does]) -> None:
    """Catches an update that waits for the request that asked for it, and a refusal that does not say why."""
    assistant = assistant_of()
    within(60.0, lambda: serve(assistant, 0))
    inner = kind(lambda _: assistant.update())
    (outer,) = within(60.0, lambda: serve(assistant, 20, **inner.options()))
    assert torch.equal(outer, plain(20))
    assert all(isinstance(error, LearningError) and "inside a request" in str(error) for error in inner.found)
    assert inner.found
    within(60.0, assistant.update)
    assistant.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates that give up soon, where they wait for a request that holds the draft's weights."""
    monkeypatch.setattr(weights, "_TURNS", (0.1, 0.2))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_statistics_inside_a_request(kind: type[Does], tmp_path: Path) -> None:
    """Catches a save that waits for the learner, which waits for the request that saves."""
    assistant = assistant_of(background=True, duty_cycle=1.0)
    within(60.0, lambda: serve(assistant, 0))

    def work(number: int) -> int:
        assistant.save_pretrained(tmp_path / str(number))
        return assistant.stats().requests

    inner = kind(work, times=2)
    outer, _ = within(60.0, lambda: serve(assistant, 20, **inner.options()), lambda: serve(assistant, 21))
    assert torch.equal(outer, plain(20))
    assert [type(found) for found in inner.found] == [int, int]
    assert (tmp_path / "0" / "config.json").is_file()
    within(30.0, assistant.close)


@pytest.mark.parametrize("kind", KINDS)
def test_close_inside_a_request(kind: type[Does]) -> None:
    """Catches a close that waits for an update that waits for the request which closes; the request still ends."""
    assistant = assistant_of()
    within(60.0, lambda: serve(assistant, 0))
    inner = kind(lambda _: assistant.close(), times=1)
    (outer,) = within(60.0, lambda: serve(assistant, 20, **inner.options()))
    assert torch.equal(outer, plain(20))
    with pytest.raises(ClosedError):
        serve(assistant, 1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("background", [False, True], ids=["inline", "background"])
def test_a_request_in_another_thread_that_a_request_waits_for(background: bool) -> None:
    """Catches a reader that an update keeps out for ever, while the reader that the update waits for waits for it."""
    assistant = assistant_of(background=background, duty_cycle=1.0)
    within(60.0, lambda: serve(assistant, 0))
    inner = Does(lambda number: within(40.0, lambda: serve(assistant, number))[0], times=2)
    outer, _ = within(80.0, lambda: serve(assistant, 20, **inner.options()), lambda: serve(assistant, 21))
    assert torch.equal(outer, plain(20))
    assert [type(found) for found in inner.found] == [torch.Tensor, torch.Tensor]
    within(60.0, assistant.update)
    within(30.0, assistant.close)
    assert assistant.stats().updates > 0

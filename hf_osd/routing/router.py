"""How a request gets its route: the interface of routers, and those that read no embedding."""

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, InputError, MissingDependencyError
from .prompt import Prompt

_LEAST_TEXT = 20  # bytes of text from which on a language can be told; a Chinese character has three

Tensors = dict[str, torch.Tensor]


class Router(ABC):
    """
    Chooses the route of each prompt. A router belongs to one assistant, which calls it from one thread at a time.

    One of your own needs [`choose`] alone; the other methods have defaults.
    """

    @abstractmethod
    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """
        Return the route of a prompt that comes without a key.

        Args:
            prompt (`Prompt`): The prompt.
            routes (`Sequence[str]`): Those that have a draft, the first one first.

        Returns:
            `str`: One of them, or a new name, which gets a draft while there is room.
        """

    def nearest(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Return the route whose draft a new one begins from, and that serves where there is no room for a new one."""
        return routes[0]

    def note(self, route: str, accepted: int, judged: int) -> None:  # noqa: B027 -- optional
        """Note what became of a request: `accepted` of `judged` tokens of the draft were right."""

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Return what [`load_state`] needs: tensors, and whatever JSON holds."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from a saved state; raise `KeyError` if something is missing."""


def route_of(
    router: Router, prompt: Prompt, key: str | None, routes: Sequence[str], most: int
) -> tuple[str, str | None]:
    """
    Return the route of a prompt and, where it is new, the one whose draft it begins from.

    Args:
        router (`Router`): Decides where there is no key.
        prompt (`Prompt`): The prompt.
        key (`str`, *optional*): The route that the caller asks for.
        routes (`Sequence[str]`): Those that there are.
        most (`int`): Routes at most; beyond that, the nearest one serves.

    Raises:
        InputError: The router returns something else.
    """
    name = router.choose(prompt, routes) if key is None else key
    if not isinstance(name, str) or not name:
        raise InputError(f"{type(router).__name__}.choose must return the name of a route, got {name!r}")
    if name in routes:
        return name, None
    nearest = router.nearest(prompt, routes)
    return (name, nearest) if len(routes) < most else (nearest, None)


class ByKey(Router):
    """
    Routes by the key that a call gives, `osd_route="sql"`; prompts without a key go to the default.

    Args:
        default (`str`, *optional*): Defaults to the first route.
    """

    def __init__(self, default: str | None = None) -> None:
        self._default = default

    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Return the default."""
        return self._default or routes[0]


class ByLanguage(Router):
    """
    Routes by the language that a prompt is written in, by [py3langid](https://github.com/adbar/py3langid).

    What at least half of the latest 16 prompts begin with as well, such as a system prompt, is left out where enough
    text follows: it says nothing of the language of this one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        languages (`Sequence[str]`): Codes of ISO 639-1, such as `["en", "de", "zh"]`. They are the routes; that of a
            language without a draft begins from the first draft.

    Raises:
        MissingDependencyError: py3langid is not installed.
        ConfigError: It does not know a language, or there are fewer than two.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, languages: Sequence[str]) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError as error:
            raise MissingDependencyError(
                'routes by language need py3langid: pip install "hf-osd[languages]"'
            ) from error
        self._tokenizer = tokenizer
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
        unknown = sorted(set(languages) - set(self._identifier.nb_classes))
        if unknown or len(set(languages)) < 2:
            raise ConfigError(f"languages must be two or more codes that py3langid knows, got {list(languages)!r}")
        self._identifier.set_languages(list(languages))
        self._latest: deque[torch.Tensor] = deque(maxlen=16)

    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Return the code of the likeliest language."""
        own = self._text(self._own_part(prompt.ids))
        self._latest.append(prompt.ids)
        text = own if len(own.strip().encode()) >= _LEAST_TEXT else self._text(prompt.ids)
        return str(self._identifier.classify(text)[0])

    def _text(self, ids: torch.Tensor) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _own_part(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what follows the beginning that at least half of the latest prompts share; all, if nothing does."""
        shared = sorted(_same_beginning(ids, other) for other in self._latest)
        begin = shared[len(shared) // 2] if shared else 0
        return ids[begin:] if begin < len(ids) else ids


def _same_beginning(one: torch.Tensor, other: torch.Tensor) -> int:
    """Return how many tokens two texts have in common before the first that differs."""
    length = min(len(one), len(other))
    return int((one[:length] == other[:length]).cumprod(0).sum())


class Bandit(Router):
    """
    Finds out which draft does best, whatever the prompt: Thompson sampling on acceptance.

    Each route has a Beta distribution of its acceptance; a request counts as one trial, and old ones fade, since
    drafts learn and traffic changes. Of one draw from each, the highest is taken.

    Args:
        memory (`int`, defaults to 100): Requests of a route after which one counts for a third.
        seed (`int`, defaults to 0): Seed of the draws.

    Raises:
        ConfigError: `memory` is no integer above 0.
    """

    def __init__(self, memory: int = 100, seed: int = 0) -> None:
        if not isinstance(memory, int) or memory < 1:
            raise ConfigError(f"memory must be an integer of at least 1, got {memory!r}")
        self._kept = 1.0 - 1.0 / memory
        self._random = random.Random(seed)
        self._seen: dict[str, tuple[float, float]] = {}  # what was accepted and what was not, in requests

    def choose(self, prompt: Prompt, routes: Sequence[str]) -> str:
        """Draw an acceptance for every route, and return that of the highest."""
        return max(routes, key=self._draw)

    def _draw(self, route: str) -> float:
        right, wrong = self._seen.get(route, (0.0, 0.0))
        return self._random.betavariate(1.0 + right, 1.0 + wrong)

    def note(self, route: str, accepted: int, judged: int) -> None:
        """Count a request for its route."""
        if judged:
            right, wrong = (self._kept * seen for seen in self._seen.get(route, (0.0, 0.0)))
            self._seen[route] = right + accepted / judged, wrong + 1.0 - accepted / judged

    def state(self) -> tuple[Tensors, dict[str, Any]]:
        """Return the trials; see [`Router.state`]."""
        return {}, {"seen": {route: list(seen) for route, seen in self._seen.items()}}

    def load_state(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from saved trials; see [`Router.load_state`]."""
        self._seen = {route: (float(right), float(wrong)) for route, (right, wrong) in numbers["seen"].items()}

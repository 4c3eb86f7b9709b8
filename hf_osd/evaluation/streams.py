"""What is served: named streams of requests, and batches made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, InputError
from .encoding import Inputs, encode_prompts, join
from .models import Pair
from .prompts import Prompt, load_prompts

DEFAULT_STREAM = "docstrings"


@dataclass(frozen=True, slots=True)
class Stream:
    """
    Requests of one kind.

    Attributes:
        name (`str`): What tables and plots call it.
        requests (`list[Inputs]`): What is served one by one.
        warm_up (`Inputs`): One request more, that does not count.
        spare (`list[Inputs]`): More of them, to fill batches with.
    """

    name: str
    requests: list[Inputs]
    warm_up: Inputs
    spare: list[Inputs] = field(default_factory=list)


def load_prompt_streams(sources: Sequence[str], count: int) -> dict[str, list[Prompt]]:
    """
    Return the prompts of every source, by a name for each; docstrings of the standard library if there is none.

    Args:
        sources (`Sequence[str]`): As `hf-osd demo` takes them.
        count (`int`): Prompts of each, at most.

    Raises:
        ConfigError: A source is given twice.
        PromptSourceError: One cannot be read.
    """
    if len(set(sources)) < len(sources):
        raise ConfigError(f"prompts names a source twice, got {', '.join(sources)}")
    if not sources:
        return {DEFAULT_STREAM: load_prompts(None, count)}
    return {name: load_prompts(source, count) for name, source in zip(_names(sources), sources, strict=True)}


def _names(sources: Sequence[str]) -> list[str]:
    """Name each source by its file, in what can be printed; together with the folder where two have one name."""
    sources = [source.encode(errors="backslashreplace").decode() for source in sources]
    names = [Path(source).stem for source in sources]
    if len(set(names)) < len(names):
        names = ["/".join((*path.parts[-2:-1], path.stem)) for path in map(Path, sources)]
    return names if len(set(names)) == len(names) else list(sources)


def make_stream(
    pair: Pair, name: str, prompts: Sequence[Prompt], max_new_tokens: int, count: int | None = None
) -> Stream:
    """
    Encode prompts. The last one that fits warms up: it is no request, since prompt lookup would find its answer.
    For the same reason a prompt that comes again is left out.

    Args:
        pair (`Pair`): The models.
        name (`str`): Of the stream.
        prompts (`Sequence[Prompt]`): At least two different ones that fit.
        max_new_tokens (`int`): Room to leave behind each of them.
        count (`int`, *optional*): Requests to serve one by one; the others are spare. Defaults to all.

    Raises:
        InputError: Fewer than two different prompts fit into the context of the models.
    """
    encoded = encode_prompts(pair, prompts, max_new_tokens)
    *requests, warm_up = {tuple(one["input_ids"].flatten().tolist()): one for one in encoded}.values()
    if not requests:
        raise InputError(f"stream {name!r} has one prompt that fits, and one that warms up is needed beside it")
    count = len(requests) if count is None else count
    return Stream(name, requests[:count], warm_up, requests[count:])


def in_batches(stream: Stream, size: int, pad_token_id: int, *, right: bool = False) -> Stream:
    """
    Return a stream whose requests are batches of one size, padded as [`join`] does; the last of them warms up.

    Raises:
        InputError: The stream's prompts do not fill two batches.
    """
    rows = [*stream.requests, *stream.spare, stream.warm_up]
    *requests, warm_up = batches(rows, size, pad_token_id, right=right)
    if not requests:
        raise InputError(
            f"stream {stream.name!r} has {len(rows)} different prompts that fit, and batches of {size} need {2 * size}"
        )
    return Stream(stream.name, requests[: max(len(stream.requests) // size, 1)], warm_up)


def batches(requests: Sequence[Inputs], size: int, pad_token_id: int, *, right: bool = False) -> list[Inputs]:
    """
    Join requests into batches of one size, padded as [`join`] does, or into one smaller where there are too few.

    No request is repeated, since prompt lookup would find its answer; those that fill no batch are left out.
    """
    size = min(size, len(requests))
    starts = range(0, len(requests) - size + 1, size)
    return [join(requests[start : start + size], pad_token_id, right=right) for start in starts]

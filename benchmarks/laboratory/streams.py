"""In which order requests come. A stream names requests; what was answered to them is in the recordings."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Kinds of which every part is like the rest: only there a final acceptance can be compared with what came before.
STATIONARY = ("alone", "mix")


@dataclass(frozen=True)
class Segment:
    """A part of a stream, from request `start` to before `end`; `label` is its domain, or says what it mixes."""

    label: str
    start: int
    end: int


@dataclass(frozen=True)
class Stream:
    """
    Requests in order.

    Attributes:
        name (`str`): For files and tables.
        kind (`str`): `"alone"`, `"shift"`, `"gradual"`, `"mix"` or `"return"`.
        requests (`tuple[tuple[str, int], ...]`): Domain, and the number of the request in its recording.
        segments (`tuple[Segment, ...]`): Its parts.
    """

    name: str
    kind: str
    requests: tuple[tuple[str, int], ...]
    segments: tuple[Segment, ...]

    def needed(self) -> dict[str, int]:
        """How many requests of each domain have to be recorded."""
        counts: dict[str, int] = {}
        for domain, index in self.requests:
            counts[domain] = max(counts.get(domain, 0), index + 1)
        return counts


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """
    How long streams are, in requests.

    Args:
        alone (`int`): One domain by itself.
        segment (`int`): Each domain of a sudden shift.
        gradual (`int`): All of a gradual shift.
        mix (`int`): All of a mix.
        visit (`int`): Each domain of a return.
        back (`int`): The second visit to the first domain.
    """

    alone: int
    segment: int
    gradual: int
    mix: int
    visit: int
    back: int


PRESETS = {
    "quick": Sizes(alone=120, segment=60, gradual=120, mix=120, visit=60, back=60),
    "full": Sizes(alone=400, segment=500, gradual=800, mix=800, visit=300, back=200),
}


def alone(domain: str, count: int) -> Stream:
    """One domain, in its own order."""
    return Stream(domain, "alone", tuple((domain, i) for i in range(count)), (Segment(domain, 0, count),))


def shift(domains: Sequence[str], count: int) -> Stream:
    """One domain after another, `count` requests each."""
    return _visits(_name("shift", domains), "shift", [(domain, count) for domain in domains])


def returning(domains: Sequence[str], count: int, back: int) -> Stream:
    """One domain after another, `count` requests each, and `back` fresh ones of the first domain in the end."""
    visits = [*((domain, count) for domain in domains), (domains[0], back)]
    return _visits(_name("return", domains), "return", visits)


def gradual(first: str, second: str, count: int, seed: int = 0) -> Stream:
    """From one domain to another: the probability of the second one rises linearly from 0 to 1."""
    draw = random.Random(seed)
    labels = [second if draw.random() < i / max(count - 1, 1) else first for i in range(count)]
    return _drawn(_name("gradual", (first, second)), "gradual", labels)


def mix(domains: Sequence[str], count: int, seed: int = 0) -> Stream:
    """All domains at once: each request is of any of them, with the same probability."""
    draw = random.Random(seed)
    return _drawn(_name("mix", domains), "mix", [draw.choice(list(domains)) for _ in range(count)])


def _visits(name: str, kind: str, visits: Sequence[tuple[str, int]]) -> Stream:
    requests: list[tuple[str, int]] = []
    segments: list[Segment] = []
    used: dict[str, int] = {}
    for domain, count in visits:
        start = used.get(domain, 0)
        segments.append(Segment(domain, len(requests), len(requests) + count))
        requests += [(domain, start + i) for i in range(count)]
        used[domain] = start + count
    return Stream(name, kind, tuple(requests), tuple(segments))


def _drawn(name: str, kind: str, labels: Sequence[str]) -> Stream:
    """Each domain goes through its own requests in order, whenever it is its turn."""
    used: dict[str, int] = {}
    requests = []
    for domain in labels:
        requests.append((domain, used.get(domain, 0)))
        used[domain] = used.get(domain, 0) + 1
    return Stream(name, kind, tuple(requests), (Segment(name, 0, len(labels)),))


def _name(kind: str, domains: Sequence[str]) -> str:
    return f"{kind}-{'-'.join(domains)}"


def make(spec: str, available: Mapping[str, int], sizes: Sizes) -> Stream:
    """
    Make the stream that a word of the command line asks for.

    Args:
        spec (`str`): A domain, or a kind of stream with its domains: `"shift:spider,gsm8k"`. Without domains, all of
            those available (the first two for `"gradual"`).
        available (`Mapping[str, int]`): Prompts by domain.
        sizes (`Sizes`): How long streams are. A domain alone is as long as its prompts last.

    Raises:
        ValueError: The stream or a domain is unknown, or there are too few domains or prompts.
    """
    kind, _, listed = spec.partition(":")
    if kind in available and not listed:
        return alone(kind, min(sizes.alone, available[kind]))
    if kind not in ("shift", "gradual", "mix", "return"):
        raise ValueError(f"no stream {spec!r}: take a domain ({', '.join(available)}), shift, gradual, mix or return")
    domains = listed.split(",") if listed else list(available)[: 2 if kind == "gradual" else None]
    if unknown := [domain for domain in domains if domain not in available]:
        raise ValueError(f"stream {spec!r}: no prompts for {', '.join(unknown)}; there are {', '.join(available)}")
    if len(domains) < 2 or (kind == "gradual" and len(domains) != 2):
        raise ValueError(f"stream {spec!r} needs {'two' if kind == 'gradual' else 'at least two'} domains")
    return _checked(_make(kind, domains, sizes), available)


def _make(kind: str, domains: Sequence[str], sizes: Sizes) -> Stream:
    if kind == "shift":
        return shift(domains, sizes.segment)
    if kind == "gradual":
        return gradual(domains[0], domains[1], sizes.gradual)
    if kind == "mix":
        return mix(domains, sizes.mix)
    return returning(domains, sizes.visit, sizes.back)


def _checked(stream: Stream, available: Mapping[str, int]) -> Stream:
    for domain, count in stream.needed().items():
        if count > available[domain]:
            raise ValueError(
                f"stream {stream.name!r} needs {count} prompts of {domain}, there are {available[domain]}"
            )
    return stream

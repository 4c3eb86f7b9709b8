"""Suite `serving` with what only developers run: the floor of every contender, and other packages beside ours."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from hf_osd.bench import serving
from hf_osd.evaluation.contenders import Contender
from hf_osd.evaluation.streams import Stream

from . import peers
from .session import Session

DRAFT_ALONE = "hf_osd, static draft, no lookup"


def run(session: Session) -> dict[str, Any]:
    """
    Measure every stream.

    Returns:
        `dict[str, Any]`: What [`~hf_osd.bench.serving.run`] returns, with the efficiency of each engine. With peers,
        `peers` has their sweeps, and who was left out and why.
    """
    return {"streams": {one.name: _measure(session, serving.in_rows(session, one)) for one in session.streams}}


def _measure(session: Session, stream: Stream) -> dict[str, Any]:
    if not session.peers:
        return serving.measure(session, stream)
    told: dict[str, Any] = {}

    def guests(stack: ExitStack) -> Sequence[Contender]:
        alone = session.assisted(stack, DRAFT_ALONE, session.static(prompt_lookup=False))  # some peers only draft
        found = peers.open_peers(session.pair, stream.warm_up, session.options, stack, session.eagle3)
        lengths = peers.LENGTHS
        swept = {name: serving.sweep(session, stream, name, make, lengths) for name, make in found.makers.items()}
        told.update(ms_per_token_by_length=swept, left_out=found.left_out)
        return [alone, *(found.makers[name](serving.fastest(times)) for name, times in swept.items())]

    return serving.measure(session, stream, guests) | {"peers": told}

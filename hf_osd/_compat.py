"""The one place that leans on what transformers does not promise, each with the version and the way out."""

import inspect
import sys
from types import FrameType

from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin


def dropped_streamer() -> BaseStreamer | None:
    """
    Find the streamer of the `generate` call that is running a custom decoding callable.

    transformers (5.17 to 5.23) hands the prompt to `streamer`, but drops `streamer` before it calls a callable given
    as `custom_generate` (`_extract_generation_mode_kwargs`), so that nothing would be streamed and nobody told. This
    can go once transformers passes it on.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            streamer = frame.f_locals.get("streamer")
            return streamer if isinstance(streamer, BaseStreamer) or hasattr(streamer, "put") else None
        frame = frame.f_back
    return None

"""`hf-osd verify`: which greedy outputs differ from the target's own, and whether rounding explains it."""

from .runner import verify

__all__ = ["verify"]

"""The command line, `hf-osd`."""

from .app import main

__all__ = ["main"]

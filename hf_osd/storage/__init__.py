"""
A learner's state on disk: observations as Parquet, snapshots as safetensors and JSON, whole or not there.

`store.py` has the layout and the order of writes, `docs/durability.md` the format.
"""

from .directory import StateDirectory
from .snapshots import Snapshot
from .store import read_groups, read_state, write_state

__all__ = ["Snapshot", "StateDirectory", "read_groups", "read_state", "write_state"]

"""Replays recorded answers of a target through learning recipes; `benchmarks/learning.py` is its command."""

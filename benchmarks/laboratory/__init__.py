"""Replays recorded answers of a target through learning recipes; `python -m benchmarks.learning` is its command."""

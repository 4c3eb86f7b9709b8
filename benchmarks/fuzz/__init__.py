"""Requests made at random, for pairs of every kind, served both ways: `python -m benchmarks.fuzz`."""

"""Which model families are served how, tried on small random models: `python -m benchmarks.families`."""

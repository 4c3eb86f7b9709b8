"""
The developers' suites: `hf-osd bench` with a floor and with other packages, the engine, draft lengths, the promise.

`python -m benchmarks.suites` runs them, on any pair, on one that it trains, or on random weights behind a script;
docs/benchmarks.md says what the figures are.
"""

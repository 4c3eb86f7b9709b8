"""What the demo, the benchmark, the verification and the design share: models, prompts, contenders, exactness."""

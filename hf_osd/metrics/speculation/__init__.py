"""The metric of speculative decoding; a folder of its own, as `evaluate` wants it."""

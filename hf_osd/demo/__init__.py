"""The demo: a draft that learns from live requests, measured next to plain, assisted and static decoding."""

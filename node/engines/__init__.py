"""Inference engines: HTTP adapter, discovery, probing, and a demo engine. May import `ports` and `domain`."""

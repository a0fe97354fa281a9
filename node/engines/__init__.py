"""Engines: what a node wraps, how one is recognised, and a stand-in for one. May import `domain` and `ports`."""

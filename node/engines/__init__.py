"""Engines: what the node wraps, and a stand-in for one."""

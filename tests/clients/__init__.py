"""Unmodified clients of others, each in an environment of its own, through the whole market."""

"""Scoring of given texts by unmodified engines: what a referee does in an audit.

One adapter an engine. Used by nodes that sell scoring, and by clients whose own engine is a referee. May import
`tallystick.protocol` only.
"""

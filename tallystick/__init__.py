"""Tallystick: an open market for inference, where a signed order meets a signed receipt."""

__version__ = "0.1.0"

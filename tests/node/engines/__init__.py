"""Tests of the engine adapters and of the stand-in."""

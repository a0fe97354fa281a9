"""Tests with unmodified third-party clients, each in its own environment, through a whole market."""

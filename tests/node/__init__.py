"""Tests of the node, one file a module."""

"""Tests of the node, one file for each module."""

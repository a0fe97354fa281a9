"""Checks of the documentation that Sphinx does not make: names that the code must have, and samples that must run."""

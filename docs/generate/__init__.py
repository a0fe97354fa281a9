"""Generators of the reference pages: each module writes one page, or one page for each process, from the code."""

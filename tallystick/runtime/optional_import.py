"""Imports libraries without an optional dependency of theirs that this program has no use for, and that takes memory and time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_module(name: str) -> Iterator[None]:
    """Within the block, an import of this module fails as if it was not installed, unless it is loaded already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # an import of it then raises ModuleNotFoundError (import system, 5.3.1)
    try:
        yield
    finally:
        sys.modules.pop(name, None)

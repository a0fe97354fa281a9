"""A library that can do without another one is imported without it, and others get it afterwards."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tallystick.runtime.optional_import import without_module


def test_a_module_is_missing_within_the_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the block fails; a module that is loaded stays."""
    (tmp_path / "an_option.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="an_option"), without_module("an_option"):
        importlib.import_module("an_option")
    assert "an_option" not in sys.modules
    loaded = importlib.import_module("an_option")
    with without_module("an_option"):
        assert importlib.import_module("an_option") is loaded
    assert sys.modules.pop("an_option") is loaded

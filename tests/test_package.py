"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tallystick
from tallystick import TallyError


@pytest.mark.parametrize("name", tallystick.__all__)
def test_every_name_is_there(name: str) -> None:
    """Every name that the package lists can be imported from it and is documented."""
    assert getattr(tallystick, name)
    assert name in dir(tallystick)
    assert name == "__version__" or getattr(tallystick, name).__doc__


def _below(error: type[TallyError]) -> list[type[TallyError]]:
    return [error, *(below for child in error.__subclasses__() for below in _below(child))]


def test_errors_say_whose_fault_and_whether_to_retry() -> None:
    """Each class of the tree that callers meet says both in its docstring."""
    tree = [error for error in _below(TallyError) if error.__name__ in tallystick.__all__]
    assert len(tree) == 9
    for error in tree:
        assert error.__doc__
        assert "fault" in error.__doc__, error
        assert "retry" in error.__doc__, error


def test_the_package_is_light() -> None:
    """Importing the package or its protocol loads none of the client; asking for Market does."""
    code = (
        "import sys, tallystick, tallystick.protocol.messages as m; assert not any(n in sys.modules for n in"
        " ('aiohttp', 'sqlalchemy', 'tallystick.client')); from tallystick import Market; assert 'aiohttp' in sys.modules;"
        " assert not hasattr(tallystick, 'Nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

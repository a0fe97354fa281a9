"""Ports for child processes."""

from __future__ import annotations

import subprocess
import sys

from tallystick.cli.local.processes import free_port

ASK = "from tallystick.cli.local.processes import free_port; print(free_port({}), flush=True); input()"


def test_no_port_is_given_twice() -> None:
    """No port is given to two callers, in this or another process, before it is in use; a caller that ends frees its port."""
    first = free_port(0)
    assert free_port(first) != first
    others = [
        subprocess.Popen([sys.executable, "-c", ASK.format(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    given = [int(other.stdout.readline()) for other in others if other.stdout is not None]
    assert len({first, *given}) == 3
    for other in others:
        other.communicate("\n")
    assert free_port(given[0]) == given[0]

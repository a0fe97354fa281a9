"""Which process listens on a port."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from tallystick.runtime.ports import describe_holder

HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=lambda family: family.name)
def test_a_listening_process_is_named(family: socket.AddressFamily) -> None:
    """A port's listener is described by its process id and command, for both versions of IP; a port without one by None."""
    try:
        listener = socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)
    except OSError:
        pytest.skip("no such addresses here")
    with listener:
        port = listener.getsockname()[1]
        assert (describe_holder(port) or "").startswith(f"process {os.getpid()} (")
    assert describe_holder(port) is None


def _table(port: int, state: str = "0A", inode: int = 77) -> str:
    return f"{HEADER}   0: 0100007F:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"


def test_what_the_system_tells(tmp_path: Path) -> None:
    """Only listening sockets count. A process of another user is called that, and control characters are escaped."""
    assert describe_holder(8545, tmp_path) is None, "no such tables"
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "tcp").write_text(_table(8545, state="01"))
    assert describe_holder(8545, tmp_path) is None, "a connection, not a listener"
    (tmp_path / "net" / "tcp").write_text(_table(8545))
    assert describe_holder(8546, tmp_path) is None, "another port"
    assert describe_holder(8545, tmp_path) == "another user's process"
    process = tmp_path / "4242"
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "3").symlink_to("socket:[77]")
    (process / "cmdline").write_bytes(b"/usr/bin/anvil\0--port\0\x1b[2J8545\0")
    assert describe_holder(8545, tmp_path) == "process 4242 (anvil --port \\x1b[2J8545)"

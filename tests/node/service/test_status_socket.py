"""The status socket of a running node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.service.status_socket import NAME, read_status, serve_status
from tallystick.protocol.errors import Code, Unavailable


async def test_the_socket_serves_the_current_status(tmp_path: Path) -> None:
    """Each connection gets the current status; only the owner may use the socket, and it disappears with the node."""
    count = iter(range(100))
    with pytest.raises(Unavailable, match="no node runs") as caught:
        await read_status(tmp_path)
    assert caught.value.code is Code.NOT_RUNNING
    (tmp_path / NAME).write_text("left by a node that was killed")
    async with serve_status(tmp_path, lambda: {"count": next(count)}):
        assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
        assert [await read_status(tmp_path) for _ in range(2)] == [{"count": 0}, {"count": 1}]
        _, silent = await asyncio.open_unix_connection(str(tmp_path / NAME))
        assert (await read_status(tmp_path))["count"] == 3, "one that does not read holds nobody up"
        silent.close()
    assert not (tmp_path / NAME).exists()
    with pytest.raises(Unavailable, match="no node runs"):
        await read_status(tmp_path)


async def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    """If the path is too long, there is no socket, and the node still works."""
    state = tmp_path / ("x" * 100)
    state.mkdir()
    async with serve_status(state, dict):
        assert not (state / NAME).exists()


async def test_a_malformed_status_is_refused(tmp_path: Path) -> None:
    """A body that is not a status report is not shown."""

    async def nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    server = await asyncio.start_unix_server(nonsense, tmp_path / NAME)
    with pytest.raises(Unavailable, match="no node runs"):
        await read_status(tmp_path)
    server.close()

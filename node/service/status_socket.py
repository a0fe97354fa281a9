"""The status socket: a Unix socket in the state folder, readable by its owner. Each connection gets one JSON object."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.wire import dumps, loads

log = structlog.get_logger()
NAME = "node.sock"
TIMEOUT_SECONDS = 5.0
_MAX_PATH_BYTES = 100
"""Systems allow socket paths of a little more."""
_MAX_BYTES = 1 << 20


def _socket_path(state: Path) -> Path:
    return state.absolute() / NAME


@contextlib.asynccontextmanager
async def serve_status(state: Path, report: Callable[[], Mapping[str, Any]]) -> AsyncIterator[None]:
    """Serves `report` on the socket. If the path is too long for a socket, there is none, and a warning is logged."""
    path = _socket_path(state)
    if len(str(path)) > _MAX_PATH_BYTES:
        log.warning("no status socket for `tally node status`: the path of `state` is too long", path=str(path))
        yield
        return
    path.unlink(missing_ok=True)  # left by an earlier process; the state's lock is held

    async def send_report(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(TIMEOUT_SECONDS):
                writer.write(dumps(dict(report())))
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(send_report, path)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def read_status(state: Path) -> dict[str, Any]:
    """Returns the status report of the node that runs on this state. Raises Unavailable if none runs."""
    path = _socket_path(state)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(path))
            body = await reader.read(_MAX_BYTES)
            while more := await reader.read(_MAX_BYTES):
                body += more
            writer.close()
        report = loads(body, "status")
    except (OSError, TimeoutError, BadMessage):
        raise Unavailable(Code.NOT_RUNNING, f"no node runs on {state}; start one with: tally node run") from None
    if not isinstance(report, dict):
        raise BadMessage(f"status: expected an object, got {type(report).__name__}")
    return report

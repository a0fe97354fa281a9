"""A window into a node that works: a socket in its state folder, for who may read that folder. Whoever connects gets one JSON
object and the end of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.wire import dumps, loads

log = structlog.get_logger()
NAME = "node.sock"
SECONDS = 5.0
_MAX_PATH = 100
"""Systems allow socket paths of a little more."""
_MAX_BYTES = 1 << 20


def _place(state: Path) -> Path:
    return state.absolute() / NAME


@contextlib.asynccontextmanager
async def serve_status(state: Path, look: Callable[[], Mapping[str, Any]]) -> AsyncIterator[None]:
    """Keeps the window open. Where the path is too long for a socket there is none, and the log says so."""
    path = _place(state)
    if len(str(path)) > _MAX_PATH:
        log.warning("no window for `tally node status`: the path of `state` is too long", path=str(path))
        yield
        return
    path.unlink(missing_ok=True)  # of a former life; the state's lock is held

    async def show(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(SECONDS):
                writer.write(dumps(dict(look())))
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(show, path)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def read_status(state: Path) -> dict[str, Any]:
    """What a node that works on this state says of itself. Raises Unavailable if none does."""
    path = _place(state)
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(path))
            said = await reader.read(_MAX_BYTES)
            while more := await reader.read(_MAX_BYTES):
                said += more
            writer.close()
        found = loads(said, "status")
    except (OSError, TimeoutError, BadMessage):
        text = f"no node works on {state} now; start one with: tally node run"
        raise Unavailable(Code.PROVIDER_FAILED, text, fault=Fault.PROVIDER) from None
    if not isinstance(found, dict):
        raise BadMessage("status: expected an object")
    return found

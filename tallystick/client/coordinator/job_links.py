"""Opens the link of one client to its coordinator when a job needs it, and again after it was lost.

A coordinator without such a link, or a proxy in between that opens no WebSocket, gets each job by HTTP instead.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog
from websockets.exceptions import WebSocketException

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.job_link import JobLink
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.job_link import (
    LINK_PATH,
    LINK_STREAM,
    MAX_COORDINATOR_MESSAGE,
    MAX_SUBMISSION,
    pack_greeting,
    pack_record,
)
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.wire import Kind
from tallystick.runtime.websocket_client import CheckPeer, open_websocket
from tallystick.version import __version__

log = structlog.get_logger()
SOFTWARE = f"tallystick/{__version__}"
PING_SECONDS = 20.0
CLOSE_SECONDS = 3.0
WITHOUT_LINK_SECONDS = 60.0
"""Seconds for which jobs go by HTTP after a link could not be opened."""
BUSY_SECONDS = 5.0
"""The same, after a coordinator that has no room for a link now."""


async def open_link(
    url: str, config: ClientConfig, open_seconds: float | None = None, check_peer: CheckPeer | None = None
) -> JobLink:
    """Opens a link to the coordinator at this URL, http or https, within `open_seconds` (None: the config's `connect_seconds`).

    `check_peer` is called with the address of the server before anything is sent.
    Raises OSError, TimeoutError or WebSocketException if there is no such link, and the coordinator's refusal.
    """
    seconds = config.connect_seconds if open_seconds is None else open_seconds
    connection = await open_websocket(
        "ws" + url.removeprefix("http") + LINK_PATH,
        max_size=MAX_COORDINATOR_MESSAGE,
        open_seconds=seconds,
        ping_seconds=PING_SECONDS,
        close_seconds=CLOSE_SECONDS,
        user_agent=SOFTWARE,
        use_proxy=uses_proxy(url),
        check_peer=check_peer,
    )
    link = JobLink(connection, config)
    try:
        link.post(pack_record(LINK_STREAM, Kind.HELLO, pack_greeting(SOFTWARE)))
        async with asyncio.timeout(seconds):
            await link.welcomed
    except BaseException:
        connection.transport.abort()
        raise
    return link


class JobLinks:
    """The link of one client to its coordinator, which is opened when a job needs it, and again after it was lost."""

    def __init__(self, url: str, config: ClientConfig, check_peer: CheckPeer | None = None) -> None:
        self._url, self._config, self._check_peer = url, config, check_peer
        self._link: JobLink | None = None
        self._opening: asyncio.Task[JobLink | None] | None = None
        self._without_until = 0.0

    @property
    def in_use(self) -> bool:
        """Whether a job is read on the link."""
        return self._link is not None and bool(self._link.streams)

    @property
    def quiet_since(self) -> float | None:
        """See JobLink; None without a link."""
        return None if self._link is None else self._link.quiet_since

    def abandon(self, reason: str) -> None:
        """See JobLink."""
        if self._link is not None:
            self._link.abandon(reason)

    async def find(self, size: int, open_seconds: float | None = None) -> JobLink | None:
        """The link for a submission of `size` bytes; None if it goes by HTTP. Raises BadMessage for another protocol.

        `open_seconds`: see `open_link`.
        """
        if self._link is not None and self._link.usable and size <= MAX_SUBMISSION:
            return self._link
        if size > MAX_SUBMISSION or asyncio.get_running_loop().time() < self._without_until:
            return None
        if self._opening is None:
            self._opening = asyncio.create_task(self._open(open_seconds), name="open link")
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, task: asyncio.Task[JobLink | None]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._link = task.result()

    async def _open(self, open_seconds: float | None) -> JobLink | None:
        try:
            return await open_link(self._url, self._config, open_seconds, self._check_peer)
        except Unavailable as error:
            self._go_without(error, BUSY_SECONDS)
        except (WebSocketException, TimeoutError, ImportError) as error:  # ImportError: of a SOCKS proxy
            self._go_without(error, WITHOUT_LINK_SECONDS)
        except OSError:
            pass  # nobody answers, as the request by HTTP will say
        return None

    def _go_without(self, error: Exception, seconds: float) -> None:
        """Sends jobs by HTTP for a while."""
        self._without_until = asyncio.get_running_loop().time() + seconds
        log.info("no link to the coordinator; jobs go by HTTP", url=self._url, reason=str(error), retry_seconds=seconds)

    async def close(self) -> None:
        """Closes the link."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._link is not None:
            with contextlib.suppress(OSError, WebSocketException):
                await self._link.close()

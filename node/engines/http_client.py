"""The HTTP client of one engine: its pool of connections, and which client sends a request.

Engines answer on lean connections (`node.engines.http_connection`). aiohttp's client takes over where a proxy stands between, the
address carries credentials, or the engine compresses its answers unasked.
"""

from __future__ import annotations

import asyncio
import functools
import os
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohappyeyeballs
import aiohttp
from yarl import URL

from node.engines.content_decoding import DecodedResponse
from node.engines.engine_connector import ProxiedClient
from node.engines.engine_settings import EngineSettings
from node.engines.http_connection import EngineResponse, HttpConnection
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.version import __version__

_KEEPALIVE_SECONDS = 30.0
_EYEBALLS_SECONDS = 0.25
"""The wait for one address of a host before the next one is tried beside it (RFC 8305)."""
_TARGETS = 64
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]")
_NUMBER = re.compile(r"\[Errno (\d+)\]")
_COMMON_HEADERS = {"accept-encoding": "identity", "user-agent": f"tallystick-node/{__version__}"}


class _Target(NamedTuple):
    """The parts of an address. `server`: its scheme, host and port, whose connections it shares."""

    server: tuple[bool, str, int]
    line: str
    is_direct: bool


class EngineClient:
    """See the module's docstring. Call `close` at the end."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._idle: dict[tuple[bool, str, int], list[HttpConnection]] = {}
        self._connections: set[HttpConnection] = set()
        self._targets: dict[str, _Target] = {}
        self._proxied: ProxiedClient | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._is_closed = self._compresses = False

    async def close(self) -> None:
        """Closes all connections."""
        self._is_closed = True
        if self._sweep is not None:
            self._sweep.cancel()
        self._idle.clear()
        for connection in tuple(self._connections):
            connection.close()
        if self._proxied is not None:
            await self._proxied.close()

    async def send(
        self,
        method: str,
        address: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        on_sent: Callable[[], None] = lambda: None,
    ) -> EngineResponse:
        """Sends a request and returns its response once the head is here. Redirects are not followed.

        `on_sent` is called when the request has left.

        A request that fails on a reused connection is sent again, until a new connection was used: some engines silently close a
        connection after a stream, and a request on such a connection never reached them. Load balancers say so with the status
        408 (RFC 9110, 15.5.9), after which a new connection is used.

        Raises aiohttp.ClientError, OSError and TimeoutError, and Unavailable for a header that cannot be sent.
        """
        headers = {**_COMMON_HEADERS, **headers}
        target = self._target(address)
        if self._compresses or not target.is_direct:
            if self._proxied is None:
                self._proxied = ProxiedClient(self._settings)
            return await self._proxied.send(method, address, headers, body, on_sent)
        head = _head(method, target.line, headers, len(body) if body or method == "POST" else None)
        may_reuse = True
        while True:
            connection = (self._take_idle(target.server) if may_reuse else None) or await self._connect(target.server)
            try:
                response = await connection.send(head, body, on_sent)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if not connection.used:
                    raise
                continue
            if connection.used and response.status == 408 and "close" in response.header("connection").lower():
                response.release()
                may_reuse = False
                continue
            coding = response.header("content-encoding").strip().lower()
            if coding in ("", "identity"):
                return response
            self._compresses = True  # aiohttp decodes the next answers as they come
            return DecodedResponse(response, coding, self._settings.max_answer_bytes)

    def _target(self, address: str) -> _Target:
        target = self._targets.get(address)
        if target is None:
            url = URL(address)
            server = url.scheme == "https", url.raw_host or "", url.port or 0
            is_direct = url.user is None and url.scheme in ("http", "https") and not self._has_proxy(url)
            target = _Target(server, f"{url.raw_path_qs} HTTP/1.1\r\nhost: {url.host_port_subcomponent}", is_direct)
            if len(self._targets) < _TARGETS:
                self._targets[address] = target
        return target

    def _has_proxy(self, url: URL) -> bool:
        """Whether a proxy of the environment stands between."""
        return self._settings.trust_env and url.scheme in getproxies() and not proxy_bypass(url.host or "")

    # Connections

    def _take_idle(self, server: tuple[bool, str, int]) -> HttpConnection | None:
        idle = self._idle.get(server)
        oldest = asyncio.get_running_loop().time() - _KEEPALIVE_SECONDS
        while idle:
            connection = idle.pop()
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def _connect(self, server: tuple[bool, str, int]) -> HttpConnection:
        """Opens a connection. Raises OSError and TimeoutError."""
        is_encrypted, host, port = server
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._settings.connect_seconds):
            context = await asyncio.to_thread(_tls_context) if is_encrypted else None
            addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            try:
                sock = await aiohappyeyeballs.start_connection(addresses, happy_eyeballs_delay=_EYEBALLS_SECONDS, loop=loop)
            except OSError as error:
                raise _first_cause(error) from None
            connection = HttpConnection(functools.partial(self._freed, server), self._lost)
            try:
                await loop.create_connection(
                    lambda: connection, sock=sock, ssl=context, server_hostname=host if is_encrypted else None
                )
            except BaseException:
                connection.close()  # its transport owns the socket: closed here, its number would be another connection's
                raise
        self._connections.add(connection)
        if self._is_closed:  # while it was being opened
            connection.close()
        return connection

    def _freed(self, server: tuple[bool, str, int], connection: HttpConnection) -> None:
        if self._is_closed:
            connection.close()
            return
        self._idle.setdefault(server, []).append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(_KEEPALIVE_SECONDS, self._close_stale)

    def _lost(self, connection: HttpConnection) -> None:
        self._connections.discard(connection)
        for idle in self._idle.values():
            if connection in idle:
                idle.remove(connection)

    def _close_stale(self) -> None:
        """Closes connections that were idle for long, and looks again later while there are others."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - _KEEPALIVE_SECONDS
        for idle in self._idle.values():
            for connection in [connection for connection in idle if connection.idle_since <= oldest]:
                idle.remove(connection)
                connection.close()
        self._sweep = loop.call_later(_KEEPALIVE_SECONDS, self._close_stale) if any(self._idle.values()) else None


def _first_cause(error: OSError) -> OSError:
    """The error of one address, if several addresses failed, whose errors aiohappyeyeballs joins to one without a number."""
    number = _NUMBER.search(str(error)) if error.errno is None else None
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))


@functools.cache
def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _head(method: str, line: str, headers: Mapping[str, str], length: int | None) -> bytes:
    """The head of a request. Raises Unavailable for a value that would break it (RFC 9110, 5.5)."""
    lines = [f"{method} {line}"]
    for name, value in headers.items():
        if _FORBIDDEN.search(value):
            text = f"the engine's header {name}: expected one line of text, got control characters; check the API key"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.PROVIDER)
        lines.append(f"{name}: {value}")
    if length is not None:
        lines.append(f"content-length: {length}")
    return "\r\n".join([*lines, "\r\n"]).encode("utf-8", "surrogateescape")

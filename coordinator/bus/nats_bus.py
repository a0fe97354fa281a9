"""The bus between replicas: small messages by topic over NATS, at most once, for what may be lost.

Nothing waits for it. A message that finds no connection, or too many before it, is counted and dropped, and so is one that
arrives faster than it is handled. The connection is tried again for ever; the process starts and goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import structlog

from coordinator.bus.nats_address import describe_nats

log = structlog.get_logger()
MAX_MESSAGE = 1_024
"""Bytes of one message."""
OUTBOX = 4_096
"""Messages that wait to be sent; one more is dropped."""
INBOX = 4_096
"""Messages that wait to be handled; one more is dropped."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 0.1, 2.0
CONNECT_SECONDS = 5.0
CLOSE_SECONDS = 0.5
"""How long a failed connection may take to close before the next attempt."""
PING_SECONDS, MAX_PINGS = 5, 2
"""A server that answers no ping for this long, twice, counts as gone."""

Receiver = Callable[[str, bytes], None]
"""Takes a topic and a message. Must not block; it may not raise."""


class Connection(Protocol):
    """One connection to a NATS server, which ends when the server or the network does."""

    async def publish(self, subject: str, payload: bytes) -> None:
        """Sends a message. Raises any error if the connection is gone."""

    async def ping(self) -> None:
        """Waits for the server's answer. Raises any error without one."""

    async def closed(self) -> None:
        """Waits for the end of the connection."""

    async def close(self) -> None:
        """Ends the connection."""


class Dial(Protocol):
    """Opens a connection that is subscribed to a subject. May raise any error."""

    async def __call__(self, servers: tuple[str, ...], subject: str, receive: Receiver) -> Connection:
        """`receive` gets the subject and payload of each message."""
        ...


class NatsBus:
    """Publishes and receives below one prefix, such as `tallystick.0xabc...`. Call `run` in the background."""

    def __init__(self, servers: tuple[str, ...], prefix: str, *, dial: Dial | None = None) -> None:
        self._servers, self._prefix, self._dial = servers, prefix, dial or dial_nats
        self._outbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(OUTBOX)
        self._dropped: Counter[str] = Counter()
        self._closing: set[asyncio.Future[None]] = set()
        """Connections that came too late; a reference keeps each from being collected before it is closed."""
        self._connection: Connection | None = None
        self.on_message: Receiver = lambda *_: None
        """Called with the topic and payload of each message of another replica."""
        self.on_connected: Callable[[], None] = lambda: None
        """Called after each connection, since messages may have been lost before it."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._connection is not None

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of messages that were dropped, by reason: `disconnected`, `full`, `too_long`."""
        return MappingProxyType(self._dropped)

    def publish(self, topic: str, payload: bytes) -> None:
        """Sends a message to the other replicas soon, or drops it."""
        if len(payload) > MAX_MESSAGE:
            self._dropped["too_long"] += 1
        elif self._connection is None:
            self._dropped["disconnected"] += 1
        else:
            try:
                self._outbox.put_nowait((f"{self._prefix}.{topic}", payload))
            except asyncio.QueueFull:
                self._dropped["full"] += 1

    async def run(self) -> None:
        """Connects, and connects again, until cancelled."""
        delay, warned = FIRST_RETRY_SECONDS, False
        while True:
            try:
                await self._serve()
            except Exception as error:  # noqa: BLE001 - the client and its transports raise errors of many kinds
                reason = f"{type(error).__name__}: {error}"[:200]
            else:
                reason = "the connection was lost"
            if self._connection is not None:
                delay, warned = FIRST_RETRY_SECONDS, False
            self._disconnect()
            if not warned:
                warned = True
                log.warning(
                    "NATS is away: cancels and tab totals do not reach other replicas until it is back; jobs go on",
                    server=describe_nats(self._servers),
                    reason=_without_credentials(reason, self._servers),
                )
            await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - spreads the replicas' attempts
            delay = min(2 * delay, LAST_RETRY_SECONDS)

    def _disconnect(self) -> None:
        self._connection = None
        while not self._outbox.empty():
            self._outbox.get_nowait()
            self._dropped["disconnected"] += 1

    async def _serve(self) -> None:
        """Serves one connection. Returns, or raises any error, when it has ended."""
        connection = await self._connect()
        sender = asyncio.create_task(self._send(connection), name="NATS sender")
        closed = asyncio.create_task(connection.closed(), name="NATS connection")
        try:
            self._connection = connection
            log.info("connected to NATS", server=describe_nats(self._servers))
            self.on_connected()
            await asyncio.wait({sender, closed}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            sender.cancel()
            closed.cancel()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CONNECT_SECONDS):
                    await connection.close()

    async def _connect(self) -> Connection:
        """Dials in a task of its own: NATS's client can swallow the cancellation of a deadline, or of the process's end."""
        dialling = asyncio.ensure_future(self._dial(self._servers, f"{self._prefix}.*", self._receive))
        try:
            done, _ = await asyncio.wait({dialling}, timeout=CONNECT_SECONDS)
        finally:
            if not dialling.done():
                dialling.cancel()
                dialling.add_done_callback(self._close_late)
        if not done:
            raise TimeoutError(f"no connection within {CONNECT_SECONDS:g} s")
        return dialling.result()

    def _close_late(self, dialling: asyncio.Future[Connection]) -> None:
        """Closes a connection that nobody waits for any more."""
        if not dialling.cancelled() and dialling.exception() is None:
            closing = asyncio.ensure_future(dialling.result().close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def round_trip(self) -> float | None:
        """The seconds until the server's answer to a ping; None without a connection or an answer."""
        connection, began = self._connection, time.monotonic()
        if connection is None:
            return None
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await connection.ping()
        except Exception:  # noqa: BLE001 - whatever it is, the connection is closed and opened again for it
            return None
        return time.monotonic() - began

    async def _send(self, connection: Connection) -> None:
        while True:
            await connection.publish(*await self._outbox.get())

    def _receive(self, subject: str, payload: bytes) -> None:
        topic = subject.removeprefix(f"{self._prefix}.")
        if len(payload) > MAX_MESSAGE:
            self._dropped["too_long"] += 1
        elif topic != subject:
            self.on_message(topic, payload)


def _without_credentials(reason: str, servers: tuple[str, ...]) -> str:
    for server in servers:
        credentials = server.rpartition("@")[0].partition("//")[2]
        for secret in (credentials, *credentials.split(":"), *map(unquote, credentials.split(":"))):
            reason = reason.replace(secret, "...") if secret else reason
    return reason


class _NatsConnection:
    """A connection of nats-py without its reconnection, which gives up on servers that refused it twice."""

    def __init__(self, client: Any, closed: asyncio.Event) -> None:
        self._client, self._closed = client, closed

    async def publish(self, subject: str, payload: bytes) -> None:
        """See Connection."""
        await self._client.publish(subject, payload)

    async def ping(self) -> None:
        """See Connection."""
        await asyncio.create_task(self._client.flush(int(CONNECT_SECONDS)), name="NATS ping")  # its wait_for swallows a cancel

    async def closed(self) -> None:
        """See Connection."""
        await self._closed.wait()

    async def close(self) -> None:
        """See Connection."""
        await self._client.close()


async def dial_nats(servers: tuple[str, ...], subject: str, receive: Receiver) -> Connection:
    """Connects to one of the servers. The server knows the subscription when this returns. Raises any error."""
    failures = []
    for server in random.sample(servers, len(servers)):
        try:
            return await _dial_server(server, subject, receive)
        except Exception as error:  # noqa: BLE001 - the client and its transports raise errors of many kinds
            failures.append(f"{describe_nats((server,))}: {str(error) or type(error).__name__}")
    raise ConnectionError("; ".join(failures))


async def _dial_server(server: str, subject: str, receive: Receiver) -> Connection:
    from nats.aio.client import Client  # noqa: PLC0415 - 80 ms and its memory, for replicas only

    parts, closed, connecting = urlsplit(server), asyncio.Event(), True
    user, password = (None if text is None else unquote(text) for text in (parts.username, parts.password))

    class CheckedClient(Client):
        """nats-py's client speaks plain text with a server that does not demand TLS, whatever the address says."""

        def _connect_command(self) -> bytes:
            if parts.scheme == "tls" and not self._server_info.get("tls_required"):
                raise ConnectionError("the server does not require TLS, so no password is sent; set `tls` in its config")
            return bytes(super()._connect_command())

    async def on_closed() -> None:
        closed.set()

    async def on_error(error: Exception) -> None:
        if connecting:  # else nats-py waits a second, tries again, and no longer says why
            raise error
        log.debug("NATS client", reason=_without_credentials(str(error), (server,)))

    async def on_message(message: Any) -> None:
        receive(message.subject, message.data)

    client = CheckedClient()
    try:
        await client.connect(
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}",
            user=user if password is not None else None,
            password=password,
            token=user if password is None else None,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=1,
            connect_timeout=2,
            ping_interval=PING_SECONDS,
            max_outstanding_pings=MAX_PINGS,
            no_echo=True,
            pending_size=OUTBOX * MAX_MESSAGE,
            closed_cb=on_closed,
            error_cb=on_error,
        )
        connecting = False
        await client.subscribe(subject, cb=on_message, pending_msgs_limit=INBOX, pending_bytes_limit=INBOX * MAX_MESSAGE)
        for _ in range(2):  # nats-py writes the first ping before the subscription, so only the second answer comes after it
            await client.flush(int(CONNECT_SECONDS))
    except BaseException:
        closing = asyncio.create_task(client.close(), name="NATS close")  # it waits for a TLS handshake that failed
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        closing.cancel()
        closing.add_done_callback(_ignore)
        raise
    return _NatsConnection(client, closed)


def _ignore(closing: asyncio.Task[None]) -> None:
    """Marks the error of a connection that failed to close as seen."""
    if not closing.cancelled():
        closing.exception()

"""The hub: one WebSocket a node, opened by the node. It proves who a node is, passes its frames on, and frames to it.

Raw ASGI, since every streamed token passes here. A node may send only for jobs that it has; one that breaks the rules is told
why and closed. A store that does not answer closes nobody: what was not acknowledged comes again. What nodes may cost is in
coordinator/domain/resource_bounds.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterator
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.domain.endpoints import check_endpoint
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.peer_errors import error_for_peers
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import (
    CHANGES_BURST,
    CHANGES_PER_SECOND,
    LOOKUP_UNITS,
    MAX_HELLO,
    MAX_LINK_FRAME,
    OUTBOX_BYTES,
    OUTBOX_FRAMES,
    SMALL_FRAME_BYTES,
)
from coordinator.domain.token_bucket import TokenBucket
from coordinator.http.watchdog import Watchdog
from coordinator.jobs.live_job import InboxOverrun
from coordinator.jobs.market import Market
from coordinator.ports import Bus, TabStore, node_subject
from tallystick.protocol.errors import (
    BadMessage,
    BadReceipt,
    BadSignature,
    Code,
    Fault,
    PeerError,
    Refusal,
    TallyError,
    Unavailable,
)
from tallystick.protocol.link import Capacity, Challenge, ClaimRequest, Hello, LateReceipt, read_asks
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import Kind, dumps, loads, pack_link, unpack_link
from tallystick.runtime.connection_limiter import address_key
from tallystick.runtime.websocket import FRAME_LIMIT_EXTENSION

log = structlog.get_logger()
_OF_RUNNING = frozenset({Kind.CHUNK, Kind.ACCEPT, Kind.FAIL, Kind.RECEIPT})
_LOOKED_UP = frozenset({Kind.RECEIPT, Kind.LATE_RECEIPT, Kind.RECALL})
RECALL_PAGE = 200
HELLO_SECONDS = 10
CLOSE_SECONDS = 5
SILENCE_SECONDS = 45
"""A node that says nothing for this long is gone; it beats every few seconds."""

AcceptClaim = Callable[[Address, ClaimRequest], Awaitable[None]]


class LinkClosed(Exception):
    """The node's connection ended."""


class NodeHub:
    """All node connections of this replica."""

    def __init__(
        self,
        market: Market,
        bus: Bus,
        tabs: TabStore,
        accept_claim: AcceptClaim,
        max_nodes: int = 10_000,
        *,
        per_address: int = 64,
        rate_limiter: RateLimiter | None = None,
        endpoints: Collection[str] = (),
    ) -> None:
        """`per_address`: links of one address, also before their HELLO. `endpoints`: the public hosts and ports of this
        coordinator; a connection over loopback may have dialled that.
        """
        self._market, self._bus, self._tabs, self._accept_claim, self._max = market, bus, tabs, accept_claim, max_nodes
        self._per_address, self._endpoints = per_address, frozenset(endpoints)
        self._links: dict[Address, _Link] = {}
        self._at: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()
        self._rate_limiter = rate_limiter or RateLimiter(IntakeLimits(), time.monotonic)
        self._changes = TokenBucket(CHANGES_PER_SECOND, CHANGES_BURST)
        self._farewells: set[asyncio.Task[None]] = set()
        self._stopping = False

    @property
    def connected(self) -> int:
        """How many nodes are connected."""
        return len(self._links)

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent to nodes."""
        return self._queued.total()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, from its handshake to its end (ASGI websocket)."""
        await receive()
        set_limit = (scope.get("extensions") or {}).get(FRAME_LIMIT_EXTENSION, int)
        set_limit(MAX_HELLO)
        await send({"type": "websocket.accept"})
        address = (scope.get("client") or ("",))[0]
        link = _Link(receive, send, address, self._queued)
        try:
            with self._counted(address):
                self._rate_limiter.check_address(address)
                self._check_room()
                with contextlib.closing(Watchdog(HELLO_SECONDS)) as watchdog:
                    provider, hello = await self._greet(link, scope, watchdog)
                set_limit(MAX_LINK_FRAME)
                with contextlib.closing(Watchdog(SILENCE_SECONDS)) as watchdog:
                    await self._attend(link, provider, hello, watchdog)
        except LinkClosed:
            pass
        except InboxOverrun as error:
            await link.refuse(BadMessage(str(error), fault=Fault.PROVIDER))
        except TallyError as error:
            self._rate_limiter.count_refusal(address, error)
            log.info("node refused", error=str(error), address=address)
            await link.refuse(error)
        finally:
            link.forget()

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """Counts a link of an address. Raises Unavailable where it has as many as it may."""
        key = address_key(address)
        if self._at[key] >= self._per_address:
            text = f"{address} has {self._per_address} node links, which is all that one address may have here"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)
        self._at[key] += 1
        try:
            yield
        finally:
            self._at -= Counter((key,))

    def _check_room(self, provider: Address | None = None) -> None:
        """Raises Unavailable where no more nodes are taken; one that comes back on a new connection always is."""
        full = provider is not None and provider not in self._links and len(self._links) >= self._max
        if self._stopping or full:
            why = "has as many nodes as it takes" if full else "is stopping"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"this coordinator {why}", fault=Fault.COORDINATOR)

    async def close(self) -> None:
        """Closes all links, and takes no new ones; the nodes will come back to the next process."""
        self._stopping = True
        for link in list(self._links.values()):
            self._dismiss(link.close())
        await asyncio.gather(*self._farewells)

    def _dismiss(self, farewell: Coroutine[Any, Any, None]) -> None:
        """Takes leave of a node without waiting for it."""
        task = asyncio.create_task(farewell, name="farewell")
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

    async def _greet(self, link: _Link, scope: Scope, watchdog: Watchdog) -> tuple[Address, Hello]:
        market = self._market
        challenge = Hash(secrets.token_bytes(32))
        offer = Challenge(challenge, market.address, market.domain.chain_id, market.domain.contract)
        await link.send_now(pack_link(Kind.CHALLENGE, payload=dumps(offer.to_json())))
        kind, _, payload = unpack_link(await link.receive(watchdog))
        if kind is not Kind.HELLO:
            raise BadMessage(f"link: expected HELLO, got {kind.name}")
        hello = Hello.from_json(loads(payload, "hello"))
        self._rate_limiter.count_asks(link.address, len(hello.asks))
        connect = hello.connect.verify(market.domain)
        if connect.message.challenge != challenge or connect.message.coordinator != market.address:
            raise BadSignature("hello.connect: an answer to another challenge")
        check_endpoint(connect.message.endpoint, self._endpoints, scope.get("server"))
        return connect.message.provider, hello

    async def _attend(self, link: _Link, provider: Address, hello: Hello, watchdog: Watchdog) -> None:
        self._check_room(provider)
        former = self._links.get(provider)
        self._links[provider] = link
        subject = node_subject(provider)

        def enqueue(frame: bytes) -> None:
            if not link.enqueue(frame):
                self._tell_busy(provider, frame)

        self._bus.attach(subject, enqueue)
        writer = asyncio.create_task(link.write(), name=f"to {provider}")
        try:
            if former is not None:
                self._market.node_gone(provider)
                self._dismiss(former.refuse(Refusal(Code.NODE_GONE, "another connection of this provider took its place")))
            self._market.matchmaker.replace_asks(provider, hello.asks, hello.capacity)
            link.enqueue(pack_link(Kind.WELCOME, payload=b"{}"))
            log.info("node connected", provider=provider, asks=len(hello.asks), software=hello.software)
            while True:
                frame = await link.receive(watchdog)
                if self._links.get(provider) is not link:  # it was replaced, and speaks for nobody any more
                    raise LinkClosed
                await self._take(link, provider, frame)
        finally:
            writer.cancel()
            self._bus.detach(subject, enqueue)
            if self._links.get(provider) is link:
                del self._links[provider]
                self._market.node_gone(provider)
                log.info("node gone", provider=provider)

    def _tell_busy(self, provider: Address, frame: bytes) -> None:
        """A job that does not fit into what waits for its node goes to the next one, and nobody is blamed."""
        _, job, _ = unpack_link(frame)
        if subject := self._market.subject_of(job, provider):
            text = f"too much waits to be sent to provider {provider} and its neighbours"
            error = Unavailable(Code.NODE_BUSY, text, fault=Fault.PROVIDER)
            self._bus.send(subject, pack_link(Kind.FAIL, job, dumps(error.as_json())))

    async def _take(self, link: _Link, provider: Address, frame: bytes) -> None:
        kind, job, payload = unpack_link(frame)
        if kind in _OF_RUNNING:
            subject = self._market.subject_of(job, provider)
            if subject and (self._bus.send(subject, frame) or kind is not Kind.RECEIPT):
                return
        await self._pace(link, frame, LOOKUP_UNITS if kind in _LOOKED_UP else 0)
        if kind is Kind.RECEIPT:
            await self._take_receipt(provider, job, payload)
        elif kind is Kind.LATE_RECEIPT:
            await self._take_late_receipt(provider, job, payload)
        elif kind is Kind.BEAT:
            self._market.matchmaker.set_capacity(provider, Capacity.from_json(loads(payload, "capacity")))
        elif kind is Kind.ASKS:
            self._check_pace(provider)
            raw = loads(payload, "asks")
            asks = read_asks(raw.get("asks") if isinstance(raw, dict) else None)
            self._rate_limiter.count_asks(link.address, len(asks))
            self._market.matchmaker.replace_asks(provider, asks)
        elif kind is Kind.RECALL:
            self._check_pace(provider)
            await self._recall(provider, loads(payload, "recall"))
        elif kind is Kind.CLAIM:
            await self._forward_claim(provider, ClaimRequest.from_json(loads(payload, "claim")))
        elif kind not in _OF_RUNNING:
            raise BadMessage(f"link: a node never sends {kind.name}")

    async def _pace(self, link: _Link, frame: bytes, units: float) -> None:
        """Counts a frame that no running job asked for; where its address sends too many, its links are read slowly."""
        wait = self._rate_limiter.count_frame(link.address, units + 1 + len(frame) // 1024)
        if wait:
            await asyncio.sleep(wait)

    async def _recall(self, provider: Address, raw: Any) -> None:
        """Tells a node that lost its state, or has none yet, what it signed here last."""
        after = raw.get("after") if isinstance(raw, dict) else None
        if not isinstance(after, str) or len(after) > 42:
            raise BadMessage("recall.after: expected an address, or an empty text")
        try:
            found = await self._tabs.last_receipts(provider, after, RECALL_PAGE)
        except Unavailable as error:
            log.warning("tabs not told", provider=provider, error=str(error))
            return
        told = {"receipts": [late.to_json() for late in found], "more": len(found) == RECALL_PAGE}
        self._bus.send(node_subject(provider), pack_link(Kind.RECALLED, payload=dumps(told)))

    def _check_pace(self, provider: Address) -> None:
        """A node may change its asks as often as its engines come and go, not as often as it can."""
        if not self._changes.try_spend(provider, time.monotonic()):
            raise Unavailable(
                Code.RATE_LIMITED, f"link: asks more often than {CHANGES_PER_SECOND} times a second", fault=Fault.PROVIDER
            )

    async def _take_receipt(self, provider: Address, job: JobId, payload: bytes) -> None:
        """A receipt of no live job. What is not answered here its node sends again, with what it is for."""
        try:
            await self._market.accept_receipt(provider, job, payload)
        except BadReceipt as error:
            self._refuse(provider, job, error)
        except Unavailable as error:
            log.warning("late receipt not stored", provider=provider, job=job.hex(), error=str(error))

    async def _take_late_receipt(self, provider: Address, job: JobId, payload: bytes) -> None:
        try:
            late = LateReceipt.from_json(loads(payload, "late receipt"))
            subject = self._market.subject_of(job, provider)
            if subject and self._bus.send(subject, pack_link(Kind.RECEIPT, job, dumps(late.receipt.to_json()))):
                return
            await self._market.accept_late(provider, job, late)
        except (PeerError, Refusal) as error:
            self._refuse(provider, job, error)
        except Unavailable as error:
            log.warning("late receipt not stored", provider=provider, job=job.hex(), error=str(error))

    def _refuse(self, provider: Address, job: JobId, error: TallyError) -> None:
        """Tells a node that its receipt will never be taken, so that it stops sending it."""
        log.warning("receipt refused", provider=provider, job=job.hex(), error=str(error))
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_REFUSED, job, dumps(error.as_json())))

    async def _forward_claim(self, provider: Address, request: ClaimRequest) -> None:
        try:
            await self._accept_claim(provider, request)
        except Unavailable as error:
            log.warning("claim not stored", provider=provider, error=str(error))


class _Link:
    """One node's connection: what is sent waits in a bounded queue, so that nobody waits for a slow node."""

    def __init__(self, receive: Receive, send: Send, address: str, queued: Counter[str]) -> None:
        """`queued`: the bytes that wait, by address; this link counts its own there."""
        self.address = address
        self._receive, self._send = receive, send
        self._key, self._queued, self._waiting = address_key(address), queued, 0
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(OUTBOX_FRAMES)
        self._closed = self._overflowed = False
        self._watchdog: Watchdog | None = None

    def enqueue(self, frame: bytes) -> bool:
        """Queues a frame. A node that lets its queue fill up is closed, and its jobs fail over. False for a job that would make
        more bytes wait for this address than may; it is not queued. What is short is let through: else jobs that fill the queue
        to the brim, or a neighbour that does not read, would close the link of a node that works.
        """
        if self._waiting and len(frame) > SMALL_FRAME_BYTES and self._queued[self._key] + len(frame) > OUTBOX_BYTES:
            if frame[0] == Kind.DISPATCH:
                return False
            self._overflow()
        elif self._outbox.full():
            self._overflow()
        else:
            self._outbox.put_nowait(frame)
            self._count(len(frame))
        return True

    def _overflow(self) -> None:
        self._overflowed = True
        if self._watchdog is not None:
            self._watchdog.trip()

    def _count(self, size: int) -> None:
        self._waiting += size
        self._queued[self._key] += size
        if not self._queued[self._key]:
            del self._queued[self._key]

    def forget(self) -> None:
        """The link is over: nothing waits for it any more."""
        self._outbox = asyncio.Queue(OUTBOX_FRAMES)
        self._count(-self._waiting)

    async def write(self) -> None:
        """Sends what is queued until cancelled."""
        while not self._closed:
            frame = await self._outbox.get()
            await self.send_now(frame)
            self._count(-min(len(frame), self._waiting))

    async def send_now(self, frame: bytes) -> None:
        """Sends a frame past the queue. A lost connection shows on the receiving side."""
        try:
            await self._send({"type": "websocket.send", "bytes": frame})
        except (OSError, RuntimeError):
            self._closed = True

    async def receive(self, watchdog: Watchdog) -> bytes:
        """The next frame. Raises LinkClosed, BadMessage for text, Refusal for a node that is silent or does not read."""
        self._watchdog = watchdog
        event: Any = None
        if not self._overflowed:
            with contextlib.suppress(TimeoutError):
                event = await watchdog.wait(self._receive())
        if event is None:
            text = "what is sent to it is not read" if self._overflowed else "silent for too long"
            raise Refusal(Code.NODE_GONE, f"link: {text}", fault=Fault.PROVIDER)
        if event["type"] == "websocket.disconnect":
            self._closed = True
            raise LinkClosed
        frame = event.get("bytes")
        if frame is None:
            raise BadMessage("link: expected binary frames")
        return bytes(frame)

    async def refuse(self, error: TallyError) -> None:
        """Says why, and closes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                if not self._closed:
                    await self.send_now(pack_link(Kind.ERROR, payload=dumps(error_for_peers(error).as_json())))
                await self.close()

    async def close(self) -> None:
        """Closes the connection, as far as the node lets it."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(TimeoutError, OSError, RuntimeError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._send({"type": "websocket.close", "code": 1000})

"""The node hub: one WebSocket per node, opened by the node. It authenticates nodes and passes frames to and from them.

Raw ASGI, since every streamed token passes here. A node may send frames only for jobs that it has. A node that breaks the rules
gets the error and is disconnected. A store that does not answer disconnects nobody: the node sends again what was not
acknowledged. coordinator/domain/resource_bounds.py lists what nodes may cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from functools import partial
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.domain.endpoints import check_endpoint
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import (
    BEAT_ASKS,
    CHANGES_BURST,
    CHANGES_PER_SECOND,
    LOOKUP_UNITS,
    MAX_HELLO,
    MAX_LINK_FRAME,
)
from coordinator.http.node_link import LinkClosed, NodeLink, queue_all
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
    rate_limited,
)
from tallystick.protocol.link import Beat, Challenge, ClaimRequest, Hello, LateReceipt, Listing
from tallystick.protocol.replicas import MAX_REPLICAS
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import Failure, Kind, dumps, loads, pack_link, unpack_link
from tallystick.runtime.connection_limiter import address_key
from tallystick.runtime.token_bucket import TokenBucket
from tallystick.runtime.websocket import FILTER_EXTENSION, FRAME_LIMIT_EXTENSION, WRITE_EXTENSION

log = structlog.get_logger()
_FOR_RUNNING_JOBS = frozenset({Kind.CHUNK, Kind.ACCEPT, Kind.FAIL, Kind.RECEIPT})
"""A frame of these kinds may be late, when its job has ended."""
_NEED_LOOKUP = frozenset({Kind.RECEIPT, Kind.FAIL, Kind.LATE_RECEIPT, Kind.RECALL})
RECALL_PAGE = 200
"""Receipts in one answer to a node that recovers its state."""
HELLO_SECONDS = 10
SILENCE_SECONDS = 45
"""A node that sends nothing for this long counts as gone; an idle node sends a BEAT every few seconds."""

AcceptClaim = Callable[[Address, ClaimRequest], Awaitable[None]]


class NodeHub:
    """All node connections of this process."""

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
        """`per_address`: maximum links of one address, before their HELLO too. `endpoints`: the public hosts and ports of this
        coordinator; a connection over loopback may also name loopback.
        """
        self._market, self._bus, self._tabs, self._accept_claim, self._max = market, bus, tabs, accept_claim, max_nodes
        self._per_address, self._endpoints = per_address, frozenset(endpoints)
        self._links: dict[Address, NodeLink] = {}
        self._links_by_address: Counter[str] = Counter()
        self._queued: Counter[str] = Counter()
        self._rate_limiter = rate_limiter or RateLimiter(IntakeLimits(), time.monotonic)
        self._changes = TokenBucket(CHANGES_PER_SECOND, CHANGES_BURST)
        self._closing: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._replicas: tuple[str, ...] = ()

    def add_endpoints(self, endpoints: Collection[str]) -> None:
        """Adds public hosts and ports of this coordinator, which nodes may have dialled."""
        self._endpoints |= frozenset(endpoints)

    @property
    def connected(self) -> int:
        """The number of connected nodes."""
        return len(self._links)

    @property
    def queued(self) -> int:
        """Bytes queued for nodes."""
        return self._queued.total()

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection, from its handshake to its end (ASGI websocket)."""
        await receive()
        extensions = scope.get("extensions") or {}
        extensions.get(FRAME_LIMIT_EXTENSION, int)(MAX_HELLO)
        await send({"type": "websocket.accept"})
        address = (scope.get("client") or ("",))[0]
        link = NodeLink(receive, send, address, self._queued, extensions.get(WRITE_EXTENSION, queue_all))
        del extensions, receive, send
        try:
            self._acquire(address)
            try:
                await self._serve_node(link, await self._join(link, scope))
            finally:
                self._links_by_address -= Counter((address_key(address),))
        except LinkClosed:
            pass
        except InboxOverrun as error:
            await link.refuse(BadMessage(str(error), fault=Fault.PROVIDER))
        except TallyError as error:
            self._rate_limiter.count_refusal(address, error)
            log.info("node refused", error=str(error), address=address)
            await link.refuse(error)
        finally:
            link.discard_queue()

    def _acquire(self, address: str) -> None:
        """Counts a link of an address. Raises Unavailable if the address has too many."""
        key = address_key(address)
        if self._links_by_address[key] >= self._per_address:
            text = f"{address} has {self._per_address} node links, the maximum per address; close one first"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)
        self._links_by_address[key] += 1

    def _check_room(self, provider: Address | None = None) -> None:
        """Raises Unavailable if this coordinator accepts no more nodes. A node that reconnects is always accepted."""
        full = provider is not None and provider not in self._links and len(self._links) >= self._max
        if self._stopping or full:
            why = f"has {self._max} nodes, the maximum" if full else "is stopping"
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, f"this coordinator {why}", fault=Fault.COORDINATOR)

    def set_replicas(self, urls: Sequence[str]) -> None:
        """Tells the nodes the base URLs of this coordinator's replicas, this one included; none for a lone coordinator.

        At most MAX_REPLICAS are told.
        """
        if self._replicas == (listed := tuple(urls[:MAX_REPLICAS])):
            return
        self._replicas = listed
        frame = pack_link(Kind.REPLICAS, payload=dumps(list(listed)))
        for link in self._links.values():
            if link.takes_replicas:
                link.enqueue(frame)

    async def close(self) -> None:
        """Closes all links and accepts no new ones. The nodes will reconnect to the next process."""
        self._stopping = True
        for link in list(self._links.values()):
            self._in_background(link.close())
        await asyncio.gather(*self._closing)

    def _in_background(self, closing: Coroutine[Any, Any, None]) -> None:
        """Closes a link without waiting for its node."""
        task = asyncio.create_task(closing, name="close link")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _authenticate(self, link: NodeLink, scope: Scope, watchdog: Watchdog) -> tuple[Address, Hello]:
        market = self._market
        challenge = Hash(secrets.token_bytes(32))
        offer = Challenge(challenge, market.address, market.domain.chain_id, market.domain.contract, payer_asks=True)
        await link.send_now(pack_link(Kind.CHALLENGE, payload=dumps(offer.to_json())))
        kind, _, payload = unpack_link(await link.receive(watchdog))
        if kind is not Kind.HELLO:
            raise BadMessage(f"link: expected HELLO, got {kind.name}")
        hello = Hello.from_json(loads(payload, "hello"))
        self._rate_limiter.count_asks(link.address, len(hello.asks))
        connect = hello.connect.verify(market.domain)
        if connect.message.challenge != challenge or connect.message.coordinator != market.address:
            raise BadSignature("hello.connect: expected this connection's challenge and this coordinator, got another")
        check_endpoint(connect.message.endpoint, self._endpoints, scope.get("server"))
        return connect.message.provider, hello

    async def _join(self, link: NodeLink, scope: Scope) -> Hello:
        """Lets a node in that proves its key. Its handshake is forgotten then: it is larger than all else that a node needs."""
        self._rate_limiter.check_address(link.address)
        self._check_room()
        with contextlib.closing(Watchdog(HELLO_SECONDS)) as watchdog:
            provider, hello = await self._authenticate(link, scope, watchdog)
        self._check_room(provider)
        extensions = scope.get("extensions") or {}
        extensions.get(FRAME_LIMIT_EXTENSION, int)(MAX_LINK_FRAME)
        extensions.get(FILTER_EXTENSION, id)(partial(self._take, link, provider))
        scope.clear()
        return hello

    async def _serve_node(self, link: NodeLink, hello: Hello) -> None:
        """Serves a node that was let in, until its link ends."""
        provider = hello.connect.message.provider
        former = self._links.get(provider)
        self._links[provider] = link
        subject, enqueue = node_subject(provider), partial(self._enqueue, link, provider)
        self._bus.attach(subject, enqueue)
        try:
            if former is not None:
                self._market.node_gone(provider)
                self._in_background(
                    former.refuse(Refusal(Code.NODE_GONE, "another connection of this provider replaced this one"))
                )
            self._welcome(link, provider, hello)
            del hello, former  # its asks are in the book
            with contextlib.closing(Watchdog(SILENCE_SECONDS)) as watchdog:
                while True:
                    frame = await link.receive(watchdog)
                    if self._links.get(provider) is not link:  # replaced by another connection meanwhile
                        raise LinkClosed
                    await self._handle(link, provider, frame)
                    del frame
        finally:
            self._bus.detach(subject, enqueue)
            link.discard_queue()
            if self._links.get(provider) is link:
                del self._links[provider]
                self._market.node_gone(provider, cut_off=self._stopping)
                log.info("node gone", provider=provider)

    def _welcome(self, link: NodeLink, provider: Address, hello: Hello) -> None:
        """Lists the asks of a node, and tells it so. Raises PeerError."""
        self._replace_asks(provider, hello.listing)
        link.takes_replicas = hello.replicas
        welcome = {"replicas": list(self._replicas)} if self._replicas else {}
        link.enqueue(pack_link(Kind.WELCOME, payload=dumps(welcome)))
        self._market.node_connected(provider, trace=hello.trace, resume=hello.resume)
        log.info("node connected", provider=provider, asks=len(hello.asks), software=hello.software)

    def _enqueue(self, link: NodeLink, provider: Address, frame: bytes) -> None:
        if not link.enqueue(frame):
            self._fail_busy(provider, frame)

    def _fail_busy(self, provider: Address, frame: bytes) -> None:
        """Fails the attempt of a job that does not fit into the queue of its node, without effect on the node's reputation."""
        _, job, _ = unpack_link(frame)
        text = f"too many bytes are queued for provider {provider} and other nodes at its address"
        error = Unavailable(Code.NODE_BUSY, text, fault=Fault.PROVIDER)
        self._market.node_frames.take(provider, (pack_link(Kind.FAIL, job, dumps(error.as_json())),))

    def _take(self, link: NodeLink, provider: Address, frames: Sequence[bytes]) -> Sequence[bytes]:
        """Takes the frames of running jobs at once. Returns all others, which the link's task handles."""
        if link.failed or self._links.get(provider) is not link:
            return frames
        try:
            others = self._market.node_frames.take(provider, frames)
        except InboxOverrun as error:
            link.fail(error)
            return ()
        if len(others) < len(frames):
            link.heard = True
        return others

    async def _handle(self, link: NodeLink, provider: Address, frame: bytes) -> None:
        kind, job, payload = unpack_link(frame)
        if not self._take(link, provider, (frame,)):
            return
        await self._throttle(link, frame, self._units(kind, provider))
        if kind is Kind.RECEIPT or (kind is Kind.FAIL and (payload := _void(payload))):
            await self._take_receipt(provider, job, payload)
        elif kind is Kind.LATE_RECEIPT:
            await self._take_late_receipt(provider, job, payload)
        elif kind is Kind.BEAT:
            beat = Beat.from_json(loads(payload, "beat"))
            self._market.matchmaker.set_capacity(provider, beat.capacities)
            self._market.match_log.add_seen_head(provider, beat.log_head)
        elif kind is Kind.ASKS:
            self._check_change_rate(provider)
            listing = Listing.from_json(loads(payload, "asks"), "asks")
            self._rate_limiter.count_asks(link.address, len(listing.asks))
            self._replace_asks(provider, listing)
            self._market.node_offers(provider)
        elif kind is Kind.RECALL:
            self._check_change_rate(provider)
            await self._recall(provider, loads(payload, "recall"))
        elif kind is Kind.CLAIM:
            await self._forward_claim(provider, ClaimRequest.from_json(loads(payload, "claim")))
        elif kind not in _FOR_RUNNING_JOBS:
            raise BadMessage(f"link: a node never sends {kind.name}")

    def _replace_asks(self, provider: Address, listing: Listing) -> None:
        self._market.matchmaker.replace_asks(provider, listing.asks, listing.capacities, groups=listing.groups)

    def _units(self, kind: Kind, provider: Address) -> int:
        """Returns the units that a frame costs beside its size. A report of capacity may move all asks of its node."""
        if kind is Kind.BEAT:
            return len(self._market.book.of_provider(provider)) // BEAT_ASKS
        return LOOKUP_UNITS if kind in _NEED_LOOKUP else 0

    async def _throttle(self, link: NodeLink, frame: bytes, units: float) -> None:
        """Counts a frame that no running job asked for. The links of an address that sends too many are read slowly."""
        wait = self._rate_limiter.count_frame(link.address, units + 1 + len(frame) // 1024)
        if wait:
            await asyncio.sleep(wait)

    async def _recall(self, provider: Address, raw: Any) -> None:
        """Sends a node that lost its state, or has none yet, the receipts that it signed here last."""
        after = raw.get("after") if isinstance(raw, dict) else None
        if not isinstance(after, str) or len(after) > 42:
            raise BadMessage("recall.after: expected an address or an empty string")
        try:
            receipts = await self._tabs.last_receipts(provider, after, RECALL_PAGE)
        except Unavailable as error:
            log.warning("receipts for recovery not read", provider=provider, error=str(error))
            return
        answer = {"receipts": [late.to_json() for late in receipts], "more": len(receipts) == RECALL_PAGE}
        self._bus.send(node_subject(provider), pack_link(Kind.RECALLED, payload=dumps(answer)))

    def _check_change_rate(self, provider: Address) -> None:
        """Raises Unavailable for a node that changes its asks, or asks for its receipts, too often."""
        tick = time.monotonic()
        if not self._changes.try_spend(provider, tick):
            text = f"link: expected at most {CHANGES_PER_SECOND} ASKS or RECALL frames per second"
            raise rate_limited(text, self._changes.delay(provider, tick), fault=Fault.PROVIDER)

    async def _take_receipt(self, provider: Address, job: JobId, payload: bytes) -> None:
        """Accepts a receipt of no live job. Without an answer, its node sends it again, together with the order."""
        try:
            await self._market.accept_receipt(provider, job, payload)
        except BadReceipt as error:
            self._refuse_receipt(provider, job, error)
        except Unavailable as error:
            log.warning("late receipt not stored", provider=provider, job=job.hex(), error=str(error))

    async def _take_late_receipt(self, provider: Address, job: JobId, payload: bytes) -> None:
        try:
            late = LateReceipt.from_json(loads(payload, "late receipt"))
            if not self._market.node_frames.take(provider, (pack_link(Kind.RECEIPT, job, late.receipt.to_bytes()),)):
                return
            await self._market.accept_late(provider, job, late)
        except (PeerError, Refusal) as error:
            self._refuse_receipt(provider, job, error)
        except Unavailable as error:
            log.warning("late receipt not stored", provider=provider, job=job.hex(), error=str(error))

    def _refuse_receipt(self, provider: Address, job: JobId, error: TallyError) -> None:
        """Tells a node that its receipt will never be accepted, which stops the node from sending it again."""
        log.warning("receipt refused", provider=provider, job=job.hex(), error=str(error))
        self._bus.send(node_subject(provider), pack_link(Kind.RECEIPT_REFUSED, job, dumps(error.as_json())))

    async def _forward_claim(self, provider: Address, request: ClaimRequest) -> None:
        try:
            await self._accept_claim(provider, request)
        except Unavailable as error:
            log.warning("claim not stored", provider=provider, error=str(error))


def _void(payload: bytes) -> bytes:
    """Returns the receipt in a FAIL of an attempt that was given up on, or outrun by another one; empty if it has none."""
    return Failure.split(payload)[1] or b""

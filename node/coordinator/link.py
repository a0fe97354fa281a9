"""The node's connection to its coordinator. The node opens it, so a node behind NAT needs no open port.

The handshake is CHALLENGE, HELLO with the signed answer, WELCOME. Then frames go both ways, with a BEAT every few seconds and
whenever the free slots change. A lost connection is opened again after a growing, jittered pause. A malformed frame ends the
connection with a log message, never the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Protocol

import structlog
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import WebSocketException

from node.coordinator.link_session import LinkSession, wait_for
from node.coordinator.link_settings import LinkSettings, node_url
from node.ports import Link
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadMessage, TallyError, error_from_json
from tallystick.protocol.link import Beat, Capacities, Capacity, Challenge, Hello, Listing, endpoint_of
from tallystick.protocol.messages import Connect
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.replicas import Reach, reach_of, read_replica_urls, read_welcome
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import MAX_BODY, MAX_FRAME, NO_JOB, Kind, dumps, loads, pack_link, unpack_link
from tallystick.runtime.plaintext import warn_if_plaintext
from tallystick.runtime.replica_resolver import check_reach
from tallystick.runtime.websocket_client import FastPathConnection, open_websocket
from tallystick.version import __version__

log = structlog.get_logger()
_GONE = Capacity(0, 0)
"""The capacity of an engine that was removed, until its asks are."""
_JITTER = random.SystemRandom().random
_CLOSE_SECONDS = 3.0
_MIN_BEAT_SECONDS = 0.02
"""Changes of the free slots within this time are reported once."""
_SHARED_BEAT_SECONDS = 0.05
"""If several links compete for the slots, each tells of a free one after a random part of this time. Whoever hears first may take
it, so without the draw the nearest coordinator would get all slots that others wait for too.
"""


class LinkHandler(Protocol):
    """Receives the events of a link. Raises BadMessage for a malformed payload; the link is then closed."""

    def connected(self, link: Link) -> None:
        """The coordinator accepted this node."""
        ...

    def frame_received(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        """A frame came that is not of the link itself, such as DISPATCH or CREDIT. Must not wait."""
        ...

    def disconnected(self, link: Link) -> None:
        """A connected link ended."""
        ...


class WrongCoordinator(BadMessage):
    """The peer is another coordinator than the one that is expected there."""


class LinkObserver(Protocol):
    """Watches a link for whoever keeps the links of a coordinator."""

    @property
    def shares_slots(self) -> bool:
        """Whether jobs of other links compete for the node's slots."""
        ...

    def replicas_listed(self, link: NodeLink, coordinator: Address, urls: tuple[str, ...]) -> None:
        """The coordinator listed its replicas; none if it is alone."""
        ...

    def link_changed(self) -> None:
        """A link was connected, or lost its connection."""
        ...


class _Unobserved:
    """Observes nothing."""

    shares_slots = False

    def replicas_listed(self, link: NodeLink, coordinator: Address, urls: tuple[str, ...]) -> None:
        """See LinkObserver."""

    def link_changed(self) -> None:
        """See LinkObserver."""


_FOR_HANDLER = frozenset(
    (Kind.DISPATCH, Kind.TRACE, Kind.CANCEL, Kind.CREDIT, Kind.RECEIPT_ACK, Kind.RECEIPT_REFUSED, Kind.RECALLED, Kind.RESUME)
)


class NodeLink:
    """Keeps one connection to one coordinator open, until `close`."""

    def __init__(
        self,
        url: str,
        *,
        signer: Signer,
        domain: Domain,
        handler: LinkHandler,
        listing: Callable[[Address], Listing],
        capacities: Callable[[], Capacities],
        settings: LinkSettings | None = None,
        coordinator: Address | None = None,
        log_head: Callable[[Address], bytes] = lambda _coordinator: b"",
        jitter: Callable[[], float] = _JITTER,
        observer: LinkObserver | None = None,
        seed: str | None = None,
        takes_trace: bool = False,
    ) -> None:
        """`listing` returns what is offered to a coordinator, `capacities` the current capacity of each slot group.
        `coordinator`: the only account to accept, if it is known. `log_head` returns the newest known head of a coordinator's
        match log, which is told to that coordinator once. `jitter` returns numbers from 0 to 1. `seed`: the configured URL of the
        coordinator that listed this replica; None for a configured URL itself. `takes_trace`: whether the coordinator may send
        the trace context of jobs.
        """
        self.url = node_url(url)
        self.seed, self._listed = node_url(seed or url), seed is not None
        self._observer: LinkObserver = _Unobserved() if observer is None else observer
        self._signer, self._domain, self._handler, self._takes_trace = signer, domain, handler, takes_trace
        self._listing, self._capacities, self._settings = listing, capacities, settings or LinkSettings()
        self._coordinator, self._jitter, self._log_head = coordinator, jitter, log_head
        self._closing = asyncio.Event()
        self.limit, self.reach = Reach.ANYWHERE, Reach.ANYWHERE
        """`limit`: the nearest address that a listed replica may have; `reach`: that of the server connected to last."""
        self.retired = self.is_impostor = False
        """`retired`: it is not connected again. `is_impostor`: the listed replica is not one of its coordinator."""
        self._capacity_changed = asyncio.Event()
        self.session: LinkSession | None = None
        self.problem = "not connected yet"

    def announce_capacity(self) -> None:
        """Sends the changed capacity to the coordinator: at once if it has more free slots, otherwise soon."""
        self._capacity_changed.set()

    def announce_asks(self) -> None:
        """Sends the changed asks to the coordinator."""
        if self.session is not None:
            listing = self._offered(self.session.coordinator, payer_asks=self.session.payer_asks)
            self.session.post(Kind.ASKS, NO_JOB, dumps(listing.to_json()))
            self.session.announced = listing
            self.session.reported = dict(listing.capacities)
            log.info("asks announced", url=self.url, asks=len(listing.asks))

    async def run(self) -> None:
        """Connects and reconnects until `close`; once it is retired, until its connection ends."""
        warn_if_plaintext(self.url, "which account buys which model here, when, in which sizes, at which price")
        pause = self._settings.min_backoff_seconds
        while not self._closing.is_set() and not self.retired:
            served = await self._run_connection()
            if self._closing.is_set() or self.retired or self.is_impostor:
                return
            if served:
                pause = self._settings.min_backoff_seconds
            wait = pause * (0.5 + self._jitter() / 2)
            log.warning("no connection to the coordinator", url=self.url, reason=self.problem, retry_seconds=round(wait, 2))
            await wait_for(self._closing, wait)
            pause = min(2 * pause, self._settings.max_backoff_seconds)

    async def close(self) -> None:
        """Sends what is queued, within a short time limit, and ends `run`."""
        self._closing.set()
        session = self.session
        if session is not None:
            await session.flush(_CLOSE_SECONDS)
            await session.end("the node is stopping")

    async def _run_connection(self) -> bool:
        """Runs one connection from opening to end; `problem` says why it ended.

        Returns whether the coordinator took this node, and neither refused it afterwards nor broke the protocol. Such a
        connection ends because the coordinator or the network went away, so the next attempt may be soon, however short it was.
        """
        settings, served = self._settings, False
        self.reach = Reach.ANYWHERE
        try:
            socket = await open_websocket(
                self.url,
                max_size=MAX_BODY + MAX_FRAME,
                open_seconds=settings.connect_seconds,
                ping_seconds=settings.ping_seconds,
                close_seconds=_CLOSE_SECONDS,
                user_agent=f"tallystick-node/{__version__}",
                use_proxy=uses_proxy(self.url),
                check_peer=self._check_peer,
            )
            try:
                session = await self._handshake(socket)
                self.problem = ""
                await self._serve(session)
                served = not session.refused
                self.problem = session.problem or "the coordinator closed the connection"
            finally:
                await socket.close()
        except WrongCoordinator as error:
            self.problem, self.is_impostor = str(error), self._listed
            if self._listed:
                log.warning("a listed replica is another coordinator's and is not used", url=self.url, reason=self.problem)
        except TallyError as error:
            self.problem = str(error)
        except TimeoutError:
            self.problem = f"the coordinator did not respond within {settings.connect_seconds} s"
        except (OSError, WebSocketException) as error:
            self.problem = str(error) or type(error).__name__
        return served

    @property
    def nearest(self) -> Reach:
        """The nearest address to which its URL may lead; a configured one may have any."""
        return self.limit if self._listed else Reach.MACHINE

    def _check_peer(self, address: str) -> None:
        self.reach = reach_of(address)
        check_reach(address, self.nearest)

    async def _handshake(self, socket: FastPathConnection) -> LinkSession:
        async with asyncio.timeout(self._settings.connect_seconds):
            challenge = Challenge.from_json(loads(await _expect(socket, Kind.CHALLENGE), "challenge"))
            self._check_challenge(challenge)
            answer = Connect(
                provider=self._signer.address,
                coordinator=challenge.coordinator,
                challenge=challenge.challenge,
                endpoint=endpoint_of(self.url),
            )
            listing = self._offered(challenge.coordinator, payer_asks=challenge.payer_asks)
            signed, software = self._signer.sign(answer, self._domain), f"tallystick-node/{__version__}"
            hello = Hello(signed, listing, software, replicas=True, trace=self._takes_trace, resume=True)
            await socket.send(pack_link(Kind.HELLO, payload=dumps(hello.to_json())))
            replicas = read_welcome(loads(await _expect(socket, Kind.WELCOME), "welcome"))
        self._observer.replicas_listed(self, challenge.coordinator, replicas)
        outbox, endpoint = self._settings.outbox_frames, endpoint_of(self.seed)
        return LinkSession(socket, challenge.coordinator, outbox, listing, endpoint, payer_asks=challenge.payer_asks)

    def _offered(self, coordinator: Address, *, payer_asks: bool) -> Listing:
        listing = self._listing(coordinator)
        return listing if payer_asks else listing.for_everybody()

    def _check_challenge(self, challenge: Challenge) -> None:
        if self._coordinator is not None and challenge.coordinator != self._coordinator:
            expected = (
                f"{self._coordinator}, which listed it as a replica" if self._listed else f"the configured {self._coordinator}"
            )
            raise WrongCoordinator(f"challenge.coordinator: expected {expected}, got {challenge.coordinator}")
        if (challenge.chain_id, challenge.contract) != (self._domain.chain_id, self._domain.contract):
            raise BadMessage(
                f"the coordinator uses contract {challenge.contract} on chain {challenge.chain_id}, but this node uses contract "
                f"{self._domain.contract} on chain {self._domain.chain_id}; give both the same deployment file"
            )

    async def _serve(self, session: LinkSession) -> None:
        """Serves a connected session to its end."""
        self.session = session
        log.info("connected to the coordinator", url=self.url, coordinator=session.coordinator, asks=len(session.announced.asks))
        heartbeats = asyncio.create_task(self._send_heartbeats(session), name="heartbeats")
        writer = asyncio.create_task(session.write(), name="outbox")
        try:
            self._handler.connected(session)
            self._observer.link_changed()
            if self._offered(session.coordinator, payer_asks=session.payer_asks).asks != session.announced.asks:
                self.announce_asks()
            await self._read(session)
        except TallyError as error:
            log.warning("the coordinator broke the protocol", url=self.url, error=str(error))
            session.problem, session.refused = str(error), True
            await session.end(str(error)[:100], code=1002)
        except WebSocketException as error:
            session.problem = session.problem or str(error)
        finally:
            self.session = None
            session.close()
            heartbeats.cancel()
            writer.cancel()
            self._handler.disconnected(session)
            self._observer.link_changed()
            await asyncio.gather(heartbeats, writer, return_exceptions=True)

    async def _read(self, session: LinkSession) -> None:
        """Takes the coordinator's frames until the connection ends. Raises TallyError for one that breaks the protocol."""
        socket, fault = session.socket, list[TallyError]()

        def take(message: bytes | str) -> None:
            try:
                self._take(session, message)
            except TallyError as error:
                fault.append(error)
                socket.on_message = lambda _message: None
                session.end_soon(str(error)[:100], code=1002)

        while socket.recv_messages.frames and not fault:  # what came with WELCOME
            take(await socket.recv())
        if not fault:
            socket.on_message = take
        try:
            async for _ in socket:  # it yields nothing any more, and ends with the connection
                continue
        finally:
            if fault:
                raise fault[0]

    def _take(self, session: LinkSession, message: bytes | str) -> None:
        kind, job, payload = unpack_link(message)
        if kind in _FOR_HANDLER:
            self._handler.frame_received(session, kind, job, payload)
        elif kind is Kind.REPLICAS:
            self._observer.replicas_listed(self, session.coordinator, read_replica_urls(loads(payload, "replicas"), "replicas"))
        elif kind is Kind.ERROR:
            session.problem, session.refused = str(error_from_json(loads(payload, "error"), 502)), True
            log.error("the coordinator refuses this node", url=self.url, reason=session.problem)
        elif kind is not Kind.BEAT:
            raise BadMessage(f"link: expected a frame that coordinators send, got {kind.name}")

    async def _send_heartbeats(self, session: LinkSession) -> None:
        while True:
            self._report(session)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.heartbeat_seconds):
                    await self._wait_for_change(session)

    async def _wait_for_change(self, session: LinkSession) -> None:
        """Waits until the coordinator must hear of a changed capacity: at once of free slots, which it could use.

        It counts the jobs that it sends here itself. So it hears of one that began a little later, and of a short one not at all.
        """
        await asyncio.sleep(_MIN_BEAT_SECONDS)
        while True:
            await self._capacity_changed.wait()
            self._capacity_changed.clear()
            changed = self._changed(session)
            if any(capacity.free > session.reported[group].free for group, capacity in changed.items()):
                if not self._observer.shares_slots:
                    return
                await asyncio.sleep(_SHARED_BEAT_SECONDS * self._jitter())
                if self._changed(session):
                    return
                continue
            await asyncio.sleep(_MIN_BEAT_SECONDS)
            if self._changed(session):
                return

    def _changed(self, session: LinkSession) -> Capacities:
        """The announced slot groups whose capacity is not the one that the coordinator knows."""
        current = self._capacities()
        now = {group: current.get(group, _GONE) for group in session.reported}
        return {group: capacity for group, capacity in now.items() if capacity != session.reported[group]}

    def _report(self, session: LinkSession) -> None:
        """Sends the capacity of the announced slot groups in which it changed, and the newest head of the match log if it is new.

        An empty report is a sign of life.
        """
        changed = self._changed(session)
        session.reported |= changed
        head = self._log_head(session.coordinator)
        beat = Beat(changed, b"" if head == session.told_head else head)
        session.told_head = head
        session.post(Kind.BEAT, NO_JOB, dumps(beat.to_json()))


async def _expect(socket: ClientConnection, kind: Kind) -> bytes:
    received, _, payload = unpack_link(await socket.recv())
    if received is Kind.ERROR:
        raise error_from_json(loads(payload, "error"), 502)
    if received is not kind:
        raise BadMessage(f"link: expected {kind.name}, got {received.name}")
    return payload

"""A coordinator on a real port, with nodes and clients that talk to it over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from coordinator.app import App
from coordinator.domain.limits import IntakeLimits
from coordinator.domain.rate_limiter import RateLimiter
from coordinator.domain.resource_bounds import MAX_LINK_FRAME
from coordinator.http.account_routes import Accounts
from coordinator.http.api import ApiContext
from coordinator.http.metrics import CoordinatorMetrics
from coordinator.http.node_hub import NodeHub
from coordinator.http.schemas import Info
from coordinator.jobs.accounts import AccessTiers, SettledAmounts
from coordinator.storage.memory import MemoryAccountStore, MemoryStore
from tallystick.protocol.eip712 import Signed, Signer, Verified
from tallystick.protocol.errors import TallyError, error_from_json
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.job_link import LINK_PATH, LINK_STREAM, pack_greeting, pack_record, pack_submit, read_records
from tallystick.protocol.link import Beat, Capacity, Challenge, Hello, Listing, endpoint_of
from tallystick.protocol.messages import Ask, Connect, Receipt
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import NO_JOB, Dispatch, FrameReader, Kind, Submission, dumps, loads, pack_link, unpack_link
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.serving import serving
from tallystick.web.wallet_page import WalletPage
from tallystick.web.wallet_sign_in import WalletSignIn
from tests.coordinator.fake_escrow import FakeEscrow, make_settler
from tests.coordinator.harness import COORDINATOR, DOMAIN, LAST_CHUNK, World, make_ask, make_receipt, unchecked

TIMEOUT_SECONDS = 60
"""Seconds after which a test that waits for something gives up."""
ROOMY = Capacity(4, 4)
TOKEN = Address("0x" + "cd" * 20)


@dataclass
class Served:
    """A market at `url`; time passes only in `world`."""

    world: World
    store: MemoryStore
    hub: NodeHub
    url: str
    http: httpx.AsyncClient
    app: App
    rate_limiter: RateLimiter

    @property
    def node_url(self) -> str:
        return self.url.replace("http", "ws") + "/v1/node"

    async def post(self, submission: Submission | bytes) -> httpx.Response:
        """Posts a job and reads the whole response."""
        body = submission if isinstance(submission, bytes) else submission.dumps()
        return await self.http.post("/v1/jobs", content=body)


async def _passes() -> dict[str, CheckResult]:
    return {"always": CheckResult(Health.PASS)}


@asynccontextmanager
async def served(
    world: World | None = None,
    max_nodes: int = 100,
    *,
    intake: IntakeLimits | None = None,
    tiers: Sequence[Tier] = (),
    wallet: WalletPage | None = None,
    **hub_settings: Any,
) -> AsyncIterator[Served]:
    """Serves a market on a free port; `hub_settings` are the hub's."""
    world = world or World()
    assert isinstance(world.store, MemoryStore)
    limits = intake or IntakeLimits()
    rate_limiter = RateLimiter(limits, time.monotonic)
    take = make_settler(FakeEscrow(), world.store).accept_claim
    hub = NodeHub(world.market, world.bus, world.store, take, max_nodes, rate_limiter=rate_limiter, **hub_settings)
    info = Info(
        name="test",
        version="0",
        coordinator=COORDINATOR.address,
        chainId=DOMAIN.chain_id,
        contract=DOMAIN.contract,
        token=TOKEN,
        tokenDecimals=6,
        feeBps=0,
    )
    store, health = world.store, HealthMonitor({"always": _passes})
    metrics = CoordinatorMetrics(lambda: health.last)
    accounts = MemoryAccountStore(world.store)
    sign_in = WalletSignIn(origins=(), chain_id=DOMAIN.chain_id, key=b"test", statement="Sign in.", now=world.clock.now)
    settled = SettledAmounts(accounts, world.clock.tick)
    limited = AccessTiers(Tiers(tiers), settled, world.clock.tick) if tiers else None
    own = Accounts(sign_in, accounts, settled, tiers=limited)
    context = ApiContext(world.market, lambda: hub.connected, store, store, store, info, health, metrics, own, world.clock.now)
    app = App(context, hub, world.store, intake=limits, rate_limiter=rate_limiter, wallet=wallet)
    async with (
        serving(app, "127.0.0.1", 0, ws_max_size=MAX_LINK_FRAME) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=TIMEOUT_SECONDS) as http,
    ):
        try:
            yield Served(world, world.store, hub, f"http://127.0.0.1:{port}", http, app, rate_limiter)
        finally:
            await hub.close()
            await app.clients.close()


async def until(condition: Any) -> None:
    """Waits until a condition is true that depends on sockets."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)


@dataclass
class LinkNode:
    """A provider behind a real WebSocket."""

    signer: Signer
    socket: ClientConnection
    asks: tuple[Verified[Ask], ...]
    endpoint: str
    seen: list[tuple[Kind, JobId, bytes]] = field(default_factory=list)
    takes_replicas: bool = False

    @classmethod
    async def open(cls, at: Served | str, signer: Signer, *asks: Verified[Ask]) -> Self:
        """Opens a connection to a market, or to the node link at a URL, without sending anything."""
        url = at if isinstance(at, str) else at.node_url
        socket = await connect(url, proxy=None, compression=None, max_size=None, ping_interval=None, close_timeout=1)
        return cls(signer, socket, asks or (make_ask(signer),), endpoint_of(url))

    @classmethod
    async def join(cls, at: Served | str, signer: Signer, *asks: Verified[Ask], slots: int = 4) -> Self:
        """Opens a connection and completes its handshake."""
        node = await cls.open(at, signer, *asks)
        await node.hello(capacity=Capacity(slots, slots))
        await node.expect(Kind.WELCOME)
        return node

    @property
    def address(self) -> Address:
        return self.signer.address

    async def hello(self, capacity: Capacity = ROOMY, **changes: Any) -> None:
        """Answers the challenge; changes are made to the message before it is signed."""
        challenge = Challenge.from_json(loads(await self.expect(Kind.CHALLENGE), "challenge"))
        message = Connect(
            provider=self.address,
            coordinator=challenge.coordinator,
            challenge=challenge.challenge,
            endpoint=self.endpoint,
        )
        signed = unchecked(self.signer.sign(replace(message, **changes), DOMAIN))
        await self.greet(signed, capacity)

    async def greet(self, signed: Signed[Connect], capacity: Capacity = ROOMY) -> None:
        """Sends HELLO."""
        hello = Hello(signed, Listing.of_one_group(tuple(map(unchecked, self.asks)), capacity), "test", self.takes_replicas)
        await self.send(Kind.HELLO, NO_JOB, dumps(hello.to_json()))

    async def send(self, kind: Kind, job: JobId = NO_JOB, payload: bytes = b"") -> None:
        await self.socket.send(pack_link(kind, job, payload))

    async def send_beat(self, capacity: Capacity = ROOMY) -> None:
        await self.send(Kind.BEAT, NO_JOB, dumps(Beat({0: capacity} if self.asks else {}).to_json()))

    async def expect(self, kind: Kind) -> bytes:
        """Returns the payload of the next frame of this kind."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while True:
                frame = unpack_link(await self.socket.recv())
                self.seen.append(frame)
                if frame[0] is kind:
                    return frame[2]

    async def refusal(self) -> TallyError:
        """Returns the error with which the coordinator closes this connection."""
        error = error_from_json(loads(await self.expect(Kind.ERROR), "error"), 502)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            try:
                while True:
                    await self.socket.recv()
            except ConnectionClosed:
                return error

    async def take_job(self) -> tuple[JobId, Verified[Receipt]]:
        """Waits for a job. Returns it with its future receipt."""
        dispatch = Dispatch.loads(await self.expect(Kind.DISPATCH))
        order = dispatch.candidate.order.verify(DOMAIN)
        return self.seen[-1][1], make_receipt(self.signer, order, dispatch.candidate.terms)

    async def finish(self, job: JobId, receipt: Signed[Receipt]) -> None:
        """Sends the last chunk of a response and its receipt, and waits for the acknowledgement."""
        await self.send(Kind.CHUNK, job, LAST_CHUNK)
        await self.send(Kind.RECEIPT, job, receipt.to_bytes())
        await self.expect(Kind.RECEIPT_ACK)


async def frames_of(response: httpx.Response) -> AsyncGenerator[tuple[Kind, bytes], None]:
    """Yields the frames of a job's response as they arrive."""
    reader = FrameReader()
    async for data in response.aiter_raw():
        for frame in reader.feed(data):
            yield frame


@dataclass
class LinkClient:
    """A client behind a real WebSocket that says only what the test says."""

    socket: ClientConnection
    frames: dict[int, list[tuple[Kind, bytes]]] = field(default_factory=dict)
    """All frames that came, by stream."""
    streams: int = 0

    @classmethod
    async def open(cls, at: Served, **settings: Any) -> Self:
        """Opens a connection without sending anything."""
        url = at.url.replace("http", "ws") + LINK_PATH
        socket = await connect(url, proxy=None, compression=None, max_size=None, ping_interval=None, close_timeout=1, **settings)
        return cls(socket)

    @classmethod
    async def join(cls, at: Served, **settings: Any) -> Self:
        """Opens a connection and completes its handshake."""
        client = await cls.open(at, **settings)
        await client.send(LINK_STREAM, Kind.HELLO, pack_greeting("test"))
        await client.expect(LINK_STREAM, Kind.WELCOME)
        return client

    async def send(self, stream: int, kind: Kind, payload: bytes = b"") -> None:
        await self.socket.send(pack_record(stream, kind, payload))

    async def submit(self, submission: Submission | bytes, linger: int | None = None) -> int:
        """Submits a job. Returns its stream."""
        self.streams += 1
        body = submission if isinstance(submission, bytes) else submission.dumps()
        await self.send(self.streams, Kind.SUBMIT, pack_submit(body, linger))
        return self.streams

    async def _receive(self) -> None:
        for stream, kind, payload in read_records(await self.socket.recv(decode=False)):
            self.frames.setdefault(stream, []).append((kind, payload))

    async def expect(self, stream: int, kind: Kind, count: int = 1) -> bytes:
        """Returns the payload of a stream's n-th frame of this kind."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while len(payloads := [payload for other, payload in self.frames.get(stream, []) if other is kind]) < count:
                await self._receive()
        return payloads[count - 1]

    async def refusal(self, stream: int = LINK_STREAM) -> TallyError:
        """Returns the error that ends a stream, or the link."""
        return error_from_json(loads(await self.expect(stream, Kind.ERROR), "error"), 502)

    async def closed(self) -> int | None:
        """Reads on until the coordinator closes the connection. Returns the code of its close."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self._receive()
        return self.socket.close_code

    def kinds(self, stream: int) -> list[Kind]:
        return [kind for kind, _ in self.frames.get(stream, [])]

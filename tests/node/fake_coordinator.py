"""The coordinator's side of the node link, over a real WebSocket, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from tallystick.cli.local.processes import free_port
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.link import Beat, Capacity, Challenge, Hello, LateReceipt, Listing, read_asks
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import NO_JOB, Kind, dumps, loads, pack_link, unpack_link
from tests.node.harness import COORDINATOR, DOMAIN

NONCE = Hash(bytes(range(32)))
ROUTE = "/v1/node"


@dataclass(eq=False)
class Connection:
    """A connected node: its HELLO and every later frame. `confirm`: confirm that output arrived."""

    socket: ServerConnection
    hello: Hello
    confirm: bool = True
    frames: list[tuple[Kind, JobId, bytes]] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, kind: Kind, job: JobId | None = None) -> list[bytes]:
        """Returns the payloads received of one kind, for one job or all."""
        return [payload for frame_kind, frame_job, payload in self.frames if frame_kind is kind and job in (None, frame_job)]

    async def until(self, kind: Kind, count: int = 1, job: JobId | None = None) -> bytes:
        """Waits for the n-th frame of a kind and returns its payload."""
        while len(self.of(kind, job)) < count:
            self.came.clear()
            await self.came.wait()
        return self.of(kind, job)[count - 1]

    async def asks(self) -> tuple[Signed[Ask], ...]:
        """Returns the node's first asks, from its HELLO or, if it had to recover, from a later frame."""
        asks = list(self.hello.asks)
        number = 0
        while not asks:
            number += 1
            asks = list(read_asks(loads(await self.until(Kind.ASKS, number), "asks")["asks"]))
        return tuple(asks)

    def capacities(self) -> dict[int, Capacity]:
        """Returns the capacity of each slot group, as the node reported it so far."""
        known = dict(self.hello.listing.capacities)
        for kind, _, payload in self.frames:
            if kind is Kind.ASKS:
                known = dict(Listing.from_json(loads(payload, "asks"), "asks").capacities)
            elif kind is Kind.BEAT:
                known |= Beat.from_json(loads(payload, "beat")).capacities
        return known

    async def send(self, kind: Kind, job: JobId = NO_JOB, payload: bytes = b"") -> None:
        """Sends a frame to the node."""
        await self.socket.send(pack_link(kind, job, payload))


@dataclass
class FakeCoordinator:
    """Accepts nodes. `domain` and `account` are the ones that it claims; `acknowledge`: confirm receipts on arrival;
    `recalls`: answer nodes that recover their state.
    """

    domain: Domain = DOMAIN
    account: Address = COORDINATOR.address
    acknowledge: bool = True
    recalls: bool = True
    replicas: list[str] = field(default_factory=list)
    """What WELCOME lists."""
    payer_asks: bool = False
    """Whether it says that it offers asks for some payers to these alone."""
    port: int = 0
    connections: asyncio.Queue[Connection] = field(default_factory=asyncio.Queue)
    remembered: list[LateReceipt] = field(default_factory=list)
    """What it tells a node that recalls, one a page."""

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator[FakeCoordinator]:
        """Serves until the end of the block; a given port can be served again."""
        async with serve(self._attend, "127.0.0.1", port or free_port(0), max_size=64 << 20, compression=None) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            yield self
            server.close(close_connections=True)

    def page(self, after: str) -> bytes:
        """Returns the answer to a node that recovers its state."""
        left = [receipt for receipt in self.remembered if receipt.receipt.message.payer > after]
        return dumps({"receipts": [receipt.to_json() for receipt in left[:1]], "more": len(left) > 1})

    async def _attend(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        assert socket.request.path == ROUTE
        challenge = Challenge(NONCE, self.account, self.domain.chain_id, self.domain.contract, payer_asks=self.payer_asks)
        await socket.send(pack_link(Kind.CHALLENGE, payload=dumps(challenge.to_json())))
        try:
            kind, _, payload = unpack_link(await socket.recv())
        except ConnectionClosed:
            return
        assert kind is Kind.HELLO
        hello = Hello.from_json(loads(payload, "hello"))
        assert hello.replicas
        connect = hello.connect.verify(self.domain).message
        assert (connect.challenge, connect.coordinator) == (NONCE, self.account)
        connection = Connection(socket, hello)
        await socket.send(pack_link(Kind.WELCOME, payload=dumps({"replicas": self.replicas} if self.replicas else {})))
        self.connections.put_nowait(connection)
        try:
            async for message in socket:
                frame = unpack_link(message)
                if frame[0] is Kind.CHUNK and connection.confirm and not connection.of(Kind.CHUNK, frame[1]):
                    await connection.send(Kind.CREDIT, frame[1], bytes(4))
                connection.frames.append(frame)
                connection.came.set()
                if frame[0] is Kind.RECALL and self.recalls:
                    await connection.send(Kind.RECALLED, NO_JOB, self.page(loads(frame[2], "recall")["after"]))
                if frame[0] in (Kind.RECEIPT, Kind.LATE_RECEIPT) and self.acknowledge:
                    await connection.send(Kind.RECEIPT_ACK, frame[1])
        except (ConnectionClosed, BadMessage):
            pass
        finally:
            connection.closed.set()

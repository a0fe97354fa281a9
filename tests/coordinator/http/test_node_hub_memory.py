"""What a connected node takes in memory, counted in bytes."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from typing import Any

from coordinator.http.node_hub import NodeHub
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.link import Capacity, Challenge, Hello, Listing
from tallystick.protocol.messages import Ask, Connect
from tallystick.protocol.wire import Kind, dumps, loads, pack_link, unpack_link
from tests.coordinator.fake_escrow import FakeEscrow, make_settler
from tests.coordinator.harness import COORDINATOR, DOMAIN, World, make_ask, person, quiet

NODES, ASKS = 60, 10
MOST = 15_000
"""Bytes a node with its asks, half as many again as were measured; its server adds what the connection takes."""
ENDPOINT = "coordinator.example:443"


class Socket:
    """The connection of a node that answers the challenge with its asks, and then says nothing."""

    __slots__ = ("_asks", "_frame", "_signer")

    def __init__(self, signer: Signer, asks: tuple[Verified[Ask], ...]) -> None:
        self._signer, self._asks = signer, asks
        self._frame: asyncio.Future[bytes] | None = None

    async def receive(self) -> dict[str, Any]:
        """Returns the handshake, the HELLO, and nothing after that."""
        if self._frame is None:
            self._frame = asyncio.get_running_loop().create_future()
            return {"type": "websocket.connect"}
        frame, self._frame = await self._frame, asyncio.get_running_loop().create_future()
        return {"type": "websocket.receive", "bytes": frame}

    async def send(self, event: Any) -> None:
        """Answers the challenge."""
        kind, _, payload = unpack_link(event["bytes"]) if "bytes" in event else (None, None, b"")
        if kind is not Kind.CHALLENGE or self._frame is None:
            return
        challenge = Challenge.from_json(loads(payload, "challenge"))
        answer = Connect(
            provider=self._signer.address,
            coordinator=COORDINATOR.address,
            challenge=challenge.challenge,
            endpoint=ENDPOINT,
        )
        hello = Hello(self._signer.sign(answer, DOMAIN), Listing.of_one_group(self._asks, Capacity(9, 9)), "test")
        self._frame.set_result(pack_link(Kind.HELLO, payload=dumps(hello.to_json())))


async def test_a_connected_node_is_small() -> None:
    """Once its asks are in the book, nothing of its HELLO is held beside them, and little of its link."""
    world = World()
    store = MemoryStore()
    accept_claim = make_settler(FakeEscrow(), store).accept_claim
    hub = NodeHub(world.market, world.bus, store, accept_claim, per_address=NODES, endpoints=(ENDPOINT,))
    signers = [person(f"node {number}") for number in range(NODES)]
    sockets = [
        Socket(signer, tuple(make_ask(signer, seq=number, model=f"model {number}") for number in range(ASKS)))
        for signer in signers
    ]
    gc.collect()
    tracemalloc.start()
    try:
        serving = [
            asyncio.create_task(hub.serve({"type": "websocket", "client": ("10.0.0.1", 1)}, socket.receive, socket.send))
            for socket in sockets
        ]
        await quiet()
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (hub.connected, world.market.book.size) == (NODES, NODES * ASKS)
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    assert size / NODES < MOST, f"{size / NODES:.0f} bytes a node"

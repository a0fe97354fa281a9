"""Limits on what strangers with many keys can make a real coordinator hold, while honest buyers are served."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from scripts.relay import processes
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import MAX_ASK_BYTES, Capacity, Challenge, Hello, Listing, endpoint_of
from tallystick.protocol.messages import Connect, Spec
from tallystick.protocol.wire import Kind, dumps, loads, pack_link, unpack_link
from tests.builders import build_ask

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs more than one loopback address")
NODES, LINKS = 80, 64
"""How many one address tries, and may have (max_nodes_per_address)."""
GROWTH_MIB = 160
UNFINISHED = 120 * 1024


async def _join(site: processes.Site, address: str, specs: list[Spec]) -> ClientConnection:
    """Connects a node with a new key that sells the market's model at a high price. Raises ConnectionClosed if it is refused."""
    key, url = Signer(os.urandom(32)), f"ws{site.coordinator.removeprefix('http')}/v1/node"

    def ask(number: int, spec: Spec) -> Any:
        return key.sign(
            build_ask(
                key.address,
                model="bench",
                input_price=10**9,
                cached_input_price=10**9,
                output_price=10**9,
                sealing_key=os.urandom(32),
                seq=number,
                spec=spec,
            ),
            site.deployment.domain,
        )

    socket = await connect(url, compression=None, max_size=None, open_timeout=60, local_addr=(address, 0), proxy=None)
    kind, _, payload = unpack_link(await socket.recv())
    if kind is Kind.ERROR:
        await socket.recv()
    challenge = Challenge.from_json(loads(payload, "challenge"))
    answer = Connect(
        provider=key.address, coordinator=challenge.coordinator, challenge=challenge.challenge, endpoint=endpoint_of(url)
    )
    asks = tuple(ask(number, spec) for number, spec in enumerate(specs))
    hello = Hello(key.sign(answer, site.deployment.domain), Listing.of_one_group(asks, Capacity(0, 9)), "x")
    await socket.send(pack_link(Kind.HELLO, payload=dumps(hello.to_json())))
    if unpack_link(await socket.recv())[0] is Kind.ERROR:
        await socket.recv()
    return socket


async def _outcomes(make: Callable[[], Awaitable[ClientConnection]], count: int) -> list[ClientConnection]:
    """Opens connections and returns those that were accepted."""
    results = await asyncio.gather(*(make() for _ in range(count)), return_exceptions=True)
    failed = [result for result in results if isinstance(result, BaseException)]
    assert all(isinstance(result, ConnectionClosed) for result in failed), failed
    return [result for result in results if isinstance(result, ClientConnection)]


async def _unfinished_body(port: int, address: str, over: asyncio.Event) -> bytes:
    """Posts most of a job and stops. Returns the coordinator's response so far."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
    response = b""
    with contextlib.suppress(ConnectionError):
        writer.write(b"POST /v1/jobs HTTP/1.1\r\nhost: x\r\ncontent-length: 33000000\r\n\r\n")
        for _ in range(31):
            writer.write(bytes(1 << 20))
            await asyncio.wait({asyncio.ensure_future(writer.drain())}, timeout=5)
        waiting = asyncio.ensure_future(reader.read(2_000))
        await asyncio.wait({waiting, asyncio.ensure_future(over.wait())}, return_when=asyncio.FIRST_COMPLETED)
        response = waiting.result() if waiting.done() else b""
    writer.transport.abort()
    return response


async def test_strangers_neither_fill_the_memory_nor_hide_a_model(tmp_path: Path) -> None:
    """One address with 80 large nodes and unfinished frames on all links, another with a gigabyte of unfinished bodies: links,
    asks and bytes are bounded, the lists stay readable page by page, and an honest chat is answered meanwhile.
    """
    body = {"model": "bench", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}
    async with (
        processes.upstream() as mock,
        processes.market(tmp_path / "market", mock) as site,
        aiohttp.ClientSession() as session,
    ):

        async def chat() -> int:
            async with session.post(f"{site.gateway}/v1/chat/completions", json=body) as answer:
                await answer.read()
                return answer.status

        assert await chat() == 200
        before = processes.rss_mib(site.pids["coordinator"])
        fat = [Spec(features=("\x01" * 36,) * 64)] * 4
        joined = await _outcomes(lambda: _join(site, "127.0.0.2", fat), NODES)
        assert len(joined) == LINKS
        for spec in (Spec(features=("f" * 1_024,) * 1_000), Spec(features=("\u0001" * 1_024,) * 1_024)):
            with contextlib.suppress(ConnectionClosed):
                await _join(site, "127.0.0.3", [spec])
                raise AssertionError("an ask of megabytes was taken")
        for socket in joined:
            socket.transport.write(b"\x82\xff" + UNFINISHED.to_bytes(8, "big") + bytes(UNFINISHED // 2))
        over, port = asyncio.Event(), int(site.coordinator.rpartition(":")[2])
        bodies = [asyncio.create_task(_unfinished_body(port, "127.0.0.4", over)) for _ in range(40)]
        await asyncio.sleep(5)
        grown = processes.rss_mib(site.pids["coordinator"]) - before
        after, pages, total = "", 0, 0
        while after is not None:
            query = {"model": "bench", "after": after}
            async with session.get(f"{site.coordinator}/v1/asks", params=query) as answer:
                data = await answer.read()
            assert len(data) < (1 << 20) + 2 * MAX_ASK_BYTES
            page = loads(data, "page")
            pages, total, after = pages + 1, total + len(page["asks"]), page["next"]
        assert (total, pages > 3) == (4 * LINKS + 1, True)
        served = await chat()
        over.set()
        responses = await asyncio.gather(*bodies)
        for socket in joined:
            socket.transport.abort()
    assert served == 200
    assert sum(b"429" in response for response in responses) >= 40 - 4 - 1, "an address has 128 MiB of bodies: four of these"
    assert grown < GROWTH_MIB + 128, f"{grown:.0f} MiB"

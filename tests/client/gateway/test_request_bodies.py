"""The gateway bounds what callers make it hold: request bodies, model lists, and answers that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from starlette.types import Message

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.gateway import request_bodies
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.request_bodies import RequestBodies, with_send_timeout
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal, Unavailable
from tallystick.runtime.http_direct import ClientStalled
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, STREAM, FakeMarket, Session, event, eventually
from tests.virtual_time import on_virtual_time


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[tuple[int, Market]]:
    """A gateway's port, and its market."""
    async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
        yield port, market


async def post(port: int, body: bytes, declared: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request whose body may be incomplete."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {declared}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_unfinished_bodies_do_not_fill_the_memory(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Beyond max_total_body_bytes further requests are refused as retryable; released bytes are free again."""
    small = replace(config, max_body_bytes=100_000, max_total_body_bytes=250_000)
    async with gateway(fake, wallet, small) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        held = [await post(port, b"x" * 80_000, 99_999) for _ in range(3)]

        async def full() -> bool:
            answer = await http.post(CHAT, json=BODY | {"user": "u" * 20_000})
            return answer.status_code == 503 and "max_total_body_bytes" in answer.text

        await eventually(full)
        assert (await http.post(CHAT, json=BODY)).status_code == 200, "small ones still fit"
        for _, writer in held:
            writer.close()

        async def free() -> bool:
            return (await http.post(CHAT, json=BODY | {"user": "u" * 20_000})).status_code == 200

        await eventually(free)


@pytest.mark.parametrize("size", [100, 101])
async def test_a_body_counts_until_its_request_is_over(size: int) -> None:
    """A body counts inside the block, however it ends, and not afterwards; limits are inclusive."""
    rooms = RequestBodies(100, 150)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"x" * size, "more_body": False}

    if size > 100:
        with pytest.raises(Refusal) as caught:
            async with rooms.read(receive):
                raise AssertionError("read")
        assert caught.value.code is Code.BODY_TOO_LARGE
    else:
        async with rooms.read(receive) as body:
            assert (body, rooms.held) == (b"x" * 100, 100)
            with pytest.raises(Unavailable):
                async with rooms.read(receive):
                    raise AssertionError("read")
        for error in (TimeoutError, RuntimeError):
            with pytest.raises(error):
                async with rooms.read(receive):
                    raise error
    assert rooms.held == 0


@on_virtual_time
async def test_a_slow_or_incomplete_body_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """After BODY_TIMEOUT_SECONDS a body is refused; a caller that disconnects holds nothing."""
    monkeypatch.setattr(request_bodies, "BODY_TIMEOUT_SECONDS", 0.05)
    rooms = RequestBodies(100, 150)

    async def trickle() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Refusal) as caught:
        async with rooms.read(trickle):
            raise AssertionError("read")
    assert (caught.value.code, rooms.held) == (Code.TIMED_OUT, 0)
    events: list[Message] = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x", "more_body": True}]

    async def leave() -> Message:
        return events.pop()

    async with rooms.read(leave) as body:
        assert body is None
    assert rooms.held == 0


@on_virtual_time
async def test_a_caller_that_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that reads nothing for SEND_TIMEOUT_SECONDS is disconnected."""
    monkeypatch.setattr(request_bodies, "SEND_TIMEOUT_SECONDS", 0.02)
    taken: list[Message] = []

    async def stuck(message: Message) -> None:
        taken.append(message)
        await asyncio.sleep(len(taken) - 1)

    send = with_send_timeout(stuck)
    await send({"type": "http.response.start"})
    with pytest.raises(ClientStalled):
        await send({"type": "http.response.body"})


async def test_a_stream_that_nobody_reads_ends_its_job(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If nobody reads a stream, its job is cancelled and its connection closed."""
    monkeypatch.setattr(request_bodies, "SEND_TIMEOUT_SECONDS", 0.3)

    async def pours(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        while not session.cancelled.is_set():
            await session.chunk(event("word " * 10_000))
        await session.chunk(b"", last=True)

    fake.script = pours
    quick = replace(config, cancel_seconds=1)
    async with gateway(fake, wallet, quick) as (port, market):
        body = httpx.Request("POST", "http://x", json=STREAM).content
        _, writer = await post(port, body, len(body))
        await eventually(lambda: market.running == 1)
        await eventually(lambda: bool(fake.cancels))
        await eventually(lambda: market.running == 0)
        writer.close()


async def test_callers_share_one_model_list_request(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Concurrent callers cause one request to the coordinator, also if some disconnect; later callers cause another."""
    calls = [0]

    async def before_models() -> None:
        calls[0] += 1
        await asyncio.sleep(0.5)

    fake.before_models = before_models
    async with gateway(fake, wallet, config) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        tasks = [asyncio.create_task(http.get("/v1/models")) for _ in range(20)]
        await eventually(lambda: calls[0] == 1)
        tasks[0].cancel()
        answers = await asyncio.gather(*tasks[1:])
        assert {answer.status_code for answer in answers} == {200}
        assert calls == [1]
        assert (await http.get("/v1/models")).status_code == 200
        assert calls == [2]


def test_body_limits_are_consistent() -> None:
    """A total body limit below the limit of one body is refused."""
    assert ClientConfig().max_total_body_bytes == 256 * MIB
    assert ClientConfig(max_body_bytes=7, max_total_body_bytes=7).max_body_bytes == 7
    for max_body, max_total in ((8, 7), (0, 7), (0, 0), (-1, -1)):
        with pytest.raises(BadMessage, match="max_total_body_bytes"):
            ClientConfig(max_body_bytes=max_body, max_total_body_bytes=max_total)

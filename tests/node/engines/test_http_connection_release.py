"""When a response gives its connection back: held, released, discarded, and followed by bytes that nobody asked for."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from node.engines.http_connection import HttpExchange, MalformedResponse
from tests.node.engines.connection_bench import CHUNKED, HEAD, SIZED, Bench


@pytest.mark.parametrize("ends", [True, False])
async def test_the_rest_of_a_response_is_discarded(*, ends: bool) -> None:
    """A response that is nearly over may end after its reader left, and its connection serves again; else it is closed."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(CHUNKED + b"4\r\nfour\r\n")
    with await asking as exchange:
        assert await exchange.readany() == b"four"
        exchange.finish_soon(60 if ends else 0.001)
    assert not bench.freed
    assert not bench.transport.closing
    if ends:
        bench.connection.data_received(b"2\r\n\r\n\r\n0\r\n\r\n")
        assert bench.freed == [bench.connection]
    else:
        async with asyncio.timeout(60):
            await bench.transport.closed.wait()
        assert not bench.freed


async def held_past_the_timer(*pieces: bytes, before: bool = True) -> tuple[Bench, HttpExchange]:
    """A response whose reader holds it past the timer of `finish_soon`. `before`: whether these pieces come before the timer."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(CHUNKED + b"4\r\nfour\r\n")
    exchange = await asking
    assert await exchange.readany() == b"four"
    exchange.finish_soon(0)
    if before:
        for piece in pieces:
            bench.connection.data_received(piece)
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0.01, passed.set)  # timers fire in the order of their times
    await passed.wait()
    return bench, exchange


@pytest.mark.parametrize("releases", [1, 2, 3])
async def test_a_held_response_keeps_its_connection_until_it_is_released(releases: int) -> None:
    """The timer gives no connection back that a reader still holds, and a late release takes none from the next request."""
    bench, exchange = await held_past_the_timer(b"0\r\n\r\n")
    assert not bench.freed
    exchange.release()
    assert bench.freed == [bench.connection]
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(CHUNKED + b"4\r\nfour\r\n")
    second = await asking
    for _ in range(releases):
        exchange.release()
        exchange.finish_soon(0)
    assert not bench.transport.closing
    assert await second.readany() == b"four"
    reading = asyncio.create_task(second.readany())
    await asyncio.sleep(0)
    bench.connection.connection_lost(None)
    with pytest.raises(aiohttp.ClientPayloadError):
        await asyncio.wait_for(reading, 60)
    assert bench.freed == [bench.connection]


async def test_a_released_response_leaves_the_reading_of_the_next_alone() -> None:
    """Bytes that a reader takes late resume nothing: the connection waits for the reader of another response."""
    bench = Bench()
    exchange, _ = await bench.ask(SIZED)
    exchange.release()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + bytes(200_000))
    second = await asking
    exchange.is_paused = True
    exchange.finish_soon(0)
    exchange.add_body(b"x")
    exchange.fail(MalformedResponse("late"))
    exchange.begin()
    assert bench.transport.paused
    assert not bench.transport.closing
    second.release()


@pytest.mark.parametrize("late", [b"", b"0\r\n\r\n", b"4\r\nmore\r\n"])
async def test_a_held_response_that_does_not_end_in_time(late: bytes) -> None:
    """The timer closes its connection at once. The reader sees an error, and its release frees nothing."""
    bench, exchange = await held_past_the_timer(late, before=False)
    assert bench.transport.closing
    with pytest.raises(aiohttp.ClientPayloadError, match="in time"):
        await asyncio.wait_for(exchange.readany(), 60)
    bench.connection.connection_lost(None)
    exchange.release()
    assert not bench.freed


async def test_a_rest_that_fills_the_buffer_is_read_on() -> None:
    """A reader that leaves the rest of a body does not stop the connection from reading to the end of it."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n" + bytes(200_000))
    with await asking as exchange:
        assert bench.transport.paused
        exchange.finish_soon(60)
        assert not bench.transport.paused
    bench.connection.data_received(bytes(200_000))
    assert bench.freed == [bench.connection]


@pytest.mark.parametrize("size", range(1, len(SIZED), 5))
async def test_bytes_after_an_answer_end_the_connection(size: int) -> None:
    """A second answer, or the start of one, ends the connection at once, even while the reader holds the first."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(SIZED)
    exchange = await asking
    bench.connection.data_received(SIZED[:size])
    assert bench.transport.closing
    assert (await exchange.readany(), await exchange.readany()) == (b"four", b"")
    exchange.release()
    assert not bench.freed

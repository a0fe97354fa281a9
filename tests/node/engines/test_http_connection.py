"""What engines put on a connection: each response, however it is cut, and each way in which it ends."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import pytest

from node.engines.http_connection import MalformedResponse
from tests.node.engines.connection_bench import CHUNKED, HEAD, SIZED, Bench

COMPLETE = {
    "content length": SIZED,
    "chunked": CHUNKED + b"1\r\nf\r\n3\r\nour\r\n0\r\n\r\n",
    "chunked, with extensions and trailers": CHUNKED + b"4;a=b\r\nfour\r\n0\r\nx-sum: 1\r\ncontent-type: x\r\n\r\n",
    "100 continue first": b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED,
    "early hints, twice": b"HTTP/1.1 103 Early Hints\r\nlink: a\r\ncontent-length: 7\r\n\r\n" * 2 + SIZED,
    "bare line feeds": SIZED.replace(b"\r\n", b"\n"),
    "control characters in a header": SIZED.replace(b"content-length", b"x: a\x01b\xff\r\ncontent-length"),
    "no reason": b"HTTP/1.1 200\r\ncontent-length: 4\r\n\r\nfour",
    "spaces after the chunk's size": CHUNKED + b"4  \r\nfour\r\n0\r\n\r\n",
}
"""Responses with the body "four" that end by themselves, after which the connection can serve again."""

BY_CLOSING = {
    "no length": b"HTTP/1.1 200 OK\r\n\r\nfour",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\nfour",
}
"""Responses with the body "four" that end with the connection."""

CUT_OFF = {
    "short of its length": SIZED[:-1],
    "within a chunk": CHUNKED + b"4\r\nfo",
    "before the last chunk": CHUNKED + b"4\r\nfour\r\n",
    "within the trailers": CHUNKED + b"4\r\nfour\r\n0\r\nx: 1\r\n",
}

MALFORMED = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x16",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nfour",
    "negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -4\r\n\r\nfour",
    "length that is no number": b"HTTP/1.1 200 OK\r\ncontent-length: four\r\n\r\nfour",
    "huge length": b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999999\r\n\r\nfour",
    "chunk size that is no number": CHUNKED + b"zz\r\nfour\r\n",
    "huge chunk": CHUNKED + b"ffffffffffffffffff\r\nfour\r\n",
    "change of the protocol": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "status below 100": b"HTTP/1.1 099 X\r\ncontent-length: 4\r\n\r\nevil" + SIZED,
    "endless status line": b"HTTP/1.1 200 " + b"x" * 70_000,
    "endless header": b"HTTP/1.1 200 OK\r\nx: " + b"x" * 70_000,
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 12_000,
    "endless trailers": CHUNKED + b"4\r\nfour\r\n0\r\n" + b"x: y\r\n" * 30_000,
    "endless chunk extension": CHUNKED + b"4;" + b"x" * 140_000,
    "endless hints": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3_000,
}


def cuts(data: bytes) -> list[list[bytes]]:
    """The data whole, byte by byte, and in two pieces in each way."""
    return [[data], [data[at : at + 1] for at in range(len(data))], *([data[:at], data[at:]] for at in range(1, len(data)))]


@pytest.mark.parametrize("form", COMPLETE)
async def test_responses_end_by_themselves(form: str) -> None:
    """However the bytes are cut, the response is the same, and its connection serves the next request."""
    for pieces in cuts(COMPLETE[form]):
        bench = Bench()
        for count in (1, 2):
            exchange, received = await bench.ask(*pieces)
            assert (exchange.status, received) == (200, b"four")
            exchange.release()
            assert bench.freed == [bench.connection] * count
            assert bench.connection.used
            assert not bench.transport.closing


@pytest.mark.parametrize("end", [True, ConnectionResetError(104, "reset")])
@pytest.mark.parametrize("form", BY_CLOSING)
async def test_responses_end_with_their_connection(form: str, end: Exception | bool) -> None:
    """A body without a length ends where its connection does, and the connection is gone."""
    for pieces in cuts(BY_CLOSING[form]):
        bench = Bench()
        exchange, received = await bench.ask(*pieces, end=end)
        assert received == b"four"
        exchange.release()
        assert (bench.freed, bench.lost) == ([], [bench.connection])


@pytest.mark.parametrize("form", CUT_OFF)
async def test_responses_that_broke_off(form: str) -> None:
    """A body that lacks its end is an error, not a short body."""
    with pytest.raises(aiohttp.ClientPayloadError, match="within the body"):
        await Bench().ask(CUT_OFF[form], end=True)


@pytest.mark.parametrize(
    ("end", "error"), [(True, aiohttp.ServerDisconnectedError), (ConnectionResetError(104, "x"), aiohttp.ClientOSError)]
)
@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_connections_that_end_before_the_head(start: bytes, end: Exception | bool, error: type[Exception]) -> None:
    """The client learns that no response came, so that it can try another connection."""
    with pytest.raises(error):
        await Bench().ask(start, end=end)


@pytest.mark.parametrize("form", MALFORMED)
async def test_malformed_responses(form: str) -> None:
    """Bytes that are no response end it at once, and the connection with it; nothing of them is quoted."""
    data = MALFORMED[form]
    for size in (1_000, 66_000):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        bench = Bench()
        with pytest.raises(MalformedResponse) as caught:
            await bench.ask(*pieces)
        assert bench.transport.closing
        assert "SSH" not in str(caught.value)


@pytest.mark.parametrize("status", [204, 304])
async def test_statuses_without_a_body(status: int) -> None:
    """These end with their head, whatever they say of a length."""
    bench = Bench()
    exchange, received = await bench.ask(b"HTTP/1.1 %d X\r\ncontent-length: 4\r\n\r\n" % status)
    assert (exchange.status, received) == (status, b"")
    exchange.release()
    assert bench.freed


@pytest.mark.parametrize(
    "response",
    [
        SIZED.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"),
        SIZED.replace(b"HTTP/1.1", b"HTTP/1.0"),
        SIZED + b"x",
        SIZED + SIZED,
        CHUNKED + b"4\r\nfour\r\n0\r\n\r\n" + SIZED,
    ],
)
async def test_connections_that_serve_once(response: bytes) -> None:
    """A connection that its engine closes, or on which more came than was asked for, serves no other request."""
    bench = Bench()
    exchange, received = await bench.ask(response)
    assert received == b"four"
    exchange.release()
    assert bench.transport.closing
    assert not bench.freed


async def test_http_1_0_may_keep_a_connection() -> None:
    """An older engine says so."""
    bench = Bench()
    exchange, _ = await bench.ask(b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 4\r\n\r\nfour")
    exchange.release()
    assert bench.freed


async def test_bytes_that_nobody_asked_for() -> None:
    """They would be taken for the answer to the next request, so the connection ends."""
    bench = Bench()
    exchange, _ = await bench.ask(SIZED)
    exchange.release()
    bench.connection.data_received(SIZED)
    assert bench.transport.closing
    assert not bench.connection.is_open


async def test_headers() -> None:
    """Names are in lower case, repeated values are joined, and trailers are no headers."""
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream; charset=x\r\nA: 1\r\na: 2\r\nx: \xff\r\nTransfer-Encoding: chunked"
    )
    exchange, _ = await Bench().ask(head + b"\r\n\r\n0\r\na: 3\r\n\r\n")
    assert exchange.content_type == "text/event-stream"
    assert exchange.header("a") == "1, 2"
    assert exchange.header("b") == ""
    exchange, _ = await Bench().ask(b"HTTP/1.1 103 X\r\nretry-after: 3\r\n\r\n" + SIZED + b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n")
    assert exchange.header("retry-after") == ""
    assert exchange.header("content-length") == "4"
    exchange, _ = await Bench().ask(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert exchange.content_type == "application/octet-stream"


async def test_a_body_that_nobody_takes_is_not_read() -> None:
    """The engine must wait for a slow reader; reading goes on once the body was taken."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 400000\r\n\r\n")
    exchange = await asking
    bench.connection.data_received(bytes(100_000))
    assert not bench.transport.paused
    bench.connection.data_received(bytes(100_000))
    assert bench.transport.paused
    assert len(await exchange.readany()) == 200_000
    assert not bench.transport.paused
    bench.connection.data_received(bytes(200_000))
    assert bench.transport.paused
    await exchange.readany()
    exchange.release()
    assert not bench.transport.paused
    assert bench.freed


async def test_a_connection_that_is_not_read_serves_no_more() -> None:
    """Behind a body that nobody took, bytes may wait that would answer the next request."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n" + bytes(200_000))
    (await asking).release()
    assert bench.transport.closing
    assert not bench.freed


@pytest.mark.parametrize("buffered", [0, 1])
async def test_a_reader_that_leaves_stops_the_engine(buffered: int) -> None:
    """The connection of a response that has not ended is closed, without sending the rest of the request."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    bench.connection.data_received(SIZED[:-1])
    with await asking:
        bench.transport.buffered = buffered
    assert bench.transport.closing
    assert bench.transport.aborted
    assert not bench.freed


async def test_a_cancelled_request_closes_its_connection() -> None:
    """Its response must not reach the next request."""
    bench = Bench()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"", lambda: None))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    assert bench.transport.closing
    bench.connection.data_received(SIZED)
    bench.connection.connection_lost(None)
    assert bench.lost


async def test_a_request_has_left_once_its_body_is_written() -> None:
    """A large body counts as sent when the operating system has all of it, even if the response came before."""
    bench = Bench()
    sent: list[str] = []
    bench.connection.pause_writing()
    asking = asyncio.create_task(bench.connection.send(HEAD, b"body", lambda: sent.append("sent")))
    await asyncio.sleep(0)
    assert (bytes(bench.transport.written), sent) == (HEAD + b"body", [])
    bench.connection.resume_writing()
    bench.connection.data_received(SIZED)
    (await asking).release()
    assert sent == ["sent"]
    bench.connection.pause_writing()
    bench.connection.resume_writing()
    assert sent == ["sent"]


async def test_an_early_answer_to_a_request_that_is_still_being_sent() -> None:
    """The response counts, and the connection ends with it."""
    bench = Bench()
    bench.connection.pause_writing()
    exchange, received = await bench.ask(SIZED, body=b"body")
    assert received == b"four"
    bench.transport.buffered = 100
    exchange.release()
    assert bench.transport.aborted


async def test_any_bytes_end_in_a_response_or_an_error() -> None:
    """Responses with random changes never leave their reader waiting, and raise nothing but errors of the client."""
    chance = random.Random(14)
    seeds = [*COMPLETE.values(), *BY_CLOSING.values(), *CUT_OFF.values(), *(data[:200] for data in MALFORMED.values())]
    outcomes = {True: 0, False: 0}
    for _ in range(3_000):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(4)))
            data = data or bytearray(b"x")
        at = chance.randrange(len(data) + 1)
        bench = Bench()
        try:
            exchange, _ = await bench.ask(bytes(data[:at]), bytes(data[at:]), end=True)
        except aiohttp.ClientError:
            outcomes[False] += 1
        else:
            exchange.release()
            outcomes[True] += 1
        assert not bench.freed
    assert min(outcomes.values()) > 300

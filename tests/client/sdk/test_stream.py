from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson
import pytest

from tallystick.client.openai.answers import MAX_EVENT_BYTES, TextDeltas
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tests.client.fake_coordinator import (
    BODY,
    CHAT,
    EVENTS,
    MESSAGES,
    STREAM,
    WORDS,
    FakeMarket,
    Session,
    event,
    eventually,
    until_cancelled,
)
from tests.client.parties import MODEL

TEXT = "".join(WORDS)


async def test_a_stream_yields_text_then_receipt(market: Market, fake: FakeMarket) -> None:
    """The text comes piece by piece; result() afterwards has the receipt and the cost."""
    stream = market.stream(MODEL, MESSAGES, max_tokens=9, tally={"label": "tests"})
    assert stream.job is None
    assert [text async for text in stream] == [*WORDS]
    result = await stream.result()
    assert result.receipt is not None
    assert (result.cost, result.receipt.message.cost, result.text) == (3, 3, "")
    assert fake.last.request == {"model": MODEL, "messages": MESSAGES, "max_tokens": 9, "stream": True}


async def test_result_alone_has_all_the_text(market: Market) -> None:
    """The result has the text that was not iterated: all of it if iteration never began."""
    assert (await market.stream(MODEL, MESSAGES).result()).text == TEXT
    async with await market.submit(CHAT, STREAM) as job:
        assert [text async for text in job.text()] == [*WORDS]
        assert (await job.result()).cost == 3


async def test_text_of_an_answer_that_is_not_streamed(market: Market) -> None:
    """The text of an answer that is not streamed comes in one piece."""
    async with await market.submit(CHAT, BODY) as job:
        assert [text async for text in job.text()] == [TEXT]


async def test_leaving_the_loop_cancels(market: Market, fake: FakeMarket) -> None:
    """Leaving the loop cancels its job, leaving a block does so at once, and cancel() returns the bill."""
    fake.script = until_cancelled
    async for _ in market.stream(MODEL, MESSAGES):
        break
    await eventually(lambda: market.running == 0)
    async with market.stream(MODEL, MESSAGES) as stream:
        assert await anext(aiter(stream)) == "on and on "
    assert market.running == 0
    stream = market.stream(MODEL, MESSAGES)
    assert await stream.cancel() is None
    await stream.start()
    await anext(aiter(stream))
    billed = await stream.cancel()
    assert billed is not None
    assert billed.cost > 0
    assert len(set(fake.cancels)) == 3


async def test_cancelling_the_task_cancels_the_job(market: Market, fake: FakeMarket) -> None:
    """Cancelling the task cancels the job, as a notebook does when a cell is stopped."""
    fake.script = until_cancelled
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in market.stream(MODEL, MESSAGES):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await eventually(lambda: market.running == 0)
    assert len(fake.cancels) == 1


async def test_an_engines_error_is_raised(market: Market, fake: FakeMarket) -> None:
    """An error answer and an error event in the stream are raised as errors that say whether to retry."""

    async def wrong(session: Session) -> None:
        await session.match()
        await session.answer(400)
        await session.chunk(b'{"error": {"message": "no such thing"}}', last=True)
        await session.finish()

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("so "))
        await session.chunk(b'data: {"error": {"message": "out of memory"}}\n\n', last=True)
        await session.finish()

    fake.script = wrong
    with pytest.raises(Refusal, match="no such thing"):
        [_ async for _ in market.stream(MODEL, MESSAGES)]
    fake.script = breaks
    texts: list[str] = []

    async def read() -> None:
        async for text in market.stream(MODEL, MESSAGES):
            texts.append(text)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(Unavailable, match="out of memory") as caught:
        await read()
    assert texts == ["so "]
    assert (caught.value.code, caught.value.fault) == (Code.ENGINE_UNAVAILABLE, Fault.ENGINE)


def _data(*documents: Any) -> bytes:
    return b"".join(b"data: " + orjson.dumps(document) + b"\n\n" for document in documents)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_deltas_do_not_depend_on_the_cuts(size: int) -> None:
    """Events of chats, completions and responses, cut anywhere, with either line end, yield only the first choice's text."""
    stream = _data(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]},
        {"choices": [{"index": 0, "delta": {"content": "grüß "}}, {"index": 1, "delta": {"content": "other"}}]},
        {"choices": [{"index": 0, "delta": {"reasoning_content": "hm", "tool_calls": []}}]},
        {"choices": [{"text": "dich "}]},
        {"type": "response.output_text.delta", "delta": "🙂"},
        {"type": "response.completed", "response": {}},
        {"choices": [], "usage": {"prompt_tokens": 1}},
        [1],
    )
    whole = b": a comment\nevent: x\n" + stream.replace(b"\n", b"\r\n") + b'data: {"choices":\ndata: []}\n\ndata: [DONE]\n\n'
    deltas = TextDeltas()
    pieces = [text for at in range(0, len(whole), size) for text in deltas.feed(whole[at : at + size])]
    assert "".join(pieces) == "grüß dich 🙂"


def test_malformed_streams_are_the_engines_fault() -> None:
    """A malformed event is the engine's fault, and an endless event is not kept."""
    with pytest.raises(BadMessage) as caught:
        TextDeltas().feed(b"data: {not json\n\n")
    assert caught.value.fault is Fault.ENGINE
    endless = TextDeltas()
    endless.feed(b"x" * MAX_EVENT_BYTES)
    with pytest.raises(BadMessage, match="event: expected at most"):
        endless.feed(b"x")

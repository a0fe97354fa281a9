"""Pieces of an answer that arrive together can be read as one; nothing is lost, added or reordered by that."""

from __future__ import annotations

import pytest

from tallystick.client.jobs.job import arrivals_of
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadMessage, BadSeal, Fault, TallyError
from tallystick.protocol.plaintext_heads import ResponseHead, dump_response_head
from tallystick.protocol.wire import Kind, pack_frame
from tests.client.fake_coordinator import CHAT, EVENTS, STREAM, WORDS, FakeMarket, Session, event

PIECES = [*map(event, WORDS), b"data: [DONE]\n\n"]


def sealed(session: Session, *pieces: bytes, last: bool = True) -> bytes:
    """The frames of an answer's head and pieces."""
    chunks = [dump_response_head(ResponseHead(200, EVENTS)), *pieces]
    frames = b""
    for number, chunk in enumerate(chunks):
        session.transcript.add(chunk)
        session.output_bytes += len(chunk)
        frames += pack_frame(Kind.CHUNK, session.sealer.seal(chunk, last=last and number == len(chunks) - 1))
    return frames


async def test_what_arrives_together_is_one_piece(fake: FakeMarket, market: Market) -> None:
    """Also with the receipt at its end. Iterating over the job itself keeps the engine's pieces apart."""

    async def at_once(session: Session) -> None:
        await session.match()
        frames = sealed(session, *PIECES)
        await session.response.write(frames + pack_frame(Kind.RECEIPT, session.bill().to_bytes()))

    fake.script = at_once
    async with await market.submit(CHAT, STREAM) as job:
        assert [piece async for piece in arrivals_of(job)] == [b"".join(PIECES)]
        assert job.receipt_accepted
        assert [piece async for piece in arrivals_of(job)] == []
    async with await market.submit(CHAT, STREAM) as job:
        assert [piece async for piece in job] == PIECES
    async with await market.submit(CHAT, STREAM) as job:
        assert (await job.result()).body == b"".join(PIECES)


@pytest.mark.parametrize("broken", ["seal", "order"])
async def test_what_came_before_a_bad_frame_is_read_first(fake: FakeMarket, market: Market, broken: str) -> None:
    """A bad frame among those that arrived together is the coordinator's fault, and ends the job after the good ones."""

    async def cheats(session: Session) -> None:
        await session.match()
        frames = sealed(session, *PIECES[:3], last=False)
        bad = bytes(64) if broken == "seal" else session.matched
        frames += pack_frame(Kind.CHUNK if broken == "seal" else Kind.MATCH, bad)
        await session.response.write(frames + sealed(session, *PIECES[3:]))
        await session.hang()

    fake.script = cheats
    async with await market.submit(CHAT, STREAM) as job:
        read: list[bytes] = []

        async def read_all() -> None:
            async for piece in arrivals_of(job):
                read.append(piece)  # noqa: PERF401 - what came before the error counts

        with pytest.raises((BadSeal, BadMessage)) as caught:
            await read_all()
        assert (b"".join(read), caught.value.fault) == (b"".join(PIECES[:3]), Fault.COORDINATOR)
        with pytest.raises(TallyError) as again:
            await job.result()
        assert again.value is caught.value

"""Pieces of an answer that arrive together can be read as one; nothing is lost, added or reordered by that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tallystick.client.coordinator.job_stream import Frame, JobStream, Sink
from tallystick.client.jobs.job import Job, arrivals_of, run_of
from tallystick.client.jobs.running_job import Outlet
from tallystick.client.ledger.schema import JobState
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


class Sinking:
    """A job's stream that gives chunks to the sink while a reader waits, as a link does."""

    def __init__(self, stream: JobStream) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, *, whole: bool = False, sink: Sink | None = None) -> list[Frame]:
        """See JobStream."""
        while True:
            frames = list(await self._stream.read(whole=whole))
            while frames and frames[0][0] is Kind.CHUNK and sink is not None and sink(frames[0][1]):
                del frames[0]
            if frames:
                return frames


class Reader:
    """Reads a job with an outlet. `log`: what came, in its order, and by which way."""

    def __init__(self, readiness: Callable[[int], bool]) -> None:
        self.log: list[tuple[str, bytes]] = []
        self.outlet = Outlet(lambda: readiness(len(self.log)), lambda piece: self.log.append(("outlet", piece)))

    @property
    def body(self) -> bytes:
        """What came."""
        return b"".join(piece for _, piece in self.log)

    @property
    def ways(self) -> set[str]:
        """The ways by which it came."""
        return {way for way, _ in self.log}

    async def read(self, job: Job) -> None:
        """Reads to the end."""
        await job.start()
        run_of(job).placed.stream = Sinking(run_of(job).placed.stream)
        async for piece in arrivals_of(job, self.outlet):
            self.log.append(("reader", piece))


@pytest.mark.parametrize(
    ("readiness", "ways"),
    [
        (lambda _: True, {"outlet"}),
        (lambda _: False, {"reader"}),
        (lambda count: count % 2 == 0, {"outlet", "reader"}),
        (lambda count: count % 3 == 2, {"outlet", "reader"}),
    ],
)
async def test_pieces_keep_their_order_whichever_way_they_go(
    fake: FakeMarket, market: Market, readiness: Callable[[int], bool], ways: set[str]
) -> None:
    """A piece goes to the outlet if that is ready, else to the reader; the receipt covers both."""

    async def one_by_one(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        for number, piece in enumerate(PIECES):
            await asyncio.sleep(0.01)  # so that few pieces arrive together
            await session.chunk(piece, last=number == len(PIECES) - 1)
        await session.response.write(pack_frame(Kind.RECEIPT, session.bill().to_bytes()))

    fake.script = one_by_one
    async with await market.submit(CHAT, STREAM) as job:
        reader = Reader(readiness)
        await reader.read(job)
        assert (reader.body, job.receipt_accepted) == (b"".join(PIECES), True)
        assert reader.ways <= ways
    known = await market.find(job.id)
    assert known is not None
    assert known.state is JobState.COMPLETED


async def test_a_bad_chunk_is_not_let_out(fake: FakeMarket, market: Market) -> None:
    """The reader gets the error after the good pieces, and what was let out counts as delivered."""

    async def cheats(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        for piece in PIECES[:2]:
            await session.chunk(piece)
        await session.send(Kind.CHUNK, bytes(64))
        await session.chunk(PIECES[2])
        await session.hang()

    fake.script = cheats
    async with await market.submit(CHAT, STREAM) as job:
        reader = Reader(lambda _: True)
        with pytest.raises(BadSeal) as caught:
            await reader.read(job)
        assert (reader.body, caught.value.fault) == (b"".join(PIECES[:2]), Fault.COORDINATOR)
        assert run_of(job).placed.response.body_bytes == len(reader.body)

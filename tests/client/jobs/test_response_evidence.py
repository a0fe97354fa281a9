"""Rows of evidence as they come with an answer: from honest providers, from dishonest ones, and from a coordinator that cuts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tallystick.client.receipts.answer_evidence import EvidenceState
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadReceipt, BadSeal, Fault
from tallystick.protocol.messages import Outcome
from tallystick.protocol.plaintext_heads import split_request
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import CHAT, EMBEDDINGS
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.types import ZERO_HASH, Hash
from tallystick.protocol.wire import Kind
from tests.client.fake_coordinator import BODY, FakeMarket, Session, completion, honest, run
from tests.client.parties import MODEL

ROWS = tuple(EvidenceRow.of(n, [(n + 7 * i, -0.5 * i) for i in range(5)]) for n in range(10))
PACKED, ROOT = pack_evidence(ROWS), evidence_root(ROWS)


def answers(*chunks: bytes, root: Hash = ROOT) -> object:
    """A provider that sends these chunks of rows before its last chunk, and commits to this root."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        for chunk in chunks:
            await session.evidence(chunk)
        await session.chunk(completion("x"), last=True)
        await session.finish(evidence_root=root)

    return script


@pytest.mark.parametrize("chunks", [(PACKED,), (PACKED[:31], PACKED[31:40], b"", PACKED[40:])])
async def test_rows_come_beside_the_answer(market: Market, fake: FakeMarket, chunks: Sequence[bytes]) -> None:
    """However they are split; the answer, its proof and its price are as ever."""
    fake.script = answers(*chunks)  # type: ignore[assignment]
    job = await market.submit(CHAT, BODY, keep=True)
    result = await job.result()
    assert (result.evidence, job.evidence, result.answer_evidence.state) == (ROWS, ROWS, EvidenceState.CHECKED)
    assert (result.body, result.cost) == (completion("x"), 3)
    assert result.proof is not None
    result.proof.check()
    head, _ = split_request(result.proof.request)
    assert head.evidence


async def test_rows_are_asked_for_where_there_are_any(market: Market, fake: FakeMarket) -> None:
    """A route without generated text has no rows, and one request looks like the other."""
    del fake
    job = await market.submit(EMBEDDINGS, {"model": MODEL, "input": "a"}, keep=True)
    result = await job.result()
    assert result.proof is not None
    assert not split_request(result.proof.request)[0].evidence


@pytest.mark.parametrize(
    ("chunks", "root"),
    [
        ((PACKED,), Hash(b"x" * 32)),
        ((PACKED,), ZERO_HASH),
        ((PACKED[:-1],), ROOT),
        ((PACKED, PACKED), ROOT),
        ((b"\xff" * 40_000,), ROOT),
        (tuple(PACKED * 200 for _ in range(20)), ROOT),
    ],
)
async def test_false_rows_count_against_their_provider(
    market: Market, fake: FakeMarket, chunks: Sequence[bytes], root: Hash
) -> None:
    """The receipt is evidence, in a file as well, and the provider gets no further orders; memory stays bounded."""
    fake.script = answers(*chunks, root=root)  # type: ignore[assignment]
    with pytest.raises(BadReceipt, match="the provider sent false evidence") as caught:
        await run(market)
    assert caught.value.fault is Fault.PROVIDER
    alice, bob = fake.providers
    (evidence,) = await market.evidence()
    assert (evidence.provider, evidence.receipt.message.evidence_root) == (alice.address, root)
    fake.script = honest
    assert (await (await market.submit(CHAT, BODY)).result()).provider == bob.address


async def test_rows_that_were_not_sent(market: Market, fake: FakeMarket) -> None:
    """A provider whose link had no room keeps them for a day: that is no objection."""
    fake.script = answers()  # type: ignore[assignment]
    result = await (await market.submit(CHAT, BODY)).result()
    assert (result.evidence, result.answer_evidence.state) == ((), EvidenceState.NOT_SENT)
    assert await market.evidence() == []


async def test_rows_of_a_cancelled_answer(market: Market, fake: FakeMarket) -> None:
    """They come with the chunk that closes it."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(b"data: x\n\n")
        await session.cancelled.wait()
        await session.evidence(PACKED)
        await session.chunk(b"", last=True)
        await session.finish(Usage(8, 0, 3), Outcome.CLIENT_CANCELLED, evidence_root=ROOT)

    fake.script = script
    job = await market.submit(CHAT, BODY | {"stream": True})
    await job.start()
    result = await job.cancel()
    assert result is not None
    assert result.evidence == ROWS


async def test_a_coordinator_cannot_leave_rows_out(market: Market, fake: FakeMarket) -> None:
    """A chunk of rows is as much part of the stream as any other: the next one does not open without it."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        session.sealer.seal_evidence(PACKED)  # dropped on its way
        await session.chunk(completion("x"), last=True)

    fake.script = script
    with pytest.raises(BadSeal) as caught:
        await run(market)
    assert caught.value.fault is Fault.COORDINATOR
    assert await market.evidence() == []


async def test_a_coordinator_cannot_accuse_a_provider_of_rows_that_it_cut_off(market: Market, fake: FakeMarket) -> None:
    """Without the last chunk, rows may be missing through the coordinator's doing, and nobody else is to blame."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.evidence(PACKED[:31])
        session.transcript.add(completion("x"))  # more rows and the last chunk were dropped on their way
        await session.finish(evidence_root=ROOT)

    fake.script = script
    with pytest.raises(Exception, match=r"last chunk|cut off"):
        await run(market)
    assert [known.reason for known in await market.evidence()] == []


async def test_nobody_but_the_client_can_read_the_rows(market: Market, fake: FakeMarket) -> None:
    """What the coordinator forwards has nothing of them but their size, padded as any chunk."""
    frames: list[bytes] = []

    async def script(session: Session) -> None:
        send = session.send

        async def record(kind: Kind, payload: bytes = b"") -> None:
            frames.append(payload)
            await send(kind, payload)

        session.send = record  # type: ignore[method-assign]
        await answers(PACKED)(session)  # type: ignore[operator]

    fake.script = script
    await run(market)
    assert not any(row.pack() in frame for frame in frames for row in ROWS)
    assert {len(frame) for frame in frames if frame[:1] == b"\2"} == {256 + 1 + 16}
    assert 128 < len(PACKED) < 256

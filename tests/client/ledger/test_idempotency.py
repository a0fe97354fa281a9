"""Idempotency keys at the client: one job per key, clear errors, bounded memory. tests/e2e/test_sigkill.py proves recovery
after kills.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.jobs.result import StreamInterrupted
from tallystick.client.ledger import idempotency
from tallystick.client.ledger.idempotency import IdempotencyKey, batch_key, scope_key
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.sdk.market import Market, maintenance_of
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import JobId
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, honest


async def _ask(market: Market, key: str, **changes: object) -> bytes:
    async with await market.submit(CHAT, BODY | changes, key=key) as job:
        return (await job.result()).body


async def test_a_key_is_one_job(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A repeated request, also from another process, reports the key's job and its cost, and orders nothing."""
    async with Market(fake.url, wallet, config) as market:
        assert await _ask(market, "mine")
    async with Market(fake.url, wallet, config) as market:
        with pytest.raises(Refusal, match=r"ended as completed, and [0-9.]+ dollars were billed") as caught:
            await _ask(market, "mine")
    assert (caught.value.code, len(fake.submissions)) == (Code.ORDER_REPLAYED, 1)


async def test_the_keys_of_one_batch(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """They are found by the batch's id: no other batch's, also if its id begins alike, and no caller's."""
    own = [batch_key("batch_1", line, 0) for line in (1, 2)]
    async with Market(fake.url, wallet, config) as market:
        for key in (*own, batch_key("batch_12", 1, 0), "batch_1:3:0"):
            await _ask(market, key)
        assert await maintenance_of(market).ledger.batch_keys("batch_1") == set(own)


async def test_another_body_under_a_key(market: Market, fake: FakeMarket) -> None:
    """A different request under a used key is refused with the reason."""
    await _ask(market, "mine")
    with pytest.raises(Refusal, match="'mine' was already used for another request") as caught:
        await _ask(market, "mine", max_tokens=7)
    assert (caught.value.status, len(fake.submissions)) == (409, 1)


async def test_a_refused_job_frees_its_key(market: Market, fake: FakeMarket) -> None:
    """If the coordinator did not admit a job, the next request with its key is a new job."""
    fake.refusals = [Unavailable(Code.COORDINATOR_UNAVAILABLE, "stopping")]
    with pytest.raises(Unavailable, match="stopping"):
        await _ask(market, "mine")
    assert await _ask(market, "mine")


@pytest.mark.parametrize("code", [Code.NODE_BUSY, Code.NO_PROVIDER])
async def test_a_job_that_no_provider_took_frees_its_key(market: Market, fake: FakeMarket, code: Code) -> None:
    """A job that waited for a slot in vain never ran: the next request with its key is a new job, which may find one."""

    async def wait_in_vain(session: Session) -> None:
        await session.fail(Unavailable(code, "no slot became free within 1 s"))

    fake.script = wait_in_vain
    with pytest.raises(Unavailable, match="no slot became free"):
        await _ask(market, "mine")
    fake.script = honest
    assert await _ask(market, "mine")
    assert len({submission.job for submission in fake.submissions}) > 1


@pytest.mark.parametrize("released", [True, False])
async def test_a_busy_provider_that_may_still_bill_keeps_the_key(market: Market, fake: FakeMarket, released: bool) -> None:
    """A provider that had the job and says that it is busy frees the key with its receipt at no cost. Without it, the provider
    could collect on the order, so that a second job could be paid for too.
    """

    async def busy(session: Session) -> None:
        await session.match()
        if released:
            await session.void()
        await session.fail(Unavailable(Code.NODE_BUSY, "all slots are taken", fault=Fault.PROVIDER))

    fake.script = busy
    with pytest.raises(Unavailable, match="all slots are taken"):
        await _ask(market, "mine")
    fake.script = honest
    if released:
        assert await _ask(market, "mine")
    else:
        with pytest.raises(TallyError):
            await _ask(market, "mine")
    assert len({submission.job for submission in fake.submissions}) == 1 + released


async def test_a_lost_job_that_may_still_be_billed_keeps_its_key(market: Market, fake: FakeMarket) -> None:
    """A provider had it, and the coordinator forgot it: its order may be collected on, so that no second job is bought. Once the
    coordinator has the provider's receipt at no cost, the key buys an answer.
    """

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.cut()

    fake.script = breaks
    with pytest.raises(StreamInterrupted):
        await _ask(market, "mine")
    ((job, session),) = fake.sessions.items()
    fake.sessions.clear()
    fake.script = honest
    for _ in range(2):
        fake.refusals = [Refusal(Code.ORDER_EXPIRED, "too late")]
        with pytest.raises(Unavailable, match="may still bill it"):
            await _ask(market, "mine")
    assert {submission.job for submission in fake.submissions} == {job}
    session.release(Outcome.PROVIDER_ERROR)
    fake.sessions[job] = session
    assert await _ask(market, "mine")
    assert len({submission.job for submission in fake.submissions}) == 2


async def test_a_billed_job_whose_stream_broke(market: Market, fake: FakeMarket) -> None:
    """The key still brings its answer, at no further cost, so the request may be sent again."""

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(b"half ")
        session.transcript.add(b"an answer")  # the last chunk is lost
        session.bill()
        await session.cut()

    fake.script = breaks
    with pytest.raises(StreamInterrupted) as caught:
        await _ask(market, "mine")
    assert caught.value.receipt is not None
    assert caught.value.receipt.message.cost
    assert caught.value.retry


async def test_a_job_that_an_older_release_submitted(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Its bytes would be refused now. The caller learns what became of the job, and nothing is ordered twice."""
    async with Market(fake.url, wallet, config) as market:
        assert await _ask(market, "mine")
    with closing(sqlite3.connect(config.ledger_path(wallet.address))) as database:
        database.execute("UPDATE keys SET header = ?", (b"\0\0\0\2{}",))
        database.commit()
    async with Market(fake.url, wallet, config) as market:
        with pytest.raises(Refusal, match=r"ended as completed, and [0-9.]+ dollars were billed"):
            await _ask(market, "mine")
        fake.sessions.clear()
        with pytest.raises(Refusal, match=r"ended as completed, and [0-9.]+ dollars were billed"):
            await _ask(market, "mine")
    with closing(sqlite3.connect(config.ledger_path(wallet.address))) as database:  # as if no provider had ever had it
        database.execute("DELETE FROM receipts")
        database.execute("UPDATE orders SET job_state = 'lost'")
        database.commit()
    async with Market(fake.url, wallet, config) as market:
        with pytest.raises(Unavailable, match="signed by another release and never arrived; send it again"):
            await _ask(market, "mine")
        assert len(fake.submissions) == 1
        assert await _ask(market, "mine"), "the key is free"
    assert len(fake.submissions) == 2


async def test_errors_show_the_key_that_the_caller_sent(market: Market) -> None:
    """Errors about a key of one of a gateway's callers leave out the namespace that the gateway put before it."""
    await _ask(market, scope_key("team", "mine"))
    with pytest.raises(Refusal, match=r"^idempotency key: 'mine' was already used"):
        await _ask(market, scope_key("team", "mine"), max_tokens=7)
    with pytest.raises(BadMessage, match=r"^idempotency key: expected 1 to 250 printable characters, got 251: 'xx"):
        await _ask(market, scope_key("team", "x" * 251))


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb"])
async def test_invalid_keys(market: Market, fake: FakeMarket, key: str) -> None:
    """An invalid key is refused before anything is signed."""
    with pytest.raises(BadMessage, match="idempotency key"):
        await _ask(market, key)
    assert not fake.submissions


async def test_keys_are_forgotten(tmp_path: Path, wallet: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired keys, and the oldest ones above the limit, are forgotten; a key's job never changes."""
    monkeypatch.setattr(idempotency, "MAX_KEYS", 2)
    ledger = await Ledger.open(tmp_path / "client.db", wallet.address)
    for number in range(4):
        made = IdempotencyKey(str(number), "f", JobId(bytes([number]) * 16), b"k", b"h", number)
        assert await ledger.store_key(made, 0) == made
    other = IdempotencyKey("3", "f", JobId(b"o" * 16), b"k", b"h", 9)
    assert (await ledger.store_key(other, 0)).job == JobId(b"\3" * 16)
    assert [await ledger.find_key(key) is not None for key in "0123"] == [False, False, False, True]
    await ledger.close()


async def test_a_job_frees_its_own_key_alone(tmp_path: Path, wallet: Signer) -> None:
    """A process that learns late that a job cost nothing leaves the key to the job that another process placed since."""
    ledger = await Ledger.open(tmp_path / "state.db", wallet.address)
    lost, newer = (IdempotencyKey("k", "f", JobId(bytes([at]) * 16), b"c" * 32, b"h", 1) for at in (1, 2))
    assert await ledger.store_key(lost, 0) == lost
    assert await ledger.store_key(newer, 0) == lost, "a key has one job"
    await ledger.forget_key_of(lost.job)
    assert await ledger.store_key(newer, 0) == newer
    await ledger.forget_key_of(lost.job)
    assert await ledger.find_key("k") == newer
    await ledger.close()

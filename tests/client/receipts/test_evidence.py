"""Dishonest receipts in evidence files, which convince others or say that they cannot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.client.config import ClientConfig, TokenAudit
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.evidence import EvidenceFile
from tallystick.client.receipts.proof import Proof
from tallystick.client.receipts.token_audit import recount_with
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSignature, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.plaintext_heads import RequestHead, join_request
from tallystick.protocol.pricing import Usage
from tallystick.protocol.sealing import Transcript, commit_request
from tallystick.protocol.types import Amount
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session, completion, honest
from tests.client.parties import ALICE, DOMAIN, MODEL, NOW, NOW_S, PAYER, bill, place, signer
from tests.client.receipts.test_token_audit import tokenizer

__all__ = ["tokenizer"]


def _file(config: ClientConfig, market: Market) -> EvidenceFile:
    """Returns the newest evidence file."""
    folder = config.ledger_path(market.address).parent / "evidence"
    path = max(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert path.stat().st_mode & 0o777 == 0o600
    return EvidenceFile.from_json(json.loads(path.read_bytes()))


async def _cheated(market: Market, fake: FakeMarket, usage: Usage = Usage(10, 0, 5), **changes: Any) -> str:  # noqa: B008 - frozen
    """Runs a job with this kind of dishonest receipt. Returns the client's reason."""

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion("one two three four"), last=True)
        await session.finish(usage, **changes)

    fake.script = script
    with pytest.raises(BadReceipt) as caught:
        async with await market.submit(CHAT, BODY, keep=True) as job:
            await job.result()
    return str(caught.value)


async def _honest(market: Market, fake: FakeMarket) -> None:
    async with await market.submit(CHAT, BODY) as job:
        await job.result()


async def test_evidence_from_signatures_alone(market: Market, fake: FakeMarket, config: ClientConfig) -> None:
    """A wrong price convinces anyone; a forged file is refused at once."""
    why = await _cheated(market, fake, cost=Amount(9), cumulative_cost=Amount(9))
    file = _file(config, market)
    assert file.proof is None, "signatures say enough, and nobody has to see the prompt"
    assert file.reason == why
    assert [finding.check for finding in file.check()] == ["signatures", "contradiction"]
    assert file.equivocation is None
    assert EvidenceFile.from_json(json.loads(file.dumps())) == file
    forged = replace(file, receipt=replace(file.receipt, message=replace(file.receipt.message, cost=Amount(8))))
    with pytest.raises(BadSignature):
        forged.check()
    with pytest.raises(BadMessage, match=r"evidence\.terms"):
        replace(file, terms=replace(file.terms, max_output_tokens=1)).check()


def test_honest_parts_are_no_evidence() -> None:
    """An honest receipt with another order, or with a stranger's, is no evidence."""
    first, second = place(now_ns=NOW), place(now_ns=NOW + 1)
    receipt = ALICE.signer.sign(bill(first), DOMAIN)
    eve = signer("eve")
    stranger = eve.sign(replace(first.order.message, payer=eve.address), DOMAIN)
    for order, terms in ((second.order, second.terms), (stranger, first.terms)):
        file = EvidenceFile(DOMAIN, "lies", order, terms, receipt, (), None)
        with pytest.raises(BadMessage, match="expected a receipt for this order"):
            file.check()
    with pytest.raises(BadReceipt, match="nothing in this file proves"):
        EvidenceFile(DOMAIN, "lies", first.order, first.terms, receipt, (), None).check()


def test_made_up_files(tokenizer: Path) -> None:
    """A missing answer and too deeply nested JSON cause no crash."""
    placed = place(now_ns=NOW)
    key, request = b"k" * 32, join_request(RequestHead(CHAT), b'{"model":"m","messages":[]}')
    terms = replace(placed.terms, request_commitment=commit_request(key, placed.terms.job, request))
    order = PAYER.sign(replace(placed.order.message, terms_hash=terms.struct_hash()), DOMAIN)
    bare = bill(
        PlacedOrder(order, terms),
        Usage(0, 0, 0),
        Outcome.CLIENT_CANCELLED,
        result_commitment=Transcript(key, order.digest).commitment,
    )
    receipt = ALICE.signer.sign(bare, DOMAIN)
    file = EvidenceFile(DOMAIN, "x", order, terms, receipt, (), Proof(DOMAIN, order, terms, receipt, key, request, ()))
    with pytest.raises(BadReceipt, match="nothing in this file proves"):
        file.check(recount_with(tokenizer))
    deep: Any = 0
    for _ in range(300):
        deep = [deep]
    with pytest.raises(BadMessage):
        EvidenceFile.from_json(json.loads(file.dumps()) | {"proof": {"tallystick": "proof/1", "x": deep}})


async def test_receipts_that_contradict_each_other(market: Market, fake: FakeMarket, config: ClientConfig) -> None:
    """The file contains the other signed receipts; two of one seq cost the provider its stake."""
    await _honest(market, fake)
    await _cheated(market, fake, seq=1)
    file = _file(config, market)
    assert file.equivocation is not None
    assert "equivocation" in file.check()[1].found
    (other,) = file.others
    with pytest.raises(BadSignature):
        replace(file, others=(replace(other, signature=file.receipt.signature),)).check()


async def test_excluded_receipts_are_named_and_can_be_accepted(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path
) -> None:
    """A refusal names the receipts behind it. A receipt refused by a count alone, for example with a wrong tokenizer, can be
    accepted later and is recorded then.
    """
    fake.providers = fake.providers[:1]
    address = fake.providers[0].address
    wrong = replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer, flag_percent=0, refuse_percent=0),))
    async with Market(fake.url, wallet, wrong) as market:
        await _cheated(market, fake, Usage(10, 0, 90))
    async with Market(fake.url, wallet, config) as market:
        fake.script = honest
        with pytest.raises(Unavailable, match="this wallet excludes 1 providers, tally receipt evidence"):
            await _honest(market, fake)
        assert await market._ledger.unblock(address, NOW_S)
        assert not await market._ledger.unblock(address, NOW_S)
        await _honest(market, fake)
        tab = await market.tab(address)
        assert (tab.accepted, tab.blocked_reason) == (fake.providers[0].tab.cumulative, "")
        assert len(await market.evidence()) == 1, "what was found stays"


async def test_unblocking_does_not_record_a_dishonest_receipt(market: Market, fake: FakeMarket) -> None:
    """After unblocking, the provider may get orders again, and its dishonest receipt counts for nothing."""
    await _cheated(market, fake, cost=Amount(9), cumulative_cost=Amount(9))
    address = fake.providers[0].address
    assert await market._ledger.unblock(address, NOW_S)
    tab = await market.tab(address)
    assert (tab.accepted, tab.total, tab.blocked_reason) == (0, 0, "")


async def test_evidence_from_signed_bytes(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With stored plaintexts that the provider signed, more tokens than bytes are proven to anyone."""
    async with Market(fake.url, wallet, config) as market:
        why = await _cheated(market, fake, Usage(10, 0, 100 + 64 + 1_000_000), cost=Amount(0))
        assert "outputTokens" in why
    async with Market(fake.url, wallet, config) as market:
        why = await _cheated(market, fake, Usage(10_000, 0, 5))
        file = _file(config, market)
        assert file.proof is not None
        assert "inputTokens" in why
        assert "inputTokens" in file.check()[1].found
        with pytest.raises(BadReceipt, match="nothing in this file proves"):
            replace(file, proof=None).check()


async def test_evidence_that_others_cannot_check(market: Market, fake: FakeMarket, config: ClientConfig) -> None:
    """An answer that differs from the signed one convinces nobody else, since the payer could have changed it."""
    await _cheated(market, fake, result_commitment=bytes(32))
    with pytest.raises(BadReceipt, match="nothing in this file proves") as caught:
        _file(config, market).check()
    assert caught.value.fault.value == "client"


async def test_counting_again(fake: FakeMarket, wallet: Signer, config: ClientConfig, tokenizer: Path) -> None:
    """Anyone with the tokenizer gets the same count."""
    counts = replace(config, token_audits=(TokenAudit(model=MODEL, tokenizer=tokenizer, refuse_percent=50),))
    async with Market(fake.url, wallet, counts) as market:
        await _cheated(market, fake, Usage(10, 0, 60))
        file = _file(config, market)
        with pytest.raises(BadReceipt, match="nothing in this file proves"):
            file.check()
        assert file.check(recount_with(tokenizer))[1].found.startswith("60 output tokens billed, 4 counted")

"""An order's cap, fee and reservation, and a receipt's limits, each at equality."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tallystick.chain.deployment import Deployment
from tallystick.client.config import ClientConfig
from tallystick.client.jobs.candidates import draft_orders, estimate_cost
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.orders.signing import cap_for
from tallystick.client.receipts.delivery_check import UndeliveredCharge
from tallystick.client.recovery.escrow import PayerEscrow, rpc_of
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadReceipt, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.sealing import ContentKey, padded_size
from tallystick.protocol.types import ZERO_HASH, Address, JobId
from tests.client.fake_coordinator import CHAT, FakeMarket, Session, run
from tests.client.parties import ALICE, DOMAIN, MODEL, NOW_S, PAYER, Provider, bill, take

JOB = JobId(bytes(16))


# Caps reveal no lengths


@given(st.integers(0, 40_000), st.integers(0, 40_000), st.integers(0, 8_000))
@settings(deadline=None)
def test_a_cap_reveals_no_length(first: int, other: int, output: int) -> None:
    """Two requests of one sealed size have one cap, and a cap covers every request of its size."""
    caps = {cap_for(ALICE.ask.message, size, output) for size in (first, other)}
    assert len(caps) == 1 or padded_size(first) != padded_size(other)
    assert cap_for(ALICE.ask.message, first, output) == cap_for(ALICE.ask.message, padded_size(first) - 4, output)


@given(st.text(max_size=3_000), st.text(max_size=3_000))
@settings(deadline=None, max_examples=50)
def test_the_wire_reveals_only_the_size_bucket(first: str, other: str) -> None:
    """If two sealed bodies have one length, their orders have the same cap, and the client's estimate is the same."""
    key, sizes = ContentKey(bytes(32)), list[tuple[int, int, int]]()
    for text in (first, other):
        body = orjson.dumps({"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": text}]})
        request = ApiRequest.of(CHAT, body)
        ((_, terms),) = draft_orders(request, [ALICE.ask], JOB, ZERO_HASH, 4_096)
        foreseen, _ = estimate_cost(request, ALICE.ask.message, 4_096, None)
        sizes.append((len(key.seal_request(JOB, request.plaintext)), terms.max_cost, foreseen))
        assert foreseen == terms.max_cost
    assert sizes[0] == sizes[1] or sizes[0][0] != sizes[1][0]


# Fees


async def test_no_order_allows_an_unannounced_fee(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Orders allow exactly the coordinator's fee. If an order is refused because the fee rose, the fee is read again, up to
    the client's own maximum.
    """
    fake.info["feeBps"] = 20
    async with Market(fake.url, wallet, replace(config, max_fee_bps=30)) as market:
        await run(market)
        assert {order.max_fee_bps for order in fake.orders()} == {20}
        fake.info["feeBps"] = 30
        await market.shortlist(MODEL)
        refused = Refusal(Code.ORDER_TERMS, "order.maxFeeBps: this coordinator's fee is 30")
        await _refused_once(fake, market, refused)
        assert fake.orders()[-1].max_fee_bps == 30
        fake.info["feeBps"] = 31
        with pytest.raises(Refusal, match="max_fee_bps = 30"):
            await _refused_once(fake, market, refused)
        fake.info["feeBps"] = 30
        with pytest.raises(Refusal, match="fee is 30"):
            await _refused_once(fake, market, refused)
        fake.info |= {"feeBps": 10, "contract": "0x" + "11" * 20}
        with pytest.raises(Refusal, match="fee is 30"):
            await _refused_once(fake, market, refused)


async def _refused_once(fake: FakeMarket, market: Market, refusal: Refusal) -> None:
    await market.shortlist(MODEL)  # cached, so the job itself is refused
    fake.refusals.append(refusal)
    await run(market)


# Reservations


async def test_sybils_lock_no_purse(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Failed jobs of any number of providers reserve nothing; a paid provider has four times its earnings reserved."""
    fake.providers = [Provider.make(f"sybil{n}") for n in range(3)]

    async def fails(session: Session) -> None:
        await session.match()
        await session.fail(Unavailable(Code.NODE_BUSY, "busy"))

    async with Market(fake.url, wallet, config) as market:
        honest, fake.script = fake.script, fails
        for _ in range(3):
            with pytest.raises(Unavailable):
                await run(market)
        assert {order.reserve_target for order in fake.orders()} == {0}
        fake.script = honest
        await run(market)
        await run(market)
        assert [order.reserve_target for order in fake.orders()[-3:]] == [4 * 3, 0, 0]


# RPC endpoints


@pytest.mark.parametrize(
    ("rpc", "use", "deployed", "believed"),
    [
        (None, False, "http://127.0.0.1:8545", "http://127.0.0.1:8545"),
        (None, False, "http://localhost:8545", "http://localhost:8545"),
        (None, False, "http://[::1]:8545", "http://[::1]:8545"),
        (None, False, "https://rpc.example", None),
        (None, False, "http://localhost.example", None),
        (None, False, "http://127.0.0.1@rpc.example", None),
        (None, False, "http://[::", None),
        (None, False, "", None),
        (None, True, "https://rpc.example", "https://rpc.example"),
        ("http://mine", False, "https://rpc.example", "http://mine"),
        ("http://mine", True, "https://rpc.example", "http://mine"),
    ],
)
def test_no_rpc_address_of_a_stranger_is_believed(rpc: str | None, use: bool, deployed: str, believed: str | None) -> None:
    """An RPC address in a deployment file is used only if it is on this machine or the config allows it."""
    assert rpc_of(ClientConfig(rpc=rpc, use_deployment_rpc=use), deployed) == believed


def test_a_chain_without_an_endpoint_is_logged(tmp_path: Path) -> None:
    """Without an RPC address of its own, the client does not query the chain, and the log says what to set."""
    file = tmp_path / "deployment.json"
    Deployment(31337, DOMAIN.contract, Address("0x" + "cd" * 20), 6, 0, "https://rpc.example").save(file)
    with capture_logs() as logs:
        assert PayerEscrow.of(ClientConfig(deployment=file), PAYER) is None
    assert "use_deployment_rpc" in logs[0]["hint"]
    assert PayerEscrow.of(ClientConfig(deployment=file, use_deployment_rpc=True), PAYER) is not None


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


async def test_a_ceiling_above_all_receipts_bears_every_open_cap(ledger: Ledger) -> None:
    """After a job without a receipt, the next ceiling covers both caps, so its provider can take the next job and the first
    receipt may still come. After a release it covers one cap.
    """
    job, (first,) = await take(ledger)
    await ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[first.order.digest])
    other, (second,) = await take(ledger)
    cap = first.terms.max_cost
    assert second.order.message.ceiling == 2 * cap
    void = ALICE.signer.sign(bill(first, outcome=Outcome.REFUSED), DOMAIN)
    assert await ledger.record_receipt(IncomingReceipt(DOMAIN, job, first, void, None, NOW_S, final=False)) is None
    _, (third,) = await take(ledger)
    assert third.order.message.ceiling == 2 * cap
    await ledger.end_job(other, JobState.FAILED, "never matched", NOW_S)
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).open_caps == cap


def test_an_undelivered_answer_is_no_evidence() -> None:
    """A receipt for an undelivered answer is refused as the coordinator's bad receipt, and is never retried."""
    error: TallyError = UndeliveredCharge("x")
    assert isinstance(error, BadReceipt)
    assert (error.retry, error.code, error.fault.value) == (False, Code.BAD_RECEIPT, "coordinator")

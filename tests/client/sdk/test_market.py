from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from tallystick.cli.local.processes import free_port
from tallystick.client.config import ClientConfig
from tallystick.client.ledger.schema import JobState
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import (
    BadMessage,
    BadSeal,
    Code,
    Fault,
    Refusal,
    Unavailable,
)
from tallystick.protocol.match_log import pack_head
from tallystick.protocol.messages import LogHead, Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount, Hash
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
    honest,
    run,
    until_cancelled,
)
from tests.client.parties import DOMAIN, MODEL, Provider, signer


async def test_a_chat_returns_text_receipt_and_cost(market: Market, fake: FakeMarket) -> None:
    """One call returns the text, the order, the receipt and the cost."""
    result = await market.chat(MODEL, MESSAGES, max_tokens=50)
    assert result.text == "".join(WORDS)
    assert result.usage == Usage(10, 0, 5)
    assert result.receipt is not None
    assert result.cost == result.receipt.message.cost == 3
    assert result.provider == fake.providers[0].address
    assert result.order.digest == result.receipt.message.order_hash
    assert result.outcome is Outcome.COMPLETED
    assert result.terms.max_output_tokens == 50
    assert fake.last.request == {"model": MODEL, "messages": MESSAGES, "max_tokens": 50, "stream": False}
    assert result.commitment_key.hex() not in repr(result)


async def test_bytes_pass_untouched_both_ways(market: Market, fake: FakeMarket) -> None:
    """The engine gets the bytes that were submitted, and the caller gets the engine's bytes, chunk by chunk."""
    raw = orjson.dumps(STREAM) + b"  \n"
    async with await market.submit(CHAT, raw) as job:
        head = await job.start()
        chunks = [chunk async for chunk in job]
    assert fake.last.body == raw
    assert (head.status, head.content_type) == (200, EVENTS)
    assert chunks == [*map(event, WORDS), b"data: [DONE]\n\n"]
    assert job.done


async def test_tab_follows_the_receipts(market: Market, fake: FakeMarket) -> None:
    """Each order's signed cap is the cost of all accepted receipts plus its own cap; unmatched orders do not count."""
    for _ in range(3):
        await run(market)
    first, second, third = fake.orders()[::2]
    cap = fake.submissions[0].candidates[0].terms.max_cost
    assert [first.ceiling, second.ceiling, third.ceiling] == [cap, cap + 3, cap + 6]
    assert [order.ceiling for order in fake.orders()[1::2]] == [fake.submissions[0].candidates[1].terms.max_cost] * 3
    assert first.seq < second.seq < third.seq
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.total, tab.open_caps) == (9, 9, 0)


async def test_concurrent_jobs_add_up(market: Market, fake: FakeMarket) -> None:
    """Concurrent jobs each get a signed cap above those of the others, and every receipt is recorded."""

    async def slow(session: Session) -> None:
        await asyncio.sleep(0.01 * (len(fake.submissions) % 3))
        await honest(session)

    fake.script = slow
    await asyncio.gather(*(run(market) for _ in range(20)))
    ceilings = [order.ceiling for order in fake.orders() if order.provider == fake.providers[0].address]
    assert len(set(ceilings)) == 20
    tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.open_caps, tab.blocked_reason) == (60, 0, "")
    assert tab.ceiling == max(ceilings)


async def test_a_market_can_be_opened_and_closed_again(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Without a block: closing twice is harmless, and a closed market can be opened again."""
    market = Market(fake.url, wallet, config)
    for _ in range(2):
        assert await market.open() is market
        assert (await market.chat(MODEL, MESSAGES)).cost == 3
        await market.close()
        await market.close()
    assert len(fake.submissions) == 2


async def test_shortlist_is_cached(market: Market, fake: FakeMarket) -> None:
    """The coordinator is asked for a shortlist once in a few seconds, also by jobs that start together."""
    await asyncio.gather(*(run(market) for _ in range(5)))
    await run(market)
    assert len(fake.shortlists) == 1


async def test_constraints_reach_the_coordinator(market: Market, fake: FakeMarket) -> None:
    """Prices, pins and exclusions of a request are sent, and checked against the asks that come back."""
    alice, bob = fake.providers
    async with await market.submit(CHAT, BODY, pin=[bob.address], max_input_price=200_000, max_output_price=500_000) as job:
        await job.result()
    assert fake.shortlists[-1]["providers"] == [bob.address]
    assert fake.shortlists[-1]["maxInputPrice"] == 200_000
    assert fake.shortlists[-1]["maxOutputPrice"] == 500_000
    assert job.provider == bob.address
    with pytest.raises(Unavailable) as caught:
        await market.shortlist(MODEL, max_output_price=1)
    assert caught.value.code is Code.NO_PROVIDER
    assert [ask.message.provider for ask in await market.shortlist(MODEL, exclude=[bob.address])] == [alice.address]


async def test_asks_are_verified(market: Market, fake: FakeMarket) -> None:
    """Asks that are forged, expired, for another model, or garbage are dropped."""
    good = fake.providers[0].ask
    forged = replace(good, message=replace(good.message, output_price=1))
    expired, other = Provider.make("old", valid_until=5), Provider.make("other", model="else")
    entries = [{"ask": ask.to_json(), "free": 1} for ask in (forged, expired.ask, other.ask)]
    fake.asks = lambda: [*entries, {"ask": 7}, "?", {"ask": good.to_json(), "free": 1}]
    asks = await market.shortlist(MODEL)
    assert [ask.digest for ask in asks] == [good.digest]


async def test_models(market: Market) -> None:
    """The models on offer are listed with their lowest prices."""
    (offer,) = await market.models()
    assert (offer.id, offer.input_price, offer.max_output_tokens) == (MODEL, 100_000, 8_192)


async def test_refusals_carry_their_code(market: Market, fake: FakeMarket) -> None:
    """A coordinator's refusal is raised as the same typed error, and its orders stop counting."""
    fake.refusals = [Refusal(Code.UNKNOWN_MODEL, "no such model")]
    with pytest.raises(Refusal) as caught:
        await run(market)
    assert caught.value.code is Code.UNKNOWN_MODEL
    await market.shortlist(MODEL)
    fake.refusals = [Refusal(Code.INSUFFICIENT_FUNDS, "the purse is empty")]
    with pytest.raises(Refusal, match="purse is empty"):
        await run(market)
    assert (await market.tab(fake.providers[0].address)).open_caps == 0


async def test_stale_shortlist_is_refreshed(market: Market, fake: FakeMarket) -> None:
    """If no provider of a cached shortlist can take the job, it is offered once more to a fresh shortlist."""
    await run(market)
    fake.refusals = [Unavailable(Code.NO_PROVIDER, "busy")]
    await run(market)
    assert len(fake.shortlists) == 2
    fake.refusals = [Unavailable(Code.NO_PROVIDER, "busy"), Unavailable(Code.NO_PROVIDER, "still")]
    with pytest.raises(Unavailable, match="still"):
        await run(market)


async def test_earlier_jobs_are_settled_at_the_next_start(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A job whose end this process never saw is reconciled by the next process, from the coordinator's report."""
    now = 1_000_000_000_000_000_000

    async def breaks(session: Session) -> None:
        await session.match()
        await session.answer(200, EVENTS)
        session.survives = True
        await session.cut()

    fake.script = breaks
    async with Market(fake.url, wallet, replace(config, cancel_seconds=0.1), clock=lambda: now) as market:
        with pytest.raises(Unavailable):
            await run(market, STREAM)
        job = fake.last.job
        assert (await market.tab(fake.providers[0].address)).open_caps > 0
    fake.last.bill()
    async with Market(fake.url, wallet, config, clock=lambda: now + 10**9) as market:
        await market.info()

        async def settled() -> bool:
            known = await market.find(job)
            return known is not None and known.state is JobState.COMPLETED

        await eventually(settled)
        tab = await market.tab(fake.providers[0].address)
    assert (tab.accepted, tab.open_caps) == (3, 0)


async def test_wrong_deployment_is_refused(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """A coordinator on another chain or contract than the pinned one gets no order."""
    deployment = tmp_path / "deployment.json"
    content = {
        "chain_id": DOMAIN.chain_id,
        "escrow": "0x" + "99" * 20,
        "token": "0x" + "cd" * 20,
        "token_decimals": 6,
        "block": 1,
        "rpc": "http://127.0.0.1:1",
    }
    deployment.write_bytes(orjson.dumps(content))
    for pinned in (replace(config, chain_id=1), replace(config, deployment=deployment)):
        async with Market(fake.url, wallet, pinned) as market:
            with pytest.raises(Refusal, match="is pinned to"):
                await run(market)
    deployment.write_bytes(orjson.dumps(content | {"escrow": DOMAIN.contract}))
    async with Market(fake.url, wallet, replace(config, deployment=deployment)) as market:
        await run(market)
    with pytest.raises(BadMessage):
        async with Market(fake.url, wallet, replace(config, deployment=tmp_path / "none.json")):
            pass


async def test_fee_above_the_maximum_is_refused(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A coordinator whose fee is above the client's maximum gets no order."""
    fake.info["feeBps"] = 600
    async with Market(fake.url, wallet, config) as market:
        with pytest.raises(Refusal, match="600 bps"):
            await run(market)


async def test_caps_on_cost_and_output(market: Market, fake: FakeMarket) -> None:
    """A request that could cost more than allowed, or needs more output than is sold, is refused before any order."""
    with pytest.raises(Refusal) as caught:
        await market.submit(CHAT, BODY, max_cost=Amount(10))
    assert caught.value.code is Code.COST_ABOVE_CAP
    with pytest.raises(Refusal) as caught:
        await market.submit(CHAT, BODY | {"max_tokens": 9_000})
    assert caught.value.code is Code.ORDER_TERMS
    assert fake.submissions == []


async def test_default_output_limit(market: Market, fake: FakeMarket) -> None:
    """A request without max_tokens is ordered with the configured default for each choice, up to what the ask sells."""
    await run(market, {"model": MODEL, "messages": MESSAGES})
    await run(market, {"model": MODEL, "messages": MESSAGES, "n": 3})
    assert [submission.candidates[0].terms.max_output_tokens for submission in fake.submissions] == [4_096, 8_192]
    assert b"max_tokens" not in fake.last.body


async def test_body_limit_and_bad_bodies(market: Market, wallet: Signer, fake: FakeMarket, config: ClientConfig) -> None:
    """Bodies that are too long, not JSON, or for another route or model are refused locally, and nothing is sent."""
    async with Market(fake.url, wallet, replace(config, max_body_bytes=100)) as small:
        with pytest.raises(Refusal) as caught:
            await small.submit(CHAT, b" " * 101)
    assert caught.value.code is Code.BODY_TOO_LARGE
    with pytest.raises(BadMessage, match="not JSON"):
        await market.submit(CHAT, b"hello")
    with pytest.raises(Refusal) as caught:
        await market.submit("/v1/../images", BODY)
    assert caught.value.code is Code.UNKNOWN_ROUTE
    with pytest.raises(BadMessage):
        await market.submit(CHAT, BODY, model="else")


async def test_too_many_jobs(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A client at its limit of concurrent jobs refuses the next one as retryable."""
    fake.script = until_cancelled
    async with Market(fake.url, wallet, replace(config, max_jobs=1)) as market, await market.submit(CHAT, STREAM):
        with pytest.raises(Unavailable) as caught:
            await market.submit(CHAT, STREAM)
        assert caught.value.code is Code.CLIENT_BUSY


async def test_no_coordinator(wallet: Signer, config: ClientConfig) -> None:
    """Without a coordinator every call raises Unavailable, and the client keeps working."""
    async with Market(f"http://127.0.0.1:{free_port(0)}", wallet, config) as market:
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await run(market)
            assert caught.value.code is Code.COORDINATOR_UNAVAILABLE


async def test_closing_the_market_cancels_running_jobs(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Jobs that still run are cancelled and billed when the market closes."""
    fake.script = until_cancelled
    async with Market(fake.url, wallet, config) as market:
        job = await market.submit(CHAT, STREAM)
    assert fake.cancels == [job.id]
    assert job.done


async def test_unusable_sealing_key(market: Market, fake: FakeMarket) -> None:
    """A provider with an unusable sealing key is skipped."""
    broken = Provider.make("broken", sealing_key=b"\0" * 5)
    fake.providers.insert(0, broken)
    await run(market)
    assert broken.address not in {order.provider for order in fake.orders()}
    fake.providers, fake.asks = [broken], lambda: [{"ask": broken.ask.to_json(), "free": 1}]
    with pytest.raises(BadSeal) as caught:
        await market.submit(CHAT, BODY, max_output_price=10**9)
    assert caught.value.fault is Fault.PROVIDER


async def test_stale_connection_is_replaced(market: Market, fake: FakeMarket) -> None:
    """A connection that the coordinator closed just before the job arrived is replaced, and the job runs once."""
    await run(market)
    fake.drops = 1
    await run(market)
    assert len(fake.submissions) == 2
    assert (await market.tab(fake.providers[0].address)).accepted == 6


async def test_connection_lost_after_the_job_was_admitted(market: Market, fake: FakeMarket) -> None:
    """If the job had been admitted, it does not run twice: its end is found out, and the caller may retry."""
    await run(market)
    fake.drops, fake.keeps = 1, True
    with pytest.raises(Unavailable, match="had admitted the job"):
        await run(market)
    await eventually(lambda: bool(fake.cancels))
    assert len(fake.submissions) == 2


async def test_connections_are_reused(market: Market, fake: FakeMarket) -> None:
    """Jobs in sequence share the connections that were opened to ask for the tabs of the providers."""
    for _ in range(9):
        await run(market)
    assert len(fake.connections) <= len(fake.providers)


async def test_a_request_passes_the_head_of_the_match_log_on(market: Market, fake: FakeMarket) -> None:
    """The provider learns, sealed, which log this wallet was shown. A request with a key has none: it may be sealed again."""
    await run(market)
    assert fake.last.head.log_head == b""
    watch = market._follow_up.log_watch
    assert watch is not None
    coordinator = signer("coordinator")
    head = coordinator.sign(LogHead(coordinator=coordinator.address, size=3, root=Hash(b"r" * 32), signed_at=1), DOMAIN)
    watch.monitor.head = head
    await run(market)
    assert fake.last.head.log_head == pack_head(head)
    async with await market.submit(CHAT, BODY, key="k") as job:
        await job.result()
    assert fake.last.head.log_head == b""

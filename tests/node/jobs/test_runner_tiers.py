"""Access tiers at a node: models and jobs at the same time, by wallet and by what a payer settled with this node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

from node.domain.admission_rules import AdmissionRules
from node.domain.published_asks import for_payers
from node.jobs.deadlines import Deadlines
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryChain, ScriptedEngine
from tallystick.protocol.messages import Outcome
from tallystick.protocol.payer_rules import PayerRule
from tallystick.protocol.tiers import Tier, Tiers
from tallystick.protocol.types import Amount
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import Kind
from tests.node.harness import NOW, OFFER, PAYER, RunnerHarness

STEPS = (
    ResponseStart(200, "text/event-stream"),
    ResponsePart(b"one.", has_output=True, text_bytes=4),
    ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10)),
)
SMALL = Tier(name="new", models=("another model",))


async def refused(harness: RunnerHarness, code: str) -> str:
    """Dispatches a job that is refused with a receipt at no cost. Returns the reason."""
    placed = harness.dispatch()
    error = await harness.failure(placed)
    await harness.refusal_receipt(placed)
    assert (error["code"], error["fault"]) == (code, "client")
    assert harness.tabs.account(PAYER.address).tab.in_flight == 0
    return str(error["message"])


async def test_what_a_payer_settled_here() -> None:
    """A model that its tier has not is refused by name, with what lifts it; what it settles here lifts it, at the very amount."""
    chain = MemoryChain()
    harness = RunnerHarness(ScriptedEngine(*STEPS), chain=chain)
    cost = (await harness.receipt(harness.dispatch())).cost
    await harness.ended()
    known = Tier(name="known", settled_at_least=cost)
    harness.runner.reconfigure(AdmissionRules(), Deadlines(), Tiers((SMALL, known), "on chain with this provider"))
    chain.cached[PAYER.address] = replace(chain.default, settled=Amount(cost - 1))
    text = await refused(harness, "tier_limit")
    assert f"{OFFER.model!r} is not for wallets of tier 'new'" in text
    assert "dollars settled on chain with this provider, 0.000001 more than now" in text
    chain.cached[PAYER.address] = replace(chain.default, settled=cost)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED
    await harness.ended()


async def test_a_price_for_some_payers() -> None:
    """The node has the last word: its cheaper ask is for those that settled enough here, at the very amount."""
    chain = MemoryChain()
    harness = RunnerHarness(ScriptedEngine(*STEPS), chain=chain)
    cost = (await harness.receipt(harness.dispatch())).cost
    await harness.ended()
    harness.asks.publish([for_payers(OFFER, OFFER.prices, PayerRule(settled=cost))], NOW)
    chain.cached[PAYER.address] = replace(chain.default, settled=Amount(cost - 1))
    text = await refused(harness, "tier_limit")
    assert "this price is for payers that settled " in text
    assert "with this provider; 0.000001 dollars more than now" in text
    chain.cached[PAYER.address] = replace(chain.default, settled=cost)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED
    await harness.ended()


async def test_a_listed_wallet() -> None:
    """The config's list lifts a wallet that settled nothing."""
    tiers = Tiers((SMALL, Tier(name="friends", wallets=(PAYER.address,))))
    harness = RunnerHarness(ScriptedEngine(*STEPS), tiers=tiers)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED
    await harness.ended()


async def test_no_jobs_at_all() -> None:
    """A first tier of no jobs lets no stranger in."""
    harness = RunnerHarness(ScriptedEngine(*STEPS), tiers=Tiers((Tier(name="strangers", jobs_in_flight=0),)))
    assert "may send no jobs here" in await refused(harness, "tier_limit")


async def test_jobs_at_the_same_time() -> None:
    """A payer's jobs here are counted while they run; the next one is taken when one ended."""
    gate = asyncio.Event()

    def wait() -> Awaitable[object]:
        return gate.wait()

    engine = ScriptedEngine(STEPS[0], STEPS[1], wait, STEPS[2])
    harness = RunnerHarness(engine, tiers=Tiers((Tier(name="new", jobs_in_flight=1),)))
    first = harness.dispatch()
    await harness.link.until(Kind.ACCEPT, first.job)
    assert "tier 'new' allows 1 at the same time" in (await harness.failure(harness.dispatch()))["message"]
    gate.set()
    await harness.receipt(first)
    await harness.ended()
    await harness.receipt(harness.dispatch())
    await harness.ended()

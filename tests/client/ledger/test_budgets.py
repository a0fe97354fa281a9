from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tallystick.client.config import Budget, ClientConfig
from tallystick.client.ledger.budgets import BudgetStatus, fit_budgets
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.order_writes import NewJob
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState
from tallystick.client.ledger.spending import DAY_SECONDS, GROUPS, CacheHit, SpendingRow, add_unproven
from tallystick.client.orders.signing import PlacedOrder, terms_for
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal
from tallystick.protocol.messages import Outcome, Terms
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import ZERO_HASH, Address, Amount, JobId, format_amount
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, Provider, bill, sign

FINE = Delivery(200, 50, ZERO_HASH, finished=True)
TODAY = NOW_S // DAY_SECONDS


class Harness:
    """A ledger that numbers its jobs."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.jobs = 0

    async def take(
        self, *budgets: Budget, label: str = "", at: int = NOW_S, providers: tuple[Provider, ...] = (ALICE,)
    ) -> tuple[JobId, list[PlacedOrder]]:
        """Takes orders for one new job."""
        self.jobs += 1
        job = JobId(self.jobs.to_bytes(16))
        new = NewJob(DOMAIN, PAYER.address, job, "model", "/v1/chat/completions", b"k" * 32, at, label)
        drafts = [
            (p.address, terms_for(p.ask, job=job, commitment=ZERO_HASH, output_tokens=100, body_bytes=200)) for p in providers
        ]
        return job, await self.ledger.sign_orders(new, drafts, sign, budgets)

    async def book(self, job: JobId, placed: PlacedOrder, seq: int = 1, took: int | None = None) -> None:
        """Records Alice's receipt of that number twice."""
        receipt = ALICE.signer.sign(bill(placed, seq=seq, cumulative_cost=3 * seq), DOMAIN)
        for _ in range(2):
            assert await self.ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, receipt, FINE, NOW_S, took)) is None


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield Harness(ledger)
    await ledger.close()


async def _cap(harness: Harness) -> int:
    """The highest possible cost of one job."""
    job, (placed,) = await harness.take(label="probe")
    await harness.ledger.end_job(job, JobState.FAILED, "", NOW_S)
    return int(placed.terms.max_cost)


async def test_spending_adds_up(harness: Harness) -> None:
    """Spending is grouped by one or several members; a repeated receipt counts once, and a job without a receipt counts as
    failed once.
    """
    for seq, label in enumerate(("a", "a", "b"), 1):
        job, (placed,) = await harness.take(label=label)
        await harness.book(job, placed, seq)
    job, _ = await harness.take(label="b")
    for state in (JobState.LOST, JobState.FAILED, JobState.FAILED):
        await harness.ledger.end_job(job, state, "gone", NOW_S)
    read = harness.ledger.spending
    assert await read(NOW_S, ()) == [SpendingRow((), 4, 1, Amount(9), 30, 0, 15)]
    assert await read(NOW_S, ("label",)) == [
        SpendingRow(("a",), 2, 0, Amount(6), 20, 0, 10),
        SpendingRow(("b",), 2, 1, Amount(3), 10, 0, 5),
    ]
    assert [row.group for row in await read(NOW_S, GROUPS)] == [
        (TODAY, "a", "model", ALICE.address),
        (TODAY, "b", "model", ALICE.address),
        (TODAY, "b", "model", ""),
    ]
    assert await read(NOW_S + DAY_SECONDS, ()) == []


async def test_latency_percentiles(harness: Harness) -> None:
    """Percentiles are the nearest ranks of the requests with a known duration, by group."""
    for seq, took in enumerate((None, *range(20, 0, -1)), 1):
        job, (placed,) = await harness.take(label="a" if seq % 2 else "b")
        await harness.book(job, placed, seq, took)
    for by in ((), ("model", "day"), ("provider",)):
        assert [row.latency_ms for row in await harness.ledger.spending(NOW_S, by)] == [(10, 19, 20)]
    assert {row.group[0]: row.latency_ms for row in await harness.ledger.spending(NOW_S, ("label",))} == {
        "a": (9, 19, 19),
        "b": (10, 20, 20),
    }
    assert (await harness.ledger.spending(NOW_S + DAY_SECONDS, ())) == []


async def test_a_budget_holds_back_the_worst_case(harness: Harness) -> None:
    """All signed orders count with their caps, including a whole shortlist's; a job's cost then replaces its caps."""
    cap = await _cap(harness)
    budget = Budget(per_day=Amount(3 * cap))
    first, (alice, _) = await harness.take(budget, providers=(ALICE, BOB))
    await harness.take(budget)
    with pytest.raises(Refusal, match="the day's budget has 0 dollars left") as caught:
        await harness.take(budget)
    assert (caught.value.code, caught.value.fault, caught.value.status) == (Code.OVER_BUDGET, Fault.CLIENT, 402)
    await harness.book(first, alice)
    status = await harness.ledger.budget_status(budget, NOW_S)
    assert (status.spent, status.reserved, status.left) == (3, cap, 2 * cap - 3)
    assert len((await harness.take(budget, providers=(ALICE, BOB)))[1]) == 1, "there is room for one of the two"
    until = alice.order.message.claim_by
    assert (await harness.ledger.budget_status(budget, until - 1)).reserved == 2 * cap, "also on later days"
    assert (await harness.ledger.budget_status(budget, until)).reserved == 0, "nobody can collect on it any more"


async def test_a_budget_of_a_workload(harness: Harness) -> None:
    """A workload's budget limits only jobs of its label; the general budget limits them too."""
    cap = await _cap(harness)
    research, everything = Budget(per_day=Amount(cap), label="research"), Budget(per_day=Amount(2 * cap))
    await harness.take(research, everything, label="research")
    with pytest.raises(Refusal, match="the day's budget of 'research'"):
        await harness.take(research, everything, label="research")
    await harness.take(research, everything, label="play")
    with pytest.raises(Refusal, match="the day's budget has"):
        await harness.take(research, everything, label="play")


async def test_concurrent_orders_do_not_overspend(harness: Harness) -> None:
    """Of two concurrent orders, the second one sees what the first reserved."""
    cap = await _cap(harness)
    budget = Budget(per_day=Amount(3 * cap))
    ends = await asyncio.gather(*(harness.take(budget) for _ in range(12)), return_exceptions=True)
    assert sum(not isinstance(end, BaseException) for end in ends) == 3


async def test_the_duration_of_a_request_is_that_of_its_answer(harness: Harness) -> None:
    """Each request counts once, with the provider whose receipt ended it; another provider's receipt at no cost has no
    duration.
    """
    job, (placed,) = await harness.take()
    await harness.book(job, placed, took=10)
    job, (passed, placed) = await harness.take(providers=(ALICE, BOB))
    void = ALICE.signer.sign(bill(passed, Usage(0, 0, 0), Outcome.REFUSED, seq=2, cumulative_cost=Amount(3)), DOMAIN)
    assert await harness.ledger.record_receipt(IncomingReceipt(DOMAIN, job, passed, void, None, NOW_S, final=False)) is None
    assert (
        await harness.ledger.record_receipt(
            IncomingReceipt(DOMAIN, job, placed, BOB.signer.sign(bill(placed), DOMAIN), FINE, NOW_S, 30)
        )
        is None
    )
    latencies = {row.group[0]: row.latency_ms for row in await harness.ledger.spending(NOW_S, ("provider",))}
    assert latencies == {ALICE.address: (10, 10, 10), BOB.address: (30, 30, 30)}


def _drafts(*outputs: int) -> list[tuple[Address, Terms]]:
    job = JobId(bytes(16))
    return [
        (ALICE.address, terms_for(ALICE.ask, job=job, commitment=ZERO_HASH, output_tokens=output, body_bytes=200))
        for output in outputs
    ]


def test_a_refusal_names_the_tightest_budget() -> None:
    """The refusal states what the budget has left, never below zero, and what the cheapest draft may cost."""
    drafts = _drafts(300, 100, 200)
    least = drafts[1][1].max_cost
    wide = BudgetStatus(Budget(per_day=Amount(least), label="wide"), Amount(1), Amount(0))
    lowered = BudgetStatus(Budget(per_day=Amount(10), label="lowered"), Amount(500_000), Amount(2_000_000))
    for statuses in ([wide, lowered], [lowered, wide]):
        with pytest.raises(Refusal) as caught:
            fit_budgets(drafts, statuses)
        text = str(caught.value)
        assert "of 'lowered' has 0 dollars left" in text
        assert "(0.5 spent, 2 reserved" in text
        assert f"may cost {format_amount(least)};" in text
    room = BudgetStatus(Budget(per_day=Amount(least)), Amount(0), Amount(0))
    assert fit_budgets(drafts, [room]) == [drafts[1]]
    assert fit_budgets(drafts, []) == drafts
    assert fit_budgets([], [lowered]) == []


def test_percentage_of_a_budget() -> None:
    """The percentage counts spent and still collectable amounts together; a budget of zero is used up."""
    half = BudgetStatus(Budget(per_day=Amount(200)), Amount(70), Amount(30))
    assert (half.left, half.percent) == (100, 50)
    assert BudgetStatus(Budget(per_day=Amount(0)), Amount(0), Amount(0)).percent == 100


async def test_a_budget_covers_the_workloads_below_its_label(harness: Harness) -> None:
    """A budget covers labels that begin with its own label and a slash, and not those with a longer or differently cased name."""
    cap = await _cap(harness)
    budget = Budget(per_day=Amount(10 * cap), label="research")
    for seq, label in enumerate(("research", "research/a", "researcher", "Research/a", "other"), 1):
        job, (placed,) = await harness.take(label=label)
        await harness.book(job, placed, seq)
        await harness.take(label=label)
    status = await harness.ledger.budget_status(budget, NOW_S)
    assert (status.spent, status.reserved) == (2 * 3, 2 * cap)


async def test_cache_hits_and_unproven_payments_add_up(harness: Harness) -> None:
    """Savings by the cache are counted by day; payments on chain without a receipt are a cost of their provider."""
    hit = CacheHit("a", "model", ALICE.address, Amount(7))
    for now in (NOW_S, NOW_S, NOW_S + DAY_SECONDS):
        await harness.ledger.record_cache_hit(hit, now)
    tab: dict[str, object] = {"of_payer": PAYER.address, "of_provider": BOB.address}
    for now in (NOW_S, NOW_S, NOW_S + DAY_SECONDS):
        await harness.ledger._database.write(partial(add_unproven, tab_key=tab, amount=Amount(5), now=now))
    of_alice, of_bob = ("a", "model", ALICE.address), ("", "", BOB.address)
    assert await harness.ledger.spending(NOW_S, GROUPS) == [
        SpendingRow((TODAY + 1, *of_bob), 0, 0, Amount(5), 0, 0, 0),
        SpendingRow((TODAY + 1, *of_alice), 0, 0, Amount(0), 0, 0, 0, hits=1, saved=Amount(7)),
        SpendingRow((TODAY, *of_bob), 0, 0, Amount(10), 0, 0, 0),
        SpendingRow((TODAY, *of_alice), 0, 0, Amount(0), 0, 0, 0, hits=2, saved=Amount(14)),
    ]
    assert [row.group[0] for row in await harness.ledger.spending(NOW_S, ("day",))] == [TODAY + 1, TODAY], "the newest day first"
    assert [row.group[0] for row in await harness.ledger.spending(NOW_S, ("provider",))] == [BOB.address, ALICE.address]


async def test_a_request_counts_once(harness: Harness) -> None:
    """A job that failed with a receipt, and one that failed without and was charged later, count as one failed request each."""
    job, (placed,) = await harness.take(label="failed")
    broken = ALICE.signer.sign(bill(placed, Usage(0, 0, 0), Outcome.UPSTREAM_ERROR), DOMAIN)
    assert await harness.ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, broken, FINE, NOW_S)) is None
    job, (placed,) = await harness.take(label="late")
    await harness.ledger.end_job(job, JobState.FAILED, "gone", NOW_S, matched=[placed.order.digest])
    late_receipt = ALICE.signer.sign(bill(placed, seq=2), DOMAIN)
    assert await harness.ledger.record_receipt(IncomingReceipt(DOMAIN, job, placed, late_receipt, FINE, NOW_S)) is None
    read = {row.group[0]: row for row in await harness.ledger.spending(NOW_S, ("label",))}
    assert {label: (row.requests, row.failed, row.cost) for label, row in read.items()} == {
        "failed": (1, 1, 0),
        "late": (1, 1, 3),
    }


async def test_a_warning_once_a_day(harness: Harness) -> None:
    """The warning is logged once a day, from warn_percent on."""
    cap = await _cap(harness)
    budget = Budget(per_day=Amount(10 * cap), warn_percent=20)
    with capture_logs() as logs:
        for _ in range(5):
            await harness.take(budget)
    assert [entry["event"] for entry in logs] == ["a budget is nearly used up"]


def test_budgets_in_a_config() -> None:
    """Invalid budgets are refused."""
    with pytest.raises(BadMessage, match="warn_percent"):
        Budget(per_day=Amount(1), warn_percent=101)
    with pytest.raises(BadMessage, match="label"):
        ClientConfig(label="x" * 65)

"""Spending on upstreams in the ledger: the most first, what it cost afterwards, and the budgets of the day."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.config import Budget
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.ledger.upstream_spending import UpstreamBooking
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Amount
from tests.client.parties import NOW_S, PAYER

BUDGET = Budget(per_day=Amount(1_000), label="a")
TARGET = UpstreamTarget("cloud", "org/big")


def booking(most: int | None, label: str = "a", at: int = NOW_S) -> UpstreamBooking:
    """A request that may cost `most`."""
    return UpstreamBooking(TARGET, label, at, None if most is None else Amount(most))


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    opened = await Ledger.open(tmp_path / "ledger.db", PAYER.address)
    yield opened
    await opened.close()


async def left(ledger: Ledger, at: int = NOW_S) -> int:
    """What the budget has left."""
    return (await ledger.budget_status(BUDGET, at)).left


async def test_the_most_counts_until_the_end(ledger: Ledger) -> None:
    """A running request takes its most from the budget, and gives back what it did not cost. The bound is inclusive."""
    await ledger.reserve_upstream(booking(400), [BUDGET])
    assert await left(ledger) == 600
    with pytest.raises(Refusal) as caught:
        await ledger.reserve_upstream(booking(601), [BUDGET])
    assert caught.value.code is Code.OVER_BUDGET
    assert await left(ledger) == 600, "a refused request is not booked"
    await ledger.reserve_upstream(booking(600), [BUDGET])
    await ledger.settle_upstream(booking(400), Amount(150), Usage(10, 4, 5), failed=False)
    assert await left(ledger) == 250
    await ledger.settle_upstream(booking(600), Amount(0), Usage(0, 0, 0), failed=True)
    (line,) = await ledger.spending(0, ("provider", "model", "label"))
    assert line.group == ("upstream:cloud", "upstream://cloud/org/big", "a")
    assert (line.requests, line.failed, line.cost) == (2, 1, 150)
    assert (line.input_tokens, line.cached_tokens, line.output_tokens, line.hits) == (10, 4, 5, 0)


async def test_an_answer_may_cost_more_than_was_foreseen(ledger: Ledger) -> None:
    """What it cost is booked all the same."""
    await ledger.reserve_upstream(booking(400), [BUDGET])
    await ledger.settle_upstream(booking(400), Amount(1_300), Usage(1, 0, 1), failed=False)
    assert await left(ledger) == -300


async def test_budgets_of_other_workloads_and_days(ledger: Ledger) -> None:
    """Only the budgets of its workload bound a request, and it belongs to the day on which it began."""
    await ledger.reserve_upstream(booking(10_000, "b"), [BUDGET])
    await ledger.reserve_upstream(booking(900, "a/papers"), [BUDGET])
    assert await left(ledger) == 100
    assert await left(ledger, NOW_S + DAY_SECONDS) == 1_000
    await ledger.settle_upstream(booking(900, "a/papers"), Amount(0), Usage(0, 0, 0), failed=True)
    assert await left(ledger) == 1_000


async def test_an_unknown_cost_fits_no_budget(ledger: Ledger) -> None:
    """Without prices nothing can be counted; without a budget nothing has to be."""
    with pytest.raises(Refusal, match="set input_price") as caught:
        await ledger.reserve_upstream(booking(None), [BUDGET])
    assert caught.value.code is Code.OVER_BUDGET
    await ledger.reserve_upstream(booking(None), [])
    await ledger.settle_upstream(booking(None), Amount(0), Usage(7, 0, 8), failed=False)
    (line,) = await ledger.spending(0, ())
    assert (line.requests, line.cost, line.input_tokens, line.output_tokens) == (1, 0, 7, 8)


async def test_the_tightest_budget_decides(ledger: Ledger) -> None:
    """The error says which budget it is and what it has left, in dollars."""
    wide = Budget(per_day=Amount(10**9))
    await ledger.reserve_upstream(booking(600), [wide, BUDGET])
    with pytest.raises(Refusal, match=r"budget of 'a' has 0\.0004 dollars left"):
        await ledger.reserve_upstream(booking(500), [wide, BUDGET])

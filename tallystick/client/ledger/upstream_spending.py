"""Spending on hosted upstreams: unsealed, unsigned, and counted by the same budgets as jobs of the market.

A request is booked with the most that it may cost before it is sent, and corrected to what it did cost when it ends. If the
process dies in between, the most stays booked. Functions of one connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert

from tallystick.client.config import Budget
from tallystick.client.ledger.budgets import budget_status
from tallystick.client.ledger.schema import spent
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.upstream_settings import UpstreamTarget
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, format_amount

UPSTREAM_PREFIX: Final = "upstream:"
"""What the provider of an upstream's spending begins with; its name follows."""
_COUNTS = ("requests", "failed", "cost", "input_tokens", "cached_tokens", "output_tokens")
_INSERT = insert(spent)
_ADD = _INSERT.on_conflict_do_update(
    index_elements=["payer", "day", "label", "model", "provider"],
    set_={name: spent.c[name] + _INSERT.excluded[name] for name in _COUNTS},
)


@dataclass(frozen=True, slots=True)
class UpstreamBooking:
    """One request to an upstream. `at`: Unix seconds. `most`: base units that it may cost; None if its model has no prices."""

    target: UpstreamTarget
    label: str
    at: int
    most: Amount | None

    @property
    def provider(self) -> str:
        """The provider under which it is booked."""
        return UPSTREAM_PREFIX + self.target.upstream


def reserve(c: Connection, payer: Address, booking: UpstreamBooking, budgets: Iterable[Budget]) -> None:
    """Books a request with the most that it may cost. Raises Refusal (over_budget) if that does not fit every budget."""
    statuses = [budget_status(c, payer, budget, booking.at) for budget in budgets if budget.covers(booking.label)]
    if statuses and booking.most is None:
        raise Refusal(
            Code.OVER_BUDGET,
            f"{statuses[0].budget.name} cannot count {booking.target}, whose prices are not known: set input_price and "
            "output_price of that model in [[upstreams.models]]",
        )
    most = booking.most or Amount(0)
    tightest = min(statuses, key=lambda status: status.left, default=None)
    if tightest is not None and most > tightest.left:
        left = format_amount(Amount(max(tightest.left, 0)))
        raise Refusal(
            Code.OVER_BUDGET,
            f"{tightest.budget.name} has {left} dollars left until midnight UTC, but this request may cost "
            f"{format_amount(most)} at {booking.target}; lower max_tokens or raise the budget",
        )
    _add(c, payer, booking, requests=1, cost=int(most))


def settle(c: Connection, payer: Address, booking: UpstreamBooking, cost: Amount, usage: Usage, *, failed: bool) -> None:
    """Corrects a booked request to what it cost, in base units, and counts its tokens."""
    _add(
        c,
        payer,
        booking,
        failed=int(failed),
        cost=int(cost) - int(booking.most or 0),
        input_tokens=usage.input,
        cached_tokens=usage.cached,
        output_tokens=usage.output,
    )


def _add(c: Connection, payer: Address, booking: UpstreamBooking, **counts: int) -> None:
    group = {"payer": payer, "day": booking.at // DAY_SECONDS, "label": booking.label, "model": str(booking.target)}
    zeros = dict.fromkeys((*_COUNTS, "hits", "saved"), 0)
    c.execute(_ADD, group | {"provider": booking.provider} | zeros | counts)

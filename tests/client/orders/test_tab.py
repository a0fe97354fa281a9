"""Tabs: their ceilings, and the providers that they exclude."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.client.orders.tab import MAX_AWAITING_RECEIPTS, Tab, awaiting_receipts_reason
from tallystick.protocol.types import Amount
from tests.client.parties import place

AMOUNTS = st.integers(0, 10**12).map(Amount)


@given(AMOUNTS, st.tuples(AMOUNTS, AMOUNTS), st.tuples(AMOUNTS, AMOUNTS), AMOUNTS, st.integers(0, 4_000))
@settings(deadline=None)
def test_ceiling(
    accepted: Amount, opened: tuple[Amount, Amount], known: tuple[Amount, Amount], missing: Amount, output: int
) -> None:
    """A ceiling is accepted plus open plus cap. A total that no open order explains counts as accepted, up to what expired
    and recovered orders explain.
    """
    open_caps, early = opened[0], Amount(min(opened))
    expired, recovered = known
    tab = Tab(
        accepted=accepted,
        total=accepted + missing,
        open_caps=open_caps,
        early_caps=early,
        expired_caps=expired,
        recovered=recovered,
    )
    placed = place(tab, output=output)
    cap = placed.terms.max_cost
    lost = min(max(0, missing - early), expired + recovered)
    assert placed.order.message.ceiling == accepted + lost + open_caps + cap
    assert tab.explained_total == accepted + min(missing, expired + recovered + open_caps)
    assert placed.order.message.ceiling <= tab.explained_total + open_caps + cap


def test_excluded_providers() -> None:
    """Only a blocked provider, with the block's reason, and one that owes the stated number of receipts are excluded."""
    assert Tab(blocked_reason="it lied").exclusion_reason == "it lied"
    assert Tab(awaiting_receipts=MAX_AWAITING_RECEIPTS - 1).exclusion_reason == ""
    assert Tab(awaiting_receipts=MAX_AWAITING_RECEIPTS).exclusion_reason == awaiting_receipts_reason(MAX_AWAITING_RECEIPTS)
    assert awaiting_receipts_reason(MAX_AWAITING_RECEIPTS).startswith(f"{MAX_AWAITING_RECEIPTS} orders of ended jobs")

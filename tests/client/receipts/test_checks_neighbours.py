"""A receipt among the others of its tab, a doubt, and a reservation: every limit at equality. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.client.receipts.checks import (
    RESERVE_MULTIPLE,
    AdjacentReceipts,
    AuditFinding,
    Tab,
    check_audit,
    check_sequence,
    reserve_for,
)
from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount, Hash
from tests.client.parties import bill, place


def _chain(*costs: int) -> list[Receipt]:
    total, found = 0, list[Receipt]()
    for seq, each in enumerate(costs, 1):
        total += each
        digest = Hash(bytes([seq]) * 32)
        found.append(
            bill(place(), seq=seq, cost=Amount(each), cumulative_cost=Amount(total), order_hash=digest),
        )
    return found


def test_neighbours_are_the_nearest_on_each_side() -> None:
    """Of all receipts of a tab, those just below and just above, the one with the same seq, and the one of the same order."""
    one, two, three, four, five = _chain(10, 20, 30, 40, 50)
    near = AdjacentReceipts.of(three, [one, five, two, four, three])
    assert (near.below, near.above, near.same_seq, near.same_order) == (two, four, None, None)
    twin = replace(three, finished_at=9, order_hash=Hash(b"\7" * 32))
    again = replace(three, seq=7, cumulative_cost=Amount(999))
    near = AdjacentReceipts.of(three, [twin, again, one])
    assert (near.below, near.above, near.same_seq, near.same_order) == (one, again, twin, again)
    assert AdjacentReceipts.of(three, []) == AdjacentReceipts()
    assert AdjacentReceipts.of(three, [three]) == AdjacentReceipts()


@pytest.mark.parametrize(("gap", "total", "fits"), [(1, 30, True), (1, 31, False), (1, 29, False), (2, 30, True), (2, 29, False)])
def test_totals_leave_room_for_what_lies_between(gap: int, total: int, fits: bool) -> None:
    """Next to each other totals are exact, with something missing between they may be more, and they are never less."""
    lower = bill(place(), seq=5, cost=Amount(10), cumulative_cost=Amount(10))
    higher = bill(place(), seq=5 + gap, cost=Amount(20), cumulative_cost=Amount(total))
    for receipt, near in ((higher, AdjacentReceipts(below=lower)), (lower, AdjacentReceipts(above=higher))):
        if fits:
            check_sequence(receipt, near)
        else:
            with pytest.raises(BadReceipt, match="does not continue"):
                check_sequence(receipt, near)
    if gap == 2:
        check_sequence(replace(higher, cumulative_cost=Amount(31)), AdjacentReceipts(below=lower))


def test_a_first_receipt_has_the_total_of_its_cost() -> None:
    """With seq 1 it must, with a later seq and nothing known below it need not; both sides are looked at."""
    first = bill(place(), seq=1, cost=Amount(10), cumulative_cost=Amount(10))
    check_sequence(first, AdjacentReceipts())
    with pytest.raises(BadReceipt, match="first receipt"):
        check_sequence(replace(first, cumulative_cost=Amount(11)), AdjacentReceipts())
    check_sequence(replace(first, seq=2, cumulative_cost=Amount(11)), AdjacentReceipts())
    second = replace(first, seq=2, cumulative_cost=Amount(20))
    check_sequence(first, AdjacentReceipts(above=second))
    with pytest.raises(BadReceipt, match="first receipt"):
        check_sequence(replace(first, cumulative_cost=Amount(9)), AdjacentReceipts(above=second))


def test_one_seq_and_one_order_have_one_receipt() -> None:
    """The second receipt of a seq is told as equivocation, that of an order as a second one."""
    first = bill(place())
    with pytest.raises(BadReceipt, match="equivocation"):
        check_sequence(replace(first, finished_at=1), AdjacentReceipts(same_seq=first))
    with pytest.raises(BadReceipt, match="second one for the same order; the first has seq 1"):
        check_sequence(replace(first, seq=2), AdjacentReceipts(below=first, same_order=first))


def test_a_doubt_refuses_only_where_it_says_so() -> None:
    """What a recount flags is booked; what it refuses is not."""
    check_audit(None)
    check_audit(AuditFinding("a little much", refuse=False))
    with pytest.raises(BadReceipt, match="far too much"):
        check_audit(AuditFinding("far too much", refuse=True))


@pytest.mark.parametrize("accepted", [0, 1, 24, 25, 26, 10**9])
def test_nothing_is_reserved_in_advance(accepted: int) -> None:
    """A provider whose receipts cost nothing has nothing reserved; then in proportion, up to the setting."""
    most = 100
    assert reserve_for(Tab(accepted=Amount(accepted)), Amount(most)) == min(most, RESERVE_MULTIPLE * accepted)
    assert reserve_for(Tab(total=Amount(accepted), open_caps=Amount(accepted)), Amount(most)) == 0

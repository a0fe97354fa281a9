"""Checks of a receipt against the other receipts of its tab."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.client.receipts.sequence_check import AdjacentReceipts, check_sequence
from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount, Hash
from tests.client.parties import bill, place


def chain(*costs: int) -> list[Receipt]:
    """Consecutive receipts of one tab."""
    placed, receipts, total = place(), [], 0
    for seq, each in enumerate(costs, 1):
        total += each
        receipts.append(bill(placed, seq=seq, cost=Amount(each), cumulative_cost=Amount(total)))
    return receipts


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
@settings(deadline=None)
def test_any_order_of_arrival_is_fine(costs: list[int], data: st.DataObject) -> None:
    """The receipts of an honest tab are accepted in any order, also if some are missing."""
    receipts = chain(*costs)
    arriving = data.draw(st.permutations(receipts))[: data.draw(st.integers(1, len(receipts)))]
    held: list[Receipt] = []
    for receipt in arriving:
        check_sequence(receipt, adjacent_receipts(held, receipt))
        held.append(receipt)


def adjacent_receipts(held: list[Receipt], receipt: Receipt) -> AdjacentReceipts:
    """The adjacent receipts among those held."""
    below = [r for r in held if r.seq < receipt.seq]
    above = [r for r in held if r.seq > receipt.seq]
    return AdjacentReceipts(
        same_seq=next((r for r in held if r.seq == receipt.seq), None),
        below=max(below, key=lambda r: r.seq, default=None),
        above=min(above, key=lambda r: r.seq, default=None),
    )


def test_broken_continuity() -> None:
    """Totals that do not add up, repeated seqs, and second receipts for one order are refused."""
    first, second, third = chain(10, 20, 30)
    cases = [
        (replace(second, cumulative_cost=Amount(31)), AdjacentReceipts(below=first)),
        (replace(second, cumulative_cost=Amount(29)), AdjacentReceipts(below=first)),
        (replace(third, cumulative_cost=Amount(39)), AdjacentReceipts(below=first)),
        (replace(second, cumulative_cost=Amount(31)), AdjacentReceipts(above=third)),
        (replace(first, cumulative_cost=Amount(11)), AdjacentReceipts()),
        (second, AdjacentReceipts(same_seq=replace(second, finished_at=1))),
        (second, AdjacentReceipts(below=first, same_order=first)),
    ]
    for receipt, near in cases:
        with pytest.raises(BadReceipt):
            check_sequence(receipt, near)


@pytest.mark.parametrize(("position", "bound"), [(1, "exactly"), (2, "at least")])
def test_the_refusal_names_the_expected_total(position: int, bound: str) -> None:
    """The total after the next receipt is known exactly; after a gap, only its least value is."""
    receipts = chain(10, 20, 30)
    wrong = replace(receipts[position], cumulative_cost=Amount(5))
    least = 10 + wrong.cost
    with pytest.raises(BadReceipt, match=f"expected {bound} {least} base units at seq {wrong.seq} "):
        check_sequence(wrong, AdjacentReceipts(below=receipts[0]))


def _chain(*costs: int) -> list[Receipt]:
    total, receipts = 0, list[Receipt]()
    for seq, each in enumerate(costs, 1):
        total += each
        digest = Hash(bytes([seq]) * 32)
        receipts.append(
            bill(place(), seq=seq, cost=Amount(each), cumulative_cost=Amount(total), order_hash=digest),
        )
    return receipts


def test_adjacent_receipts_are_the_nearest_on_each_side() -> None:
    """The adjacent receipts are those just below and above, the one with the same seq, and the one of the same order."""
    first, second, third, fourth, fifth = _chain(10, 20, 30, 40, 50)
    near = AdjacentReceipts.of(third, [first, fifth, second, fourth, third])
    assert (near.below, near.above, near.same_seq, near.same_order) == (second, fourth, None, None)
    same_seq = replace(third, finished_at=9, order_hash=Hash(b"\7" * 32))
    same_order = replace(third, seq=7, cumulative_cost=Amount(999))
    near = AdjacentReceipts.of(third, [same_seq, same_order, first])
    assert (near.below, near.above, near.same_seq, near.same_order) == (first, same_order, same_seq, same_order)
    assert AdjacentReceipts.of(third, []) == AdjacentReceipts()
    assert AdjacentReceipts.of(third, [third]) == AdjacentReceipts()


@pytest.mark.parametrize(("gap", "total", "fits"), [(1, 30, True), (1, 31, False), (1, 29, False), (2, 30, True), (2, 29, False)])
def test_totals_leave_room_for_missing_receipts(gap: int, total: int, fits: bool) -> None:
    """Totals of adjacent seqs are exact; across a gap they may be higher, and they are never lower."""
    lower = bill(place(), seq=5, cost=Amount(10), cumulative_cost=Amount(10))
    higher = bill(place(), seq=5 + gap, cost=Amount(20), cumulative_cost=Amount(total))
    for receipt, near in ((higher, AdjacentReceipts(below=lower)), (lower, AdjacentReceipts(above=higher))):
        if fits:
            check_sequence(receipt, near)
        else:
            with pytest.raises(BadReceipt, match=r"expected (exactly|at least)"):
                check_sequence(receipt, near)
    if gap == 2:
        check_sequence(replace(higher, cumulative_cost=Amount(31)), AdjacentReceipts(below=lower))


def test_a_first_receipt_has_the_total_of_its_cost() -> None:
    """A receipt with seq 1 must have its cost as its total; with a later seq and no known one below, it need not."""
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
    """A second receipt of a seq is reported as equivocation, a second receipt of an order as such."""
    first = bill(place())
    with pytest.raises(BadReceipt, match="equivocation"):
        check_sequence(replace(first, finished_at=1), AdjacentReceipts(same_seq=first))
    with pytest.raises(BadReceipt, match="already has a receipt, with seq 1"):
        check_sequence(replace(first, seq=2), AdjacentReceipts(below=first, same_order=first))

"""What other prices would have brought: exact integers, and nothing that a coordinator says breaks it."""

from __future__ import annotations

from typing import Any

import pytest

from node.pages.price_view import Earnings, OfferComparison, Offers, PaidJob, compare_offers, earnings_at, likely, read_question
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.pricing import Prices, Usage
from tallystick.protocol.types import Amount

ASKS: list[dict[str, object]] = [
    {"model": "a", "inputPrice": "100000", "outputPrice": "400000"},
    {"model": "b", "inputPrice": "1", "outputPrice": "2"},
]


def test_the_question() -> None:
    """Prices are decimal dollars; what is missing or wrong is as in the present ask, and says so."""
    assert read_question({}, []) is None
    now = read_question({}, ASKS)
    assert now is not None
    assert (now.model, now.prices, now.problem) == ("a", Prices(100_000, 100_000, 400_000), "")
    other = read_question({"model": "b", "input": "0.25", "output": ""}, ASKS)
    assert other is not None
    assert (other.model, other.prices.input, other.prices.output) == ("b", 250_000, 2)
    assert other.query == "&inputPrice=250000&outputPrice=2"
    for wrong in ("-1", "nan", "1e9999", "x" * 1_000, "0.00000001"):
        bad = read_question({"model": "none", "input": wrong}, ASKS)
        assert bad is not None
        assert (bad.model, bad.prices.input) == ("a", 100_000)
        assert bad.problem.startswith("Input: ")


def test_earnings() -> None:
    """Each job is rounded up as on a receipt; a job without a charge has none at other prices."""
    jobs = [PaidJob(Usage(1_000, 500, 10), 3), PaidJob(Usage(1, 0, 0), 1), PaidJob(Usage(9_999, 0, 9_999), 0)]
    assert earnings_at(jobs, Prices(2_000_000, 2_000_000, 1_000_000)) == Earnings(3, Amount(4), Amount(2_012))
    assert earnings_at([], Prices(1, 1, 1)) == Earnings(0, Amount(0), Amount(0))


def _decisions(*entries: tuple[int, str, str, str]) -> dict[str, Any]:
    return {"decisions": [{"at": at, "model": model, "stage": stage, "why": why} for at, model, stage, why in entries]}


OFFERED, WOULD = "offered to the client, place 1 of 3", "would have been offered to the client at this price"


def test_offers() -> None:
    """Shortlists of the model count; matches, and those of other models, do not."""
    raw = _decisions(
        (9, "a", "shortlist", OFFERED),
        (8, "a", "shortlist", WOULD),
        (8, "a", "shortlist", "all slots are taken"),
        (7, "a", "match", "got the job"),
        (6, "b", "shortlist", "all slots are taken"),
    )
    offers = Offers(3, 2, (("all slots are taken", 1),))
    assert compare_offers(raw, raw, "a") == OfferComparison(offers, offers, 0)
    assert offers.percent == 66
    assert Offers(0, 0, ()).percent == 0
    too_many = _decisions(*[(1, "a", "shortlist", "x")] * 501)
    no_text = {"decisions": [{"at": 1, "model": "a", "stage": "shortlist", "why": 3}]}
    malformed: list[Any] = [None, [], {"decisions": [{}]}, too_many, no_text]
    for bad in malformed:
        with pytest.raises(BadMessage):
            compare_offers(raw, bad, "a")


def test_requests_from_before_the_node_connected() -> None:
    """They count on neither side, since only the asks as they were can be told of; their number is said."""
    now = _decisions((9, "a", "shortlist", OFFERED), (8, "a", "shortlist", "too dear"), (3, "a", "shortlist", OFFERED))
    then = _decisions((9, "a", "shortlist", WOULD), (8, "a", "shortlist", WOULD))
    assert compare_offers(now, then, "a") == OfferComparison(Offers(2, 1, (("too dear", 1),)), Offers(2, 2, ()), 1)
    none = Offers(0, 0, ())
    assert compare_offers(now, _decisions(), "a") == OfferComparison(none, none, 3)
    further = _decisions((9, "a", "shortlist", WOULD), (8, "a", "shortlist", WOULD), (1, "a", "shortlist", WOULD))
    shorter = {"decisions": now["decisions"][:2]}
    assert compare_offers(shorter, further, "a").then == Offers(2, 2, ())
    assert compare_offers(shorter, further, "a").unknown == 0


@pytest.mark.parametrize(("now", "then", "expected"), [(2, 4, 200), (4, 2, 50), (3, 1, 33), (0, 5, None), (5, 0, 0)])
def test_as_many_jobs_as_offers(now: int, then: int, expected: int | None) -> None:
    """The guess follows the offers, and is none without any to compare with."""
    earnings = Earnings(5, Amount(90), Amount(100))
    guess = likely(earnings, Offers(9, now, ()), Offers(9, then, ()))
    assert guess == (None if expected is None else Amount(expected))

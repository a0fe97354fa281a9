"""The cost of a job, compared with a model that uses fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt, Terms
from tallystick.protocol.pricing import TEMPLATE_ALLOWANCE, Prices, Usage, charge, cost, prices_of, usage_of, worst_case
from tallystick.protocol.types import Amount
from tests.protocol.strategies import many, messages, some, uints

tokens = uints(32)
all_prices = st.builds(Prices, uints(64), uints(64), uints(64))


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    """Consistent token counts."""
    taken = draw(tokens)
    return Usage(taken, draw(st.integers(0, taken)), draw(tokens))


@given(usages(), all_prices)
@many
def test_cost_is_the_exact_sum_rounded_up(usage: Usage, prices: Prices) -> None:
    """The cost is fresh input, cached input and output at their prices per million, rounded up once to a base unit."""
    exact = (
        Fraction(prices.input, 10**6) * (usage.input - usage.cached)
        + Fraction(prices.cached_input, 10**6) * usage.cached
        + Fraction(prices.output, 10**6) * usage.output
    )
    assert cost(usage, prices) == math.ceil(exact)
    assert type(cost(usage, prices)) is Amount
    assert cost(usage, prices) < 2**96, "every cost fits the type that receipts carry it in"


@given(usages(), all_prices, st.integers(0, 2**20))
@many
def test_cost_is_monotone(usage: Usage, prices: Prices, more: int) -> None:
    """More tokens or higher prices never cost less; cheaper cached tokens never cost more."""
    base = cost(usage, prices)
    assert base >= 0
    assert cost(Usage(usage.input + more, usage.cached, usage.output), prices) >= base
    assert cost(Usage(usage.input, usage.cached, usage.output + more), prices) >= base
    for dearer in (
        Prices(prices.input + more, prices.cached_input, prices.output),
        Prices(prices.input, prices.cached_input + more, prices.output),
        Prices(prices.input, prices.cached_input, prices.output + more),
    ):
        assert cost(usage, dearer) >= base
    if prices.cached_input <= prices.input:
        assert cost(Usage(usage.input, 0, usage.output), prices) >= base


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Usage(0, 0, 0), 0),
        (Usage(1, 0, 0), 1),
        (Usage(1_000_000, 0, 0), 500_000),
        (Usage(1_000_000, 1_000_000, 0), 50_000),
        (Usage(0, 0, 1), 2),
        (Usage(2, 0, 1), 3),
        (Usage(1_000, 400, 250), 695),
    ],
)
def test_some_costs(usage: Usage, expected: int) -> None:
    """Costs at 0.50 dollars for input, 0.05 for cached input and 1.50 for output, per million tokens."""
    assert cost(usage, Prices(500_000, 50_000, 1_500_000)) == expected


@given(messages(Terms), usages(), st.sampled_from(Outcome))
@many
def test_a_charge_is_never_above_the_cap(terms: Terms, usage: Usage, outcome: Outcome) -> None:
    """A job is billed its cost, at most the signed cap, and nothing for an outcome that may not charge."""
    billed = charge(terms, usage, outcome)
    assert type(billed) is Amount
    assert 0 <= billed <= terms.max_cost
    if CHARGES[outcome] is Charge.NOTHING:
        assert billed == 0
    else:
        assert billed == min(cost(usage, prices_of(terms)), terms.max_cost)


@given(st.data(), all_prices, st.integers(0, 2**25), tokens)
@many
def test_the_worst_case_bounds_every_honest_charge(data: st.DataObject, prices: Prices, body: int, most: int) -> None:
    """No usage within the body's bytes and the ordered output costs more, also if cached tokens are more expensive."""
    bound = worst_case(body, most, prices)
    top = body + TEMPLATE_ALLOWANCE
    taken = data.draw(st.sampled_from([0, body, top]) | st.integers(0, top))
    cached = data.draw(st.sampled_from([0, taken]) | st.integers(0, taken))
    written = data.draw(st.sampled_from([0, most]) | st.integers(0, most))
    assert cost(Usage(taken, cached, written), prices) <= bound


@given(all_prices, st.integers(0, 2**25), tokens)
@some
def test_the_worst_case_is_tight(prices: Prices, body: int, most: int) -> None:
    """Some allowed usage costs exactly the worst case, so a payer never pledges more than necessary."""
    top = body + TEMPLATE_ALLOWANCE
    assert worst_case(body, most, prices) in {cost(Usage(top, 0, most), prices), cost(Usage(top, top, most), prices)}


@pytest.mark.parametrize("counts", [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (1, 2, 0), (0, 1, 0), (-1, -2, 0)])
def test_usage_that_contradicts_itself_is_a_bad_receipt(counts: tuple[int, int, int]) -> None:
    """Negative counts, and more cached input than input, are refused."""
    with pytest.raises(BadReceipt, match=r"^usage: "):
        Usage(*counts)


@given(messages(Receipt))
@some
def test_a_receipt_states_its_usage(receipt: Receipt) -> None:
    """The three counts of a receipt are its usage, unless they contradict each other."""
    if receipt.cached_input_tokens > receipt.input_tokens:
        with pytest.raises(BadReceipt):
            usage_of(receipt)
    else:
        assert usage_of(receipt) == Usage(receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens)


@given(messages(Terms))
@some
def test_prices_are_those_of_the_terms(terms: Terms) -> None:
    """Each price is used for its own kind of tokens."""
    assert prices_of(terms) == Prices(terms.input_price, terms.cached_input_price, terms.output_price)


def test_no_input_is_longer_than_the_context() -> None:
    """A picture's bytes are no tokens: the worst case ends at the ask's context, where that is known."""
    prices = Prices(10**6, 0, 10**6)
    assert worst_case(200_000, 50, prices) == 200_562
    assert worst_case(200_000, 50, prices, 8_192) == 8_242
    assert worst_case(100, 50, prices, 8_192) == 662

"""The cost of a job, computed alike by all parties. Prices are base units per 1,000,000 tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt, Terms
from tallystick.protocol.types import Amount

TOKENS_PER_PRICE = 1_000_000
TEMPLATE_ALLOWANCE = 512
"""The most tokens that a chat template may add to the client's text."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job. `cached` tokens are part of `input`. Raises BadReceipt for impossible counts."""

    input: int
    cached: int
    output: int

    def __post_init__(self) -> None:
        if not (0 <= self.cached <= self.input and self.output >= 0):
            raise BadReceipt(
                f"usage: expected cached tokens within the input and no negative count, got {self.cached} cached of {self.input} "
                f"input and {self.output} output tokens"
            )


@dataclass(frozen=True, slots=True)
class Prices:
    """Three prices in base units per 1,000,000 tokens."""

    input: int
    cached_input: int
    output: int


def prices_of(terms: Terms) -> Prices:
    """The prices in an order's terms."""
    return Prices(terms.input_price, terms.cached_input_price, terms.output_price)


def cost(usage: Usage, prices: Prices) -> Amount:
    """The cost in base units: ceil(sum(tokens * price) / 1,000,000)."""
    total = (usage.input - usage.cached) * prices.input + usage.cached * prices.cached_input + usage.output * prices.output
    return Amount(-(-total // TOKENS_PER_PRICE))


def charge(terms: Terms, usage: Usage, outcome: Outcome) -> Amount:
    """The charge in base units for this outcome and usage: at most `terms.max_cost`, which the payer signed."""
    if CHARGES[outcome] is Charge.NOTHING:
        return Amount(0)
    return Amount(min(cost(usage, prices_of(terms)), terms.max_cost))


def worst_case(body_bytes: int, max_output_tokens: int, prices: Prices, context_tokens: int = 0) -> Amount:
    """The highest possible cost of a text request, in base units, which the payer signs as the job's cap.

    A token has at least one byte, and a template adds at most TEMPLATE_ALLOWANCE tokens. Every input token counts at the higher
    of the two input prices, because only the provider knows which tokens were cached. No input is longer than the ask's context
    (`context_tokens`; zero: not known), however many bytes it has: a picture of 200 KB may be 1,400 tokens.
    """
    highest = Prices(max(prices.input, prices.cached_input), prices.cached_input, prices.output)
    longest = body_bytes + TEMPLATE_ALLOWANCE
    return cost(Usage(min(longest, context_tokens or longest), 0, max_output_tokens), highest)


def usage_of(receipt: Receipt) -> Usage:
    """The usage in a receipt. Raises BadReceipt for impossible counts."""
    return Usage(receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens)

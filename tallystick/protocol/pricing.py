"""What a job costs: one function, used by all sides. Prices are base units per 1,000,000 tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tallystick.protocol.errors import BadReceipt
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt, Terms
from tallystick.protocol.types import Amount

TOKENS_PER_PRICE = 1_000_000
TEMPLATE_ALLOWANCE = 512
"""Tokens that a chat template may add to what the client wrote, at most."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one job. Cached input tokens are a part of the input tokens."""

    input: int
    cached: int
    output: int

    def __post_init__(self) -> None:
        if not (0 <= self.cached <= self.input and self.output >= 0):
            raise BadReceipt(f"usage: {self.cached} cached of {self.input} input tokens, {self.output} output")


@dataclass(frozen=True, slots=True)
class Prices:
    """Base units per 1,000,000 tokens."""

    input: int
    cached_input: int
    output: int


def prices_of(terms: Terms) -> Prices:
    """The three prices that an order's terms fix."""
    return Prices(terms.input_price, terms.cached_input_price, terms.output_price)


def cost(usage: Usage, prices: Prices) -> Amount:
    """ceil(sum(tokens * price) / 1e6), in base units."""
    total = (usage.input - usage.cached) * prices.input + usage.cached * prices.cached_input + usage.output * prices.output
    return Amount(-(-total // TOKENS_PER_PRICE))


def charge(terms: Terms, usage: Usage, outcome: Outcome) -> Amount:
    """What a job with this outcome and usage is billed: never above the cap that the payer signed."""
    if CHARGES[outcome] is Charge.NOTHING:
        return Amount(0)
    return Amount(min(cost(usage, prices_of(terms)), terms.max_cost))


def worst_case(body_bytes: int, max_output_tokens: int, prices: Prices) -> Amount:
    """The cap to sign for a text request: a token is at least one byte, and the template adds a bounded few. Every input token
    counts at the dearer of its two prices, since it is the provider that says which ones were cached.
    """
    dearest = replace(prices, input=max(prices.input, prices.cached_input))
    return cost(Usage(body_bytes + TEMPLATE_ALLOWANCE, 0, max_output_tokens), dearest)


def usage_of(receipt: Receipt) -> Usage:
    """The usage that a receipt claims. Raises BadReceipt where it contradicts itself."""
    return Usage(receipt.input_tokens, receipt.cached_input_tokens, receipt.output_tokens)

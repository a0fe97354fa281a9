"""The score of an ask for one request: what the request is expected to cost with it, as a sum whose terms are shown. Pure.

| term | meaning |
|---|---|
| price | the likely input, less what its provider has cached at the cached price, and the expected output |
| loss | (1 - score of the provider) x what a failed job costs |
| integrity | (1 - integrity of what it sells, by audits) x what a failed job costs: a wrong answer costs as much |
| first_token | seconds to the first token x `Weights.first_token` |
| speed | seconds from then to the end of the expected output x `Weights.speed` |
| load | the share of slots that are taken x one part in LOAD_PART of the price |

A failed job costs as much as FAILED_JOBS jobs at the reference: the least price and time among the fitting providers of the best
class of reliability. FLOOR per token and `Weights.loss` are added. It does not depend on a provider's own price, so an ask at
price 0 gains nothing by failing. All terms are whole numbers of MICRO: a millionth of a base unit, since prices are per
1,000,000 tokens. Speeds are the coordinator's measurements in steps of about a fifth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from coordinator.domain.listed_ask import FULL_QUALITY, LATENCY_MS, OTHER, TOKEN_US, ListedAsk, latency_step, throughput_step
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.protocol.weights import NO_WEIGHTS, Weights

MICRO = 1_000_000
_MICRO_DECIMALS = 12
FAILED_JOBS = 2
FLOOR = 25_000
"""Base units per 1,000,000 tokens of a failed job."""
LOAD_PART = 20
DEFAULT_OUTPUT_TOKENS = 256
"""The expected output of a model of which nothing was measured yet."""
_MAX_TOKENS = (1 << 32) - 1
_DEFAULT_INPUT_PART = 3
"""Input tokens per output token of a request of which nothing is known."""
_SORT_WEIGHT = Amount(1_000_000)
"""Base units per second that the sort orders by speed count: a dollar a second, next to which hardly any price matters."""

Score = Callable[[Address], float]
"""Returns a provider's score, from 0 to 1."""


class ScoreTerms(NamedTuple):
    """The terms of one ask's score, in MICRO base units. The lowest total is best."""

    price: int
    loss: int
    first_token: int
    speed: int
    load: int
    integrity: int = 0

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return self[0] + self[1] + self[2] + self[3] + self[4] + self[5]

    def to_json(self) -> dict[str, str]:
        """Returns the terms and their sum in dollars, as exact decimal text."""
        terms = {"price": self.price, "loss": self.loss, "firstToken": self.first_token, "speed": self.speed, "load": self.load}
        terms["integrity"] = self.integrity
        return {name: format_amount(term, _MICRO_DECIMALS) for name, term in (terms | {"total": self.total}).items()}


_tuple = tuple.__new__
"""Makes a named tuple in half the time that its own constructor takes."""
Judged = tuple[ScoreTerms, float, int]
"""The terms of an ask's score, its provider's reputation, and the sum of the terms."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What the ranking knows of a request: its likely input and expected output in tokens, and what its client values.

    `holder`: the provider that has `cached_tokens` of the input in its cache.
    """

    input_tokens: int
    output_tokens: int
    weights: Weights = NO_WEIGHTS
    holder: Address | None = None
    cached_tokens: int = 0


def shape_of(
    input_tokens: int,
    max_output: int | None,
    mean_output: int | None = None,
    *,
    sort: str = "price",
    weights: Weights = NO_WEIGHTS,
    holder: Address | None = None,
    cached_tokens: int = 0,
) -> RequestShape:
    """Returns the shape of a request. `input_tokens`: 0 if unknown; `mean_output`: of the model's receipts, None without any.

    The expected output is that mean, and at most what the request allows. `sort` sets the weight of the speed that it names.
    """
    output = DEFAULT_OUTPUT_TOKENS if mean_output is None else mean_output
    if max_output is not None:
        output = min(output, max_output)
    if sort == "latency":
        weights = Weights(max(weights.first_token, _SORT_WEIGHT), weights.speed, weights.loss)
    elif sort in ("throughput", "speed"):
        weights = Weights(weights.first_token, max(weights.speed, _SORT_WEIGHT), weights.loss)
    output = min(output, _MAX_TOKENS)
    tokens = min(input_tokens or _DEFAULT_INPUT_PART * max(output, 1), _MAX_TOKENS)
    return RequestShape(tokens, output, weights, holder, min(cached_tokens, tokens))


ANY_REQUEST = shape_of(0, None)


def price_of(ask: Ask, shape: RequestShape) -> int:
    """Returns the price of a request of this shape with an ask, in MICRO base units."""
    price = shape.input_tokens * ask.input_price + shape.output_tokens * ask.output_price
    if shape.cached_tokens and ask.provider == shape.holder:
        price += shape.cached_tokens * (ask.cached_input_price - ask.input_price)
    return price


class Scorer:
    """Scores asks for one request. `refer` must set the reference before the first score."""

    __slots__ = (
        "_bases", "_cached", "_failure", "_first_token", "_holder", "_input", "_known", "_losses", "_output", "_risk", "_score",
        "_speed", "shape",
    )  # fmt: skip

    def __init__(self, shape: RequestShape, score: Score) -> None:
        self.shape, self._score = shape, score
        self._input, self._output = shape.input_tokens, shape.output_tokens
        self._first_token = int(shape.weights.first_token) * (MICRO // 1_000)
        self._speed = int(shape.weights.speed) * shape.output_tokens
        self._failure = self._risk = 0
        self._cached, self._holder = shape.cached_tokens, shape.holder
        self._known: dict[int, Judged] = {}
        self._bases: dict[int, tuple[int, int, int]] = {}
        self._losses: dict[float, int] = {}

    def price(self, listed_ask: ListedAsk) -> int:
        """The request's price with this ask."""
        ask = listed_ask.message
        if self._cached and ask.provider == self._holder:
            return price_of(ask, self.shape)
        return self._input * ask.input_price + self._output * ask.output_price

    def first_token(self, step: int) -> int:
        """What the time to the first token counts at this step of latency."""
        return self._first_token * LATENCY_MS[step]

    def speed(self, step: int) -> int:
        """What the time of the output counts at this step of throughput."""
        return self._speed * TOKEN_US[step]

    def _base(self, listed_ask: ListedAsk) -> tuple[int, int, int]:
        """Returns the price, the first token and the speed of an ask, the terms that do not depend on the reference."""
        return (
            self.price(listed_ask),
            self.first_token(latency_step(listed_ask.first_token_ms)) if self._first_token else 0,
            self.speed(throughput_step(listed_ask.tokens_per_second)) if self._speed else 0,
        )

    def refer(self, listed_asks: Sequence[ListedAsk]) -> None:
        """Sets what a failed job costs, from the fitting asks of the best class of reliability among these."""
        best, base = min([entry.slot_group.node.reliability for entry in listed_asks], default=OTHER), self._base
        self._bases = {id(entry): base(entry) for entry in listed_asks if entry.slot_group.node.reliability == best}
        worths = list(map(sum, self._bases.values()))
        floor = FLOOR * (self._input + self._output) + MICRO * int(self.shape.weights.loss)
        self._failure = FAILED_JOBS * min(worths, default=0) + floor
        self._risk = self._failure // INTEGRITY_STEPS
        self._known.clear()
        self._losses.clear()

    def judge(self, listed_ask: ListedAsk) -> Judged:
        """Returns the terms of an ask's score, its provider's reputation, from 0 to 1, and the sum of the terms."""
        known = self._known.get(id(listed_ask))
        if known is not None:
            return known
        price, first_token, speed = self._bases.get(id(listed_ask)) or self._base(listed_ask)
        group, score = listed_ask.slot_group, self._score(listed_ask.provider)
        loss = self._losses.get(score)
        if loss is None:
            loss = self._losses[score] = self._failure * (MICRO - int(MICRO * score)) // MICRO
        risk = self._risk * (INTEGRITY_STEPS - listed_ask.integrity)
        slots, taken = group.slots, group.taken
        load = (price * taken // (slots * LOAD_PART) if taken else 0) if slots else price // LOAD_PART
        terms = _tuple(ScoreTerms, (price, loss, first_token, speed, load, risk))
        known = self._known[id(listed_ask)] = terms, score, price + loss + first_token + speed + load + risk
        return known

    def least_loss(self, quality: int) -> int:
        """The least loss and risk of a provider whose quality does not exceed this one, of FULL_QUALITY."""
        return 2 * self._failure * (FULL_QUALITY - quality) // FULL_QUALITY

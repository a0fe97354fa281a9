"""What to audit, where to look, and whom to ask. Pure: randomness is an argument. It is secret, so nobody can prepare for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from tallystick.audit.integrity import BASE_RATE, MORE_RATE, Integrity, audit_rate
from tallystick.client.audit_settings import OwnReferee, PromptConsent
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Ask
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address

MAX_RATE: Final = BASE_RATE + MORE_RATE
"""The highest share of a provider's jobs that is audited. A draw above it needs no further look at the job."""
FIRST_POSITIONS: Final = 24
"""Positions from the beginning that are always looked at: a replayed answer shows there."""
MAX_PRICE_FACTOR: Final = 3
"""A referee may ask this many times the higher price of the audited answer."""
_DRAWS = 1 << 53

Random = Callable[[int], bytes]
"""Returns that many secret random bytes."""


def draw(random: Random) -> float:
    """A number from 0 to below 1."""
    return (int.from_bytes(random(8), "big") >> 11) / _DRAWS


def is_drawn(number: float, integrity: Integrity, jobs: int) -> bool:
    """Whether a job with this draw is audited. `jobs`: those that this wallet had from its provider."""
    return number < audit_rate(integrity, jobs)


def choose_positions(tokens: int, count: int, random: Random) -> tuple[int, ...]:
    """The positions of an answer to look at, ascending: its beginning, others at random, and its end.

    The choice does not depend on the answer's text, which the surprisal test needs.
    """
    if tokens + 1 <= count:
        return tuple(range(tokens + 1))
    first = min(FIRST_POSITIONS, count // 2)
    rest = list(range(first, tokens - 1))
    shuffle(rest, random)
    return (*range(first), *sorted(rest[: count - first - 2]), tokens - 1, tokens)


def shuffle(items: list[int], random: Random) -> None:
    """Shuffles in place (Fisher and Yates)."""
    for last in range(len(items) - 1, 0, -1):
        other = int(draw(random) * (last + 1))
        items[last], items[other] = items[other], items[last]


@dataclass(frozen=True, slots=True)
class RefereeChoice:
    """A referee of one audit: an engine of the user's own, or a provider with the ask on which it scores."""

    own: OwnReferee | None = None
    ask: Verified[Ask] | None = None

    @property
    def name(self) -> str:
        """What it is recorded as: `own:NAME`, or a provider's address."""
        if self.own is not None:
            return own_name(self.own)
        return "" if self.ask is None else self.ask.message.provider


def own_name(referee: OwnReferee) -> str:
    """What an engine of the user's own is recorded as."""
    return f"own:{referee.name}"


def is_own(name: str) -> bool:
    """Whether a recorded referee is an engine of the user's own."""
    return name.startswith("own:")


def choose_referee(
    *,
    provider: Address,
    model: str,
    precision: str,
    may_share: bool,
    own: Sequence[OwnReferee],
    asks: Sequence[Verified[Ask]],
    asked: Collection[str],
    distrusted: Collection[str],
    prices: tuple[int, int],
    random: Random,
) -> RefereeChoice | None:
    """The next referee of a job; None if nobody is left.

    Engines of the user's own come first: they see no new prompt and cannot be bribed. Of other providers, those of the same class
    are asked, in a random order, unless they cost much more than the answer did. `prices`: of its input and output, in base units
    per 1,000,000 tokens. `may_share`: whether they may see the prompt. `asked`: referees that have judged the job.
    """
    for referee in own:
        if referee.serves(model, precision) and own_name(referee) not in asked:
            return RefereeChoice(own=referee)
    if not may_share:
        return None
    fitting = [
        ask
        for ask in asks
        if ask.message.provider not in {provider, *asked, *distrusted}
        and precision_class(ask.message.spec.precision) == precision_class(precision)
        and ask.message.model == model
        and ask.message.input_price <= MAX_PRICE_FACTOR * max(prices)
        and ask.message.output_price <= MAX_PRICE_FACTOR * max(prices)
    ]
    return RefereeChoice(ask=fitting[int(draw(random) * len(fitting))]) if fitting else None


def may_show(consent: PromptConsent, *, synthetic: bool) -> bool:
    """Whether another provider may see a request because of its audit."""
    return synthetic or (consent.may_share and not consent.private)

"""Asks for some payers alone: a price that a provider gives to listed wallets, or to those that settled enough with it. Pure.

The ask says so in its features, which its provider signs: "for_payer:0x…" for each wallet, and "for_settled:N" for payers of whom
the chain has paid at least N base units to this provider. One of them is enough. Coordinators offer such an ask to these payers
alone, and the node refuses the orders of all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, format_amount

MAX_RULE_WALLETS = 32
"""Wallets that one ask may list: half of the features that it may have."""
_WALLET, _SETTLED = "for_payer:", "for_settled:"
_DIGITS = 30


@dataclass(frozen=True, slots=True)
class Payer:
    """A payer, and what it has settled with each provider, in base units. Unlisted providers count as 0."""

    account: Address
    settled: Mapping[Address, Amount] = field(hash=False)


STRANGER = Payer(ZERO_ADDRESS, {})
"""A payer that no rule admits."""


@dataclass(frozen=True, slots=True)
class PayerRule:
    """Whom an ask is for: `wallets`, and those that settled at least `settled` base units; None: the amount lets nobody in."""

    wallets: frozenset[Address] = frozenset()
    settled: Amount | None = None

    def admits(self, payer: Address, settled: Amount) -> bool:
        """Whether the ask is for a payer that has settled so many base units with its provider."""
        return payer in self.wallets or (self.settled is not None and settled >= self.settled)

    def check(self, payer: Address, settled: Amount) -> None:
        """Raises Refusal (tier_limit) for another payer than those that the ask is for."""
        if not self.admits(payer, settled):
            more = "" if self.settled is None else f"; {format_amount(self.settled - settled)} dollars more than now"
            raise Refusal(Code.TIER_LIMIT, f"terms.ask: this price is for {self.words}{more}. Order on another ask")

    def to_features(self) -> tuple[str, ...]:
        """The features that say so in an ask."""
        amounts = () if self.settled is None else (f"{_SETTLED}{self.settled}",)
        return *amounts, *(f"{_WALLET}{wallet}" for wallet in sorted(self.wallets))

    @property
    def words(self) -> str:
        """Whom the ask is for, for people."""
        listed = f"{len(self.wallets)} listed wallet" + ("s" if len(self.wallets) > 1 else "")
        if self.settled is None:
            return listed if self.wallets else "nobody"
        amount = f"payers that settled {format_amount(self.settled)} dollars with this provider"
        return f"{amount}, and {listed}" if self.wallets else amount


@lru_cache(maxsize=4_096)
def payer_rule(features: tuple[str, ...]) -> PayerRule | None:
    """Returns whom an ask with these features is for; None: for everybody. A rule that cannot be read is for nobody."""
    rules = rule_features(features)
    if not rules:
        return None
    wallets = frozenset(Address(rule.removeprefix(_WALLET)) for rule in rules if rule.startswith(_WALLET))
    amounts = [amount for rule in rules if rule.startswith(_SETTLED) and (amount := _amount(rule)) is not None]
    return PayerRule(wallets, min(amounts, default=None))


def _amount(rule: str) -> Amount | None:
    digits = rule.removeprefix(_SETTLED)
    return Amount(int(digits)) if digits.isascii() and digits.isdecimal() and len(digits) <= _DIGITS else None


def rule_features(features: Iterable[str]) -> list[str]:
    """Those of an ask's features that say whom it is for, in one order."""
    return sorted(feature.lower() for feature in features if feature.lower().startswith((_WALLET, _SETTLED)))


def is_for(ask: Ask, payer: Payer) -> bool:
    """Whether an ask is for this payer: it is for everybody, or the payer meets its rule."""
    rule = payer_rule(ask.spec.features)
    return rule is None or rule.admits(payer.account, payer.settled.get(ask.provider, Amount(0)))

"""Access tiers: limits for payers by their wallets, or by what a wallet has settled on chain. Pure.

Tiers are listed from the lowest to the highest. A wallet has the last tier that it meets, so that a wallet nobody knows has the
first one, which is for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.payer_rules import PayerRule
from tallystick.protocol.types import Address, Amount, format_amount

MAX_TIERS, MAX_WALLETS, MAX_MODELS = 16, 10_000, 1_000
_NAME = 64


@dataclass(frozen=True, kw_only=True)
class Tier:
    """One table of [[tiers]]. A wallet meets it if it is one of `wallets`, or if it settled `settled_at_least` base units.

    `models`: the models that it may use, all if empty. `jobs_in_flight`: its jobs at the same time, 0 for none;
    `jobs_per_minute`: its jobs in a minute. None limits nothing beyond the general limits. `discount`: what a node takes off
    its prices, such as "10%". Raises BadMessage.
    """

    name: str
    wallets: tuple[Address, ...] = ()
    settled_at_least: Amount | None = None
    models: tuple[str, ...] = ()
    jobs_in_flight: int | None = None
    jobs_per_minute: int | None = None
    discount: str | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _NAME or not self.name.isprintable():
            raise BadMessage(f"config: tiers: name: expected 1 to {_NAME} printable characters, got {self.name[:_NAME]!r}")
        where = f"config: tiers: {self.name}"
        for name, items, most in (("wallets", self.wallets, MAX_WALLETS), ("models", self.models, MAX_MODELS)):
            if len(items) > most:
                raise BadMessage(f"{where}: {name}: expected at most {most}, got {len(items)}")
        for model in self.models:
            if not 0 < len(model) <= 256:
                raise BadMessage(f"{where}: models: expected names of 1 to 256 characters, got {len(model)}")
        if self.settled_at_least is not None and self.settled_at_least <= 0:
            raise BadMessage(f"{where}: settled_at_least: expected more than 0 dollars; leave it out for everybody")
        if self.jobs_in_flight is not None and self.jobs_in_flight < 0:
            raise BadMessage(f"{where}: jobs_in_flight: expected a number from 0, got {self.jobs_in_flight}")
        if self.jobs_per_minute is not None and self.jobs_per_minute < 1:
            raise BadMessage(f"{where}: jobs_per_minute: expected a number from 1, got {self.jobs_per_minute}")

    @property
    def is_open(self) -> bool:
        """Whether every wallet meets it."""
        return not self.wallets and self.settled_at_least is None

    def sells(self, model: str) -> bool:
        """Whether its wallets may use a model."""
        return not self.models or model in self.models


class Tiers:
    """The tiers of a config, from the lowest to the highest. Raises BadMessage for a list that leaves a wallet without one.

    `where`: what counts as settled, in words.
    """

    def __init__(self, tiers: Sequence[Tier], where: str = "on chain") -> None:
        self._where = where
        if len(tiers) > MAX_TIERS:
            raise BadMessage(f"config: tiers: expected at most {MAX_TIERS}, got {len(tiers)}")
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            raise BadMessage("config: tiers: expected different names, got the same name twice")
        if tiers and not tiers[0].is_open:
            raise BadMessage(
                f"config: tiers: {tiers[0].name}: the first tier is for every wallet, so it has neither wallets nor"
                " settled_at_least; jobs_in_flight = 0 there lets no stranger in"
            )
        for tier in tiers[1:]:
            if tier.is_open:
                raise BadMessage(
                    f"config: tiers: {tier.name}: expected wallets or settled_at_least, or it hides the tiers before it"
                )
        self._check_order(tiers)
        self.tiers = tuple(tiers)
        self._wallets = [frozenset(tier.wallets) for tier in tiers]

    @staticmethod
    def _check_order(tiers: Sequence[Tier]) -> None:
        last = Amount(0)
        for tier in tiers:
            if tier.settled_at_least is not None:
                if tier.settled_at_least <= last:
                    least = format_amount(last)
                    raise BadMessage(
                        f"config: tiers: {tier.name}: settled_at_least: expected more than {least}, that of a tier before it,"
                        f" got {format_amount(tier.settled_at_least)}"
                    )
                last = tier.settled_at_least

    def __bool__(self) -> bool:
        return bool(self.tiers)

    def rule_of(self, tier: Tier) -> PayerRule:
        """Whom an ask is for that is priced for a tier: its wallets, and those of the tiers above it."""
        upwards = self.tiers[self.tiers.index(tier) :]
        amounts = [other.settled_at_least for other in upwards if other.settled_at_least is not None]
        wallets = frozenset(wallet for other in upwards for wallet in other.wallets)
        return PayerRule(wallets, min(amounts, default=None))

    @property
    def count_settled(self) -> bool:
        """Whether what a wallet has settled decides on its tier."""
        return any(tier.settled_at_least is not None for tier in self.tiers)

    def of(self, wallet: Address, settled: Amount) -> Tier | None:
        """Returns the tier of a wallet that has settled so many base units; None without any tiers."""
        for tier, wallets in zip(reversed(self.tiers), reversed(self._wallets), strict=True):
            earned = tier.settled_at_least is not None and settled >= tier.settled_at_least
            if tier.is_open or earned or wallet in wallets:
                return tier
        return None

    def lifts(self, tier: Tier, settled: Amount, model: str | None = None) -> str:
        """What would bring a wallet of this tier into a higher one, in words; of those only that sell `model`, if it is given."""
        higher = self.tiers[self.tiers.index(tier) + 1 :]
        better = [other for other in higher if model is None or other.sells(model)]
        priced = [other for other in better if other.settled_at_least is not None]
        if priced:
            needed = priced[0].settled_at_least or Amount(0)
            missing = format_amount(max(0, needed - settled))
            return f"tier {priced[0].name!r} needs {format_amount(needed)} dollars settled {self._where}, {missing} more than now"
        if better:
            return f"tier {better[0].name!r} is for wallets that its operator lists; ask the operator"
        return "no tier lifts this limit"

    def check(self, tier: Tier, settled: Amount, model: str) -> None:
        """Raises Refusal (tier_limit) for a model that a tier does not sell, or for any job if it has none."""
        if tier.jobs_in_flight == 0:
            text = f"wallets of tier {tier.name!r} may send no jobs here; {self.lifts(tier, settled)}"
            raise Refusal(Code.TIER_LIMIT, text)
        self.check_model(tier, settled, model)

    def check_running(self, tier: Tier, settled: Amount, running: int) -> None:
        """Raises Unavailable (rate_limited) if a payer has as many jobs already as its tier allows at the same time."""
        if tier.jobs_in_flight is not None and running >= tier.jobs_in_flight:
            text = f"this payer has {running} jobs here; tier {tier.name!r} allows {tier.jobs_in_flight} at the same time"
            error = Unavailable(Code.RATE_LIMITED, f"{text} (jobs_in_flight); {self.lifts(tier, settled)}", fault=Fault.CLIENT)
            error.retry_after = 1
            raise error

    def check_model(self, tier: Tier, settled: Amount, model: str) -> None:
        """Raises Refusal (tier_limit) for a model that a tier does not sell."""
        if not tier.sells(model):
            lift = self.lifts(tier, settled, model)
            raise Refusal(Code.TIER_LIMIT, f"model {model!r} is not for wallets of tier {tier.name!r}; {lift}")

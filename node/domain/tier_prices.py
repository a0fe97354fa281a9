"""Prices per access tier: the further offers, at a discount, that are for payers of a tier and of those above it alone. Pure."""

from __future__ import annotations

from datetime import datetime

from node.domain.dynamic_pricing import PriceRule, apply_price_rules, percent_off
from node.domain.published_asks import Offer, for_payers
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.payer_rules import MAX_RULE_WALLETS, PayerRule
from tallystick.protocol.tiers import Tier, Tiers


class TierPrices:
    """The discounts of a config's tiers. Raises BadMessage for one that no ask can say."""

    def __init__(self, tiers: Tiers) -> None:
        self._prices: list[tuple[Tier, PayerRule, PriceRule]] = []
        for tier in tiers.tiers:
            if tier.discount is None:
                continue
            where, rule = f"tiers: {tier.name}: discount", tiers.rule_of(tier)
            if tier.is_open:
                raise BadMessage(f"config: {where}: expected none, since the tier is for every wallet; lower the price itself")
            if len(rule.wallets) > MAX_RULE_WALLETS:
                text = f"its ask must list the wallets of the tier and of those above it: expected at most {MAX_RULE_WALLETS}"
                raise BadMessage(f"config: {where}: {text}, got {len(rule.wallets)}")
            self._prices.append((tier, rule, percent_off(tier.discount, where)))

    def offers(self, offer: Offer, when: datetime, load: float) -> tuple[Offer, ...]:
        """The further offers of a model that is offered to everybody."""
        return tuple(
            for_payers(offer, apply_price_rules(offer.prices, (discount,), when, load), rule)
            for tier, rule, discount in self._prices
            if discount.percent < 100 and tier.sells(offer.model)
        )

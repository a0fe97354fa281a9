"""When a node pays out its credit by itself, and when gas would cost too much. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, format_amount

WEI_PER_COIN = 10**18


@dataclass(frozen=True, slots=True, kw_only=True)
class PayoutPolicy:
    """When to pay out. Amounts are base units.

    `min_amount`: the credit from which it is paid out (None: never); `address`: where to (None: the payout address on chain);
    `coin_price`: price of one coin of the chain, from which the gas cost follows; `max_gas_percent`: the largest gas cost in
    percent of the payout; `check_interval`: seconds between two looks at the credit.
    """

    min_amount: Amount | None = None
    address: Address | None = None
    coin_price: Amount | None = None
    max_gas_percent: int = 5
    check_interval: float = 60.0

    def __post_init__(self) -> None:
        if self.min_amount is not None and self.min_amount < 1:
            raise BadMessage("config: payout.min_amount: expected more than 0 dollars; leave it out to never pay out")
        if not 1 <= self.max_gas_percent <= 100:
            raise BadMessage(f"config: payout.max_gas_percent: expected 1 to 100, got {self.max_gas_percent}")
        if self.check_interval <= 0:
            raise BadMessage(f"config: payout.check_interval: expected more than 0 seconds, got {self.check_interval}")

    def gas_cost(self, wei: int) -> int:
        """The cost of so many wei in base units, rounded up."""
        return -(-wei * int(self.coin_price or 0) // WEI_PER_COIN)

    def objection(self, credit: int, wei: int) -> str:
        """Returns why a credit is not paid out now, if gas costs `wei`; an empty text if it is."""
        if self.min_amount is None:
            return "not automatic"
        if credit < self.min_amount:
            return f"{format_amount(Amount(credit))} of {format_amount(self.min_amount)} dollars are credited"
        cost = self.gas_cost(wei)
        if cost * 100 > credit * self.max_gas_percent:
            return (
                f"gas would cost {format_amount(Amount(cost))} dollars, more than {self.max_gas_percent} % of "
                f"{format_amount(Amount(credit))}"
            )
        return ""

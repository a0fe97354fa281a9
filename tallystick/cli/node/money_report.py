"""Where a provider's money is, as a report for people and for programs."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tallystick.cli.output import dollars, json_fields
from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.domain.earned_money import EarnedMoney, TabMoney
    from node.service.config import NodeConfig
    from tallystick.chain.escrow import ProviderAccount


@dataclass(frozen=True, slots=True)
class MoneyReport:
    """Where the earned money and the stake of a provider are. `account` is None if the chain was not read.

    `least`: a tab with less (base units) is accrued, not claimable.
    """

    provider: Address
    tabs: Sequence[TabMoney]
    money: EarnedMoney
    least: Amount
    account: ProviderAccount | None = None

    def to_json(self) -> dict[str, Any]:
        """Members of the JSON document. The amounts in `where` add up to `earned`."""
        places = {column.name: getattr(self.money, column.name) for column in fields(self.money)}
        if self.account is None:
            settled = Amount(sum(places.pop(name) for name in ("coordinator_fees", "credited", "cashed_out")))
            return {"earned": str(int(self.money.earned)), "where": json_fields(places | {"settled": settled})}
        stake = {"staked": self.account.stake, "leaving": self.account.unstaking, "leaves_at": self.account.unstake_at}
        return {
            "earned": str(int(self.money.earned)),
            "where": json_fields(places),
            "stake": json_fields(stake),
            "otherCredit": str(self._other_credit),
            "payoutAddress": self.account.payout,
        }

    @property
    def _other_credit(self) -> int:
        """Credit that is not from jobs: fees as a coordinator, rewards for evidence. Base units."""
        return 0 if self.account is None else self.account.credit - self.money.credited

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows for a table: the place, the dollars, and what it is or how to get it."""
        money, account = self.money, self.account
        rows: list[tuple[str, int, str]] = [
            ("accrued", money.accrued, f"on tabs below {format_amount(self.least)}: collect with --min-amount 0"),
            ("claimable", money.claimable, "claimed by the node; now: tally node collect"),
            ("owed on trust", money.owed_on_trust, f"signed for, but purses are empty{self._until()}"),
            ("lost", money.lost, "the orders behind it have expired"),
        ]
        if account is None:
            settled = money.coordinator_fees + money.credited + money.cashed_out
            rows += [("settled", settled, "without --offline: credited, cashed out, fees")]
        else:
            rows += [
                ("coordinators' fees", money.coordinator_fees, "kept by those that settled"),
                ("credited", money.credited, "in the escrow; tally cash-out pays it out"),
                ("cashed out", money.cashed_out, "paid out of the escrow"),
            ]
        rows.append(("earned", money.earned, "the sum of the above and of all receipts"))
        if account is not None:
            rows += [
                (name, amount, text)
                for name, amount, text in (
                    ("other credit", self._other_credit, "fees as a coordinator, or rewards; tally cash-out pays it too"),
                    ("stake", account.stake, "tally unstake AMOUNT, wait, tally unstake"),
                    ("stake, leaving", account.unstaking, f"tally unstake, from {moment(account.unstake_at)} on"),
                )
                if amount
            ]
        return [(name, format_amount(Amount(amount)), text) for name, amount, text in rows]

    def _until(self) -> str:
        """Until when the first amount that is owed on trust can be collected."""
        owing = [tab.claim_by for tab in self.tabs if tab.owed_on_trust]
        return f"; the first order expires at {moment(min(owing))}" if owing else ""


def moment(at: int) -> str:
    """A time of the chain or this machine (Unix seconds) in this machine's zone."""
    return time.strftime("%F %T", time.localtime(at))


def payout_text(loaded: NodeConfig) -> str:
    """Whether and when the node pays out by itself."""
    if loaded.payout.min_amount is None:
        return "not automatic: tally cash-out, or min_amount under [payout] in the config"
    target = loaded.payout.address or "the payout address"
    return f"automatic from {dollars(loaded.payout.min_amount)} on, to {target}"

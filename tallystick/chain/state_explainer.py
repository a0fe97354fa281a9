"""Explanations of the escrow's state for people: the meaning of a purse, tab or account, and the possible next steps. Pure.

Times are the chain's, in Unix seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from tallystick.chain.escrow import EscrowRules, ProviderAccount, Purse, TabState
from tallystick.protocol.types import Address, Amount, format_amount

REPORTER_PERCENT = 20
_UNITS = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))


@dataclass(frozen=True, slots=True)
class Step:
    """A possible next step: the actor, the action, the contract's call, the command, and the earliest time (0: now)."""

    actor: str
    action: str
    call: str
    command: str = ""
    at: int = 0
    account: Address | None = None
    """The actor's account, if it is known."""

    def to_json(self) -> dict[str, object]:
        """The step for programs. `command` is null if `tally` has no command for it."""
        step: dict[str, object] = {"who": self.actor, "account": self.account, "what": self.action, "call": self.call}
        return step | {"command": self.command or None, "at": self.at or None}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One word for programs (`state`), sentences for people, and the possible next steps."""

    state: str
    sentences: tuple[str, ...]
    next_steps: tuple[Step, ...]


def span(seconds: int) -> str:
    """A duration in its two largest units: "1 day 2 hours"."""
    parts = []
    for size, name in _UNITS:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {name}{'s' if count > 1 else ''}")
    return " ".join(parts[:2]) or "0 seconds"


def utc(at: int) -> str:
    """A Unix time as text, to the second."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def moment(at: int, now: int) -> str:
    """A future time as text, relative and absolute; "now" if it is past."""
    return "now" if at <= now else f"in {span(at - now)}, at {utc(at)}"


class StateExplainer:
    """Explains state by the deployment's rules and the chain's time. `money` formats amounts."""

    def __init__(self, rules: EscrowRules, now: int, money: Callable[[Amount], str] = format_amount) -> None:
        self._rules, self._now, self._money = rules, now, money

    def purse(self, purse: Purse) -> Explanation:
        """A payer's deposit."""
        if purse.owner is None:
            unknown = "No purse was ever opened for this key, so orders that it signs cannot be paid."
            step = Step("the key, or anyone with its signature", "open and fill it", "open", "tally deposit AMOUNT")
            return Explanation("unopened", (unknown,), (step,))
        free = Amount(purse.free - purse.thawing)
        sentences = [
            f"{self._money(free)} is free: it is reserved for no provider and pays all providers on orders that the key signed.",
        ]

        def owner(action: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the owner", action, call, command, at, purse.owner)

        steps = [
            owner("deposit more", "deposit", "tally deposit AMOUNT"),
            owner(f"reserve up to {self._money(free)} for a provider", "reserve", "tally reserve PROVIDER AMOUNT"),
            owner(f"start a withdrawal, which is possible {span(self._rules.thaw)} later", "thaw", "tally thaw AMOUNT"),
        ]
        if not purse.thawing:
            return Explanation("open" if free else "empty", tuple(sentences), tuple(steps if free else steps[:1]))
        amount, ready = self._money(purse.thawing), purse.thaw_at <= self._now
        sentences.append(
            f"{amount} is under thaw: the owner may withdraw it {moment(purse.thaw_at, self._now)}. Until then it still pays "
            "providers, and no reservation is refilled."
        )
        out = [
            owner(f"withdraw {amount}", "withdraw", "tally withdraw", 0 if ready else purse.thaw_at),
            owner("cancel the thaw", "cancelThaw", "tally thaw --cancel"),
        ]
        return Explanation("thawed" if ready else "thawing", tuple(sentences), (*out, *steps[:2]) if free else (*out, steps[0]))

    def tab(self, tab: TabState, purse: Purse) -> Explanation:
        """One payer's account with one provider; `purse` is the payer's."""

        def owner(action: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the purse's owner", action, call, command, at, purse.owner)

        sentences = [f"This payer has paid the provider {self._money(tab.settled)} in all."]
        collect = Step(
            "the provider, or anyone with its signed claim", "collect the amount that receipts and orders allow", "settle"
        )
        reserve = owner("reserve more", "reserve", "tally reserve PROVIDER AMOUNT")
        if not tab.reserved and not tab.release_at:
            free = self._money(purse.free)
            sentences.append(
                f"Nothing is reserved for it. It can collect from the purse's {free} unless other providers collect that first."
            )
            return Explanation("open" if tab.settled else "unused", tuple(sentences), (collect, reserve) if purse.owner else ())
        reserved = self._money(tab.reserved)
        sentences.append(
            f"{reserved} is reserved: only this provider can collect it." if tab.reserved else "Nothing is reserved any more."
        )
        back = (
            [Step("the provider", "give back any part of it at once", "giveBack", "tally give-back PAYER")]
            if tab.reserved
            else []
        )
        if not tab.release_at:
            start = f"start the release, after which it is free again {span(self._rules.release)} later"
            release = owner(start, "release", "tally release PROVIDER")
            return Explanation("reserved", tuple(sentences), (collect, reserve, release, *back))
        ready = tab.release_at <= self._now
        sentences.append(
            f"The owner has started a release and may take it back {moment(tab.release_at, self._now)}. Until then the provider "
            "can collect it, and it is not refilled."
        )
        at = 0 if ready else tab.release_at
        finish = owner(
            f"take back {reserved}" if tab.reserved else "end the release", "finishRelease", "tally release PROVIDER", at
        )
        stop = owner("reserve more, which cancels the release", "reserve", "tally reserve PROVIDER AMOUNT")
        return Explanation("released" if ready else "releasing", tuple(sentences), (collect, finish, stop, *back))

    def provider(self, account: ProviderAccount, address: Address) -> Explanation:
        """Credit and stake of an account."""

        def holder(action: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the account itself", action, call, command, at, address)

        sentences, steps = list[str](), list[Step]()
        if account.credit:
            sentences.append(f"{self._money(account.credit)} can be cashed out; it goes to {account.payout}.")
            cash_out = f"pay {self._money(account.credit)} to {account.payout}"
            steps.append(Step("anyone", cash_out, "cashOut", f"tally cash-out --account {address}"))
        else:
            sentences.append("No credit is left to cash out.")
        total, penalty = account.stake + account.unstaking, self._money(self._rules.penalty)
        if total:
            sentences.append(
                f"{self._money(account.stake)} is staked. Two contradicting receipts, or a claim above a receipt, cost up to "
                f"{penalty} each, of which the reporter gets {REPORTER_PERCENT} %."
            )
            leave = f"start a withdrawal, which is possible {span(self._rules.unstake)} later"
            steps.append(holder(leave, "unstake", "tally unstake AMOUNT"))
        else:
            sentences.append("Nothing is staked, so evidence against this account would cost it nothing.")
            steps.append(holder("stake", "stake", "tally stake AMOUNT"))
        ready = account.unstake_at <= self._now
        if account.unstaking:
            amount = self._money(account.unstaking)
            sentences.append(
                f"{amount} more is leaving: it may be withdrawn {moment(account.unstake_at, self._now)} and slashed until then."
            )
            at = 0 if ready else account.unstake_at
            steps.append(holder(f"withdraw {amount} of the stake", "withdrawStake", "tally unstake", at))
            steps.append(holder("cancel the withdrawal", "unstake", "tally unstake --cancel"))
        if account.fee_bps:
            rate = format_amount(account.fee_bps, 2)
            sentences.append(f"As a coordinator it charges {rate} % of each payment, or less if the order limits the fee.")
        state = "unstaking" if account.unstaking else "staked" if account.stake else "unstaked"
        return Explanation("withdrawable" if account.unstaking and ready else state, tuple(sentences), tuple(steps))

    def rules(self) -> Explanation:
        """The rules of the deployment."""
        rules = self._rules
        sentences = (
            f"A payer can withdraw free money {span(rules.thaw)} after it announced that (thaw).",
            f"A payer can take a reservation back {span(rules.release)} after it announced that (release).",
            f"A provider can withdraw stake {span(rules.unstake)} after it announced that (unstake), which is longer than both.",
            f"One piece of evidence costs a provider up to {self._money(rules.penalty)}.",
            f"The reporter gets {REPORTER_PERCENT} % of it, and {rules.treasury} the rest.",
            "None of this can be changed: the contract has no owner, no upgrade and no pause.",
        )
        return Explanation("fixed", sentences, ())

"""What the escrow's state means, in words: what it is, what it lets whom do, and what can be done next, by whom, when. Pure.

Each function says it of one thing; times are the chain's.
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
    """Something that can be done: by whom, with which command and which call of the contract, from when on (0: now)."""

    actor: str
    action: str
    call: str
    command: str = ""
    at: int = 0
    account: Address | None = None
    """Of `actor`, where it is one account that is known."""

    def to_json(self) -> dict[str, object]:
        """The step for programs; `command` is null where `tally` has none."""
        step: dict[str, object] = {"who": self.actor, "account": self.account, "what": self.action, "call": self.call}
        return step | {"command": self.command or None, "at": self.at or None}


@dataclass(frozen=True, slots=True)
class Explanation:
    """`state` is one word for programs, `sentences` are for people."""

    state: str
    sentences: tuple[str, ...]
    next_steps: tuple[Step, ...]


def span(seconds: int) -> str:
    """A length of time in its two largest units: "1 day 2 hours"."""
    parts = []
    for size, name in _UNITS:
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {name}{'s' if count > 1 else ''}")
    return " ".join(parts[:2]) or "0 seconds"


def utc(at: int) -> str:
    """A time of the chain, to the second."""
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def moment(at: int, now: int) -> str:
    """A time as people want it: how far it is, and when that is."""
    return "now" if at <= now else f"in {span(at - now)}, at {utc(at)}"


class StateExplainer:
    """Knows the deployment's rules, the chain's time, and how to write money."""

    def __init__(self, rules: EscrowRules, now: int, money: Callable[[Amount], str] = format_amount) -> None:
        self._rules, self._now, self._money = rules, now, money

    def purse(self, purse: Purse) -> Explanation:
        """A payer's deposit."""
        if purse.owner is None:
            unknown = "No purse was ever opened for this key: orders that it signs cannot be paid."
            step = Step("the key, or anyone with its signature", "open it, and fill it", "open", "tally deposit AMOUNT")
            return Explanation("unopened", (unknown,), (step,))
        free = Amount(purse.free - purse.thawing)
        says = [
            f"{self._money(free)} is free: it pays what any provider collects on orders that the key signed, pledged to none.",
        ]

        def owner(what: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the owner", what, call, command, at, purse.owner)

        steps = [
            owner("add to it", "deposit", "tally deposit AMOUNT"),
            owner(f"pledge up to {self._money(free)} to a provider", "reserve", "tally reserve PROVIDER AMOUNT"),
            owner(f"start taking it out: {span(self._rules.thaw)} later it may leave", "thaw", "tally thaw AMOUNT"),
        ]
        if not purse.thawing:
            return Explanation("open" if free else "empty", tuple(says), tuple(steps if free else steps[:1]))
        amount, ready = self._money(purse.thawing), purse.thaw_at <= self._now
        says.append(
            f"{amount} is leaving: the owner may withdraw it {moment(purse.thaw_at, self._now)}. Until it does, it still pays "
            "what providers collect. No reservation is refilled meanwhile."
        )
        out = [
            owner(f"withdraw {amount}", "withdraw", "tally withdraw", 0 if ready else purse.thaw_at),
            owner("call the thaw off", "cancelThaw", "tally thaw --cancel"),
        ]
        return Explanation("thawed" if ready else "thawing", tuple(says), (*out, *steps[:2]) if free else (*out, steps[0]))

    def tab(self, tab: TabState, purse: Purse) -> Explanation:
        """One payer's account with one provider; `purse` is the payer's."""

        def owner(what: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the purse's owner", what, call, command, at, purse.owner)

        says = [f"The provider was paid {self._money(tab.settled)} by this payer, in all."]
        collect = Step("the provider, or anyone with its signed claim", "collect what receipts and orders allow", "settle")
        reserve = owner("pledge more", "reserve", "tally reserve PROVIDER AMOUNT")
        if not tab.reserved and not tab.release_at:
            free = self._money(purse.free)
            says.append(f"Nothing is reserved for it. It can collect out of the purse's {free}, as long as others do not first.")
            return Explanation("open" if tab.settled else "unused", tuple(says), (collect, reserve) if purse.owner else ())
        reserved = self._money(tab.reserved)
        says.append(f"{reserved} is reserved" + (": nobody but this provider can collect it." if tab.reserved else " any more."))
        back = [Step("the provider", "give back any part of it at once", "giveBack")] if tab.reserved else []
        if not tab.release_at:
            wait = f"start taking it back: {span(self._rules.release)} later it is free again"
            release = owner(wait, "release", "tally release PROVIDER")
            return Explanation("reserved", tuple(says), (collect, reserve, release, *back))
        ready = tab.release_at <= self._now
        says.append(
            f"The owner is taking it back, and may do so {moment(tab.release_at, self._now)}. Until then the provider can "
            "collect it. It is not refilled meanwhile."
        )
        at = 0 if ready else tab.release_at
        finish = owner(
            f"take back {reserved}" if tab.reserved else "end the release", "finishRelease", "tally release PROVIDER", at
        )
        stop = owner("pledge more, which calls the release off", "reserve", "tally reserve PROVIDER AMOUNT")
        return Explanation("released" if ready else "releasing", tuple(says), (collect, finish, stop, *back))

    def provider(self, account: ProviderAccount, address: Address) -> Explanation:
        """Credit and stake of an account."""

        def itself(what: str, call: str, command: str, at: int = 0) -> Step:
            return Step("the account itself", what, call, command, at, address)

        says, steps = list[str](), list[Step]()
        if account.credit:
            says.append(f"{self._money(account.credit)} is earned and not yet cashed out; it goes to {account.payout}.")
            out = f"pay {self._money(account.credit)} to {account.payout}"
            steps.append(Step("anyone", out, "cashOut", f"tally cash-out --account {address}"))
        else:
            says.append("Nothing is earned that was not cashed out.")
        total, penalty = account.stake + account.unstaking, self._money(self._rules.penalty)
        if total:
            says.append(
                f"{self._money(account.stake)} is staked. Two contradicting receipts, or a claim above a receipt, cost up to "
                f"{penalty} each: {REPORTER_PERCENT} % goes to whoever reports it."
            )
            leave = f"start taking it out: {span(self._rules.unstake)} later it may leave"
            steps.append(itself(leave, "unstake", "tally unstake AMOUNT"))
        else:
            says.append("Nothing is staked: evidence against this account would cost it nothing.")
            steps.append(itself("stake", "stake", "tally stake AMOUNT"))
        ready = account.unstake_at <= self._now
        if account.unstaking:
            amount = self._money(account.unstaking)
            says.append(
                f"{amount} more is leaving: it may be withdrawn {moment(account.unstake_at, self._now)}, and lost until then."
            )
            at = 0 if ready else account.unstake_at
            steps.append(itself(f"withdraw {amount} of the stake", "withdrawStake", "tally unstake", at))
            steps.append(itself("let it stay", "unstake", "tally unstake --cancel"))
        if account.fee_bps:
            rate = format_amount(account.fee_bps, 2)
            says.append(f"As a coordinator it asks for {rate} % of what it settles, or less where an order says so.")
        state = "unstaking" if account.unstaking else "staked" if account.stake else "unstaked"
        return Explanation("withdrawable" if account.unstaking and ready else state, tuple(says), tuple(steps))

    def rules(self) -> Explanation:
        """The deployment itself."""
        rules = self._rules
        says = (
            f"A payer's free money leaves its purse {span(rules.thaw)} after it was announced (thaw).",
            f"A reservation returns to the purse {span(rules.release)} after that was announced (release).",
            f"A stake leaves {span(rules.unstake)} after it was announced (unstake): longer than both, for evidence to come.",
            f"One piece of evidence costs a provider up to {self._money(rules.penalty)}.",
            f"Of that, {REPORTER_PERCENT} % goes to whoever reported it, the rest to {rules.treasury}.",
            "None of this can be changed: the contract has no owner, no upgrade and no pause.",
        )
        return Explanation("fixed", says, ())

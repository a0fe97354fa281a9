"""For any calls in any order, the contract does what the model says, and the invariants below hold. The state machine drives
the real bytecode. TALLYSTICK_PROOF=deep runs many times longer, and brief a fraction.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.codec import ContractError
from tallystick.chain.events import (
    CashedOut,
    Event,
    FeeEarned,
    Settled,
    Slashed,
    ThawCancelled,
    ThawStarted,
    Unstaked,
    UnstakeStarted,
    Withdrawn,
)
from tallystick.chain.token import Permit, ReceiveWithAuthorization, SignedAuthorization, SignedPermit, split_signature
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.messages import Bind, Claim, ClaimRow, Receipt, Release
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount, Hash, Seconds
from tests.chain.harness import as_read
from tests.contracts.actors import (
    KEYS,
    PEOPLE,
    PROVIDERS,
    RULES,
    THIEF,
    addresses,
    amounts,
    anyone,
    begin,
    claims,
    coin_domain,
    coordinators,
    evidence,
    keys,
    papers,
    person_at,
    places,
    providers,
    rarely_wrong,
    rates,
    rows,
    snake_case,
)
from tests.contracts.market_harness import FAR, U96
from tests.contracts.model import without_fees
from tests.contracts.model_state import ModelRefusal


class Escrow(RuleBasedStateMachine):
    """People, purses, tabs and stakes on one chain, beside the book with their expected state."""

    def __init__(self) -> None:
        super().__init__()
        self.market, self.book = begin()
        self.ceilings: defaultdict[tuple[Address, Address], int] = defaultdict(int)
        self.thaws: dict[Address, tuple[int, int]] = {}
        self.leaving: dict[Address, tuple[int, int]] = {}
        self.rows: defaultdict[Address, list[SettleRow]] = defaultdict(list)
        self.donated, self.broken = 0, False

    # ------------------------------------------------------------------------------------------------------------- a call

    def play(self, must: Callable[[], list[Event]], call: Callable[[], tuple[Event, ...]]) -> None:
        """Makes one call: contract and model both refuse alike, or both succeed with the same events."""
        self.broken = True
        before = {person.address: self.book.wealth(person.address) for person in PEOPLE}
        facts, refusal = _outcome(must)
        if refusal is not None:
            with pytest.raises(ContractError) as caught:
                call()
            assert caught.value.name == refusal.name, f"{caught.value}, but it must be {refusal}"
            assert refusal.values.items() <= caught.value.values.items()
        events = () if refusal else call()
        fees = sum(event.fee for event in events if isinstance(event, Settled))
        assert sum(event.amount for event in events if isinstance(event, FeeEarned)) == fees
        same = [replace(e, evidence=ZERO_HASH) if isinstance(e, Slashed) else e for e in without_fees(events)]
        assert same == facts
        self.follow(facts)
        self.losers(before, facts)
        self.broken = False

    def do(self, sender: Address, function: str, *arguments: object) -> None:
        """Makes a call that the model has under the same name and with the same arguments."""
        must = getattr(self.book, snake_case(function))
        given = [part for a in arguments for part in ((a.message, a.signature) if isinstance(a, Signed) else (a,))]
        self.play(lambda: must(sender, *arguments), lambda: self.market.call(sender, function, *given))

    def follow(self, facts: list[Event]) -> None:
        """Free money leaves to an owner, and a stake to a provider, only if it was announced long enough ago."""
        now = self.book.now
        for fact in facts:
            match fact:
                case ThawStarted():
                    self.thaws[fact.key] = (fact.amount, now)
                case ThawCancelled():
                    del self.thaws[fact.key]
                case Withdrawn():
                    amount, since = self.thaws.pop(fact.key)
                    assert fact.amount <= amount
                    assert now >= since + RULES.thaw
                case UnstakeStarted():
                    self.leaving[fact.provider] = (fact.amount, now)
                case Unstaked():
                    amount, since = self.leaving.pop(fact.provider)
                    assert fact.amount <= amount
                    assert now >= since + RULES.unstake

    def losers(self, before: dict[Address, int], facts: list[Event]) -> None:
        """An account becomes poorer only by a signature of its key, a receipt, or its own payout address."""
        willing = {self.book.purses[fact.payer].owner for fact in facts if isinstance(fact, Settled)}
        willing |= {fact.provider for fact in facts if isinstance(fact, Slashed)}
        willing |= {fact.account for fact in facts if isinstance(fact, CashedOut) and fact.payout != fact.account}
        assert {account for account, wealth in before.items() if self.book.wealth(account) < wealth} <= willing

    # ------------------------------------------------------------------------------------------------------------- purses

    def owner(self, key: Signer, *, wrong: bool) -> Address:
        """The owner of a purse, who may act on it, or a thief."""
        purse = self.book.purses.get(key.address)
        return THIEF.address if wrong or purse is None else purse.owner

    def purse_where(self, state: str, place: int, *, arbitrary: bool) -> Signer:
        """One of the purses in this state, such as thawing, or any."""
        candidates = [key for key in KEYS if not arbitrary and getattr(self.book.purses.get(key.address), state, None)]
        return (candidates or KEYS)[place % len(candidates or KEYS)]

    def tab_where(self, state: str, place: int, *, arbitrary: bool) -> tuple[Signer, Signer]:
        """One of the tabs in this state, such as reserved, or any."""
        every = [(key, provider) for key in KEYS for provider in PROVIDERS]
        tabs = self.book.tabs
        candidates = [(k, p) for k, p in every if not arbitrary and (k.address, p.address) in tabs]
        candidates = [(k, p) for k, p in candidates if getattr(tabs[k.address, p.address], state)]
        return (candidates or every)[place % len(candidates or every)]

    @rule(sender=anyone, key=keys, owner=addresses, wrong=rarely_wrong)
    def open(self, sender: Signer, key: Signer, owner: Address, wrong: bool) -> None:
        bind = Bind(key=key.address, owner=owner)
        signature = (THIEF if wrong else key).sign_digest(bind.digest(self.market.domain))
        self.do(sender.address, "open", key.address, owner, signature)

    @rule(key=keys, amount=amounts, wrong=rarely_wrong)
    def deposit(self, key: Signer, amount: int, wrong: bool) -> None:
        self.do(self.owner(key, wrong=wrong), "deposit", key.address, amount)

    @rule(key=keys, amount=amounts, wrong=rarely_wrong, thief=rarely_wrong)
    def deposit_with_permit(self, key: Signer, amount: int, wrong: bool, thief: bool) -> None:
        owner = person_at(self.owner(key, wrong=thief))
        text = Permit(
            owner=owner.address, spender=self.market.escrow, value=amount, nonce=self.book.nonces[owner.address], deadline=FAR
        )
        signer = THIEF if wrong else owner
        signature, valid = signer.sign_digest(text.digest(coin_domain(self.market))), signer.address == owner.address
        permit = SignedPermit(Amount(amount), Seconds(FAR), signature)
        arguments = (key.address, amount, FAR, *split_signature(signature))
        self.play(
            lambda: self.book.deposit_with_permit(owner.address, key.address, permit, valid=valid),
            lambda: self.market.call(owner.address, "depositWithPermit", *arguments),
        )

    @rule(key=keys, signed_for=keys, amount=amounts, paper=papers, wrong=rarely_wrong)
    def deposit_with_authorization(self, key: Signer, signed_for: Signer, amount: int, paper: Any, wrong: bool) -> None:
        """Anyone sends it; a signature for another purse, or by anyone but the owner, has no effect."""
        salt, lasts = paper
        by, given, until = person_at(self.owner(key, wrong=wrong)), Hash(salt.to_bytes(32, "big")), Seconds(self.book.now + lasts)
        (nonce,) = self.market.ask("authorizationNonce", signed_for.address, given)
        text = ReceiveWithAuthorization(
            from_=by.address, to=self.market.escrow, value=amount, valid_after=0, valid_before=until, nonce=nonce
        )
        signature = by.sign_digest(text.digest(coin_domain(self.market)))
        signed = SignedAuthorization(Amount(amount), Seconds(0), until, given, signature)
        arguments = (key.address, amount, 0, until, given, *split_signature(signature))
        signer = by.address if signed_for == key else ZERO_ADDRESS
        self.play(
            lambda: self.book.deposit_with_authorization(key.address, signed, signer=signer),
            lambda: self.market.call(THIEF.address, "depositWithAuthorization", *arguments),
        )

    @rule(key=keys, amount=amounts, wrong=rarely_wrong)
    def thaw(self, key: Signer, amount: int, wrong: bool) -> None:
        self.do(self.owner(key, wrong=wrong), "thaw", key.address, amount)

    @rule(place=places, arbitrary=rarely_wrong, wrong=rarely_wrong)
    def cancel_thaw(self, place: int, arbitrary: bool, wrong: bool) -> None:
        key = self.purse_where("thawing", place, arbitrary=arbitrary)
        self.do(self.owner(key, wrong=wrong), "cancelThaw", key.address)

    @rule(place=places, arbitrary=rarely_wrong, wrong=rarely_wrong)
    def withdraw(self, place: int, arbitrary: bool, wrong: bool) -> None:
        key = self.purse_where("thawing", place, arbitrary=arbitrary)
        self.do(self.owner(key, wrong=wrong), "withdraw", key.address)

    @rule(seconds=st.sampled_from([1, RULES.thaw - 1, RULES.thaw, RULES.release, RULES.unstake]))
    def wait(self, seconds: int) -> None:
        self.book.now = self.market.chain.now = self.book.now + seconds

    # --------------------------------------------------------------------------------------------------------------- tabs

    @rule(key=keys, provider=addresses, amount=amounts, wrong=rarely_wrong)
    def reserve(self, key: Signer, provider: Address, amount: int, wrong: bool) -> None:
        self.do(self.owner(key, wrong=wrong), "reserve", key.address, provider, amount)

    @rule(key=keys, provider=providers, goal=amounts, expired=rarely_wrong, wrong=rarely_wrong)
    def secure(self, key: Signer, provider: Signer, goal: int, expired: bool, wrong: bool) -> None:
        terms = {"reserve_target": Amount(min(goal, U96)), "deadline": self.book.now - expired}
        order = self.market.order(key, provider.address, 0, **terms)
        if wrong:
            order = Signed(order.message, THIEF.sign_digest(order.message.digest(self.market.domain)))
        self.do(THIEF.address, "secure", order)

    @rule(place=places, arbitrary=rarely_wrong, wrong=rarely_wrong)
    def release(self, place: int, arbitrary: bool, wrong: bool) -> None:
        key, provider = self.tab_where("reserved", place, arbitrary=arbitrary)
        self.do(self.owner(key, wrong=wrong), "release", key.address, provider.address)

    @rule(place=places, arbitrary=rarely_wrong, wrong=rarely_wrong)
    def finish_release(self, place: int, arbitrary: bool, wrong: bool) -> None:
        key, provider = self.tab_where("release_at", place, arbitrary=arbitrary)
        self.do(self.owner(key, wrong=wrong), "finishRelease", key.address, provider.address)

    @rule(place=places, arbitrary=rarely_wrong, floor=st.integers(0, 20) | amounts)
    def give_back(self, place: int, arbitrary: bool, floor: int) -> None:
        key, provider = self.tab_where("reserved", place, arbitrary=arbitrary)
        self.do(provider.address, "giveBack", key.address, floor)

    @rule(place=places, floor=st.integers(0, 20) | amounts, expired=rarely_wrong, wrong=rarely_wrong)
    def give_back_signed(self, place: int, floor: int, expired: bool, wrong: bool) -> None:
        key, provider = self.tab_where("reserved", place, arbitrary=False)
        floor = min(floor, U96)
        text = Release(payer=key.address, provider=provider.address, floor=Amount(floor), deadline=self.book.now - expired)
        signer = THIEF if wrong else provider
        self.do(THIEF.address, "giveBackSigned", Signed(text, signer.sign_digest(text.digest(self.market.domain))))

    # --------------------------------------------------------------------------------------------------------- settlement

    def row(self, provider: Address, options: dict[str, Any]) -> SettleRow:
        """A row to collect: an earlier one, or one above the settled total, with or without a fault."""
        known = self.rows[provider]
        if 0 <= options["again"] < len(known):
            return known[-1 - int(options["again"])]
        poison, key = options["poison"], options["key"]
        payer = provider if poison == "own" else key.address
        settled = self.book.tabs[payer, provider].settled if (payer, provider) in self.book.tabs else 0
        ceiling, cost = (Amount(min(max(settled + options[name], 0), U96)) for name in ("ceiling", "cost"))
        terms = {
            "payer": payer,
            "reserve_target": Amount(options["target"]),
            "claim_by": self.book.now - (poison == "late"),
            "max_fee_bps": options["rate"],
            "coordinator": options["coordinator"].address,
        }
        named = THIEF.address if poison == "another provider's" else provider
        domain = self.market.domain
        if poison.startswith("foreign"):
            domain = Domain(1, domain.contract) if poison == "foreign chain" else Domain(domain.chain_id, self.market.token)
        order = self.market.order(key, named, ceiling, **terms).message
        signature = (THIEF if poison == "forged" else key).sign_digest(order.digest(domain))
        if poison == "altered":
            order = replace(order, ceiling=Amount(ceiling ^ 1))
        elif poison in {"", "late", "another provider's"}:
            self.ceilings[payer, named] = max(self.ceilings[payer, named], ceiling)
        known.append(SettleRow(Signed(order, signature), 1, cost))
        return known[-1]

    @rule(wishes=st.lists(claims, max_size=3), sender=anyone, by_provider=st.booleans())
    def settle(self, wishes: list[dict[str, Any]], sender: Signer, by_provider: bool) -> None:
        """Settles claims of several providers, with any contents."""
        batches = []
        for options in wishes:
            provider = options["provider"]
            batch = ClaimBatch(provider.address, tuple(self.row(provider.address, row) for row in options["rows"]))
            if options["how"] != "unsigned":
                digest = as_read(batch, self.market.domain).digest(self.market.domain)
                signature = (THIEF if options["how"] == "forged" else provider).sign_digest(digest)
                batch = replace(batch, signature=signature[: 64 if options["how"] == "cut" else 65])
            batches.append(batch)
        by = wishes[0]["provider"] if wishes and by_provider else sender
        self.do(by.address, "settle", batches)

    @rule(provider=providers, wishes=st.lists(rows, min_size=1, max_size=3))
    def collect(self, provider: Signer, wishes: list[dict[str, Any]]) -> None:
        """Collects a provider's own valid rows."""
        made = tuple(self.row(provider.address, options | {"poison": "", "again": -1}) for options in wishes)
        batch = ClaimBatch(provider.address, made)
        signature = provider.sign_digest(as_read(batch, self.market.domain).digest(self.market.domain))
        self.do(provider.address, "settle", [replace(batch, signature=signature)])

    @rule(place=places, arbitrary=rarely_wrong)
    def cash_out(self, place: int, arbitrary: bool) -> None:
        creditors = [p.address for p in PEOPLE if arbitrary or self.book.accounts[p.address].credit]
        self.do(THIEF.address, "cashOut", creditors[place % len(creditors)] if creditors else THIEF.address)

    @rule(account=anyone, payout=addresses, wrong=rarely_wrong)
    def set_payout(self, account: Signer, payout: Address, wrong: bool) -> None:
        self.do(account.address, "setPayout", self.market.escrow if wrong else payout)

    @rule(coordinator=coordinators | anyone, bps=rates | st.just(10_001))
    def set_fee(self, coordinator: Signer, bps: int) -> None:
        self.do(coordinator.address, "setFee", bps)

    @rule(donor=anyone, amount=st.integers(1, 5))
    def donate(self, donor: Signer, amount: int) -> None:
        """Tokens that come without a call belong to nobody and harm nobody."""
        if self.book.coins[donor.address] >= amount:
            self.market.coin(donor.address, "transfer", self.market.escrow, amount)
            self.book.coins[donor.address] -= amount
            self.book.coins[self.market.escrow] += amount
            self.donated += amount

    # ------------------------------------------------------------------------------------------------------------- stakes

    @rule(provider=providers | anyone, amount=amounts)
    def stake(self, provider: Signer, amount: int) -> None:
        self.do(provider.address, "stake", amount)

    @rule(provider=providers, amount=amounts)
    def unstake(self, provider: Signer, amount: int) -> None:
        self.do(provider.address, "unstake", amount)

    @rule(provider=providers)
    def withdraw_stake(self, provider: Signer) -> None:
        self.do(provider.address, "withdrawStake")

    def receipt(self, provider: Signer, payer: Address, seq: int, total: int, *, wrong: bool) -> Signed[Receipt]:
        """A provider's receipt, or a forged one."""
        made = self.market.receipt(provider, payer, seq, total)
        return Signed(made.message, THIEF.sign_digest(made.message.digest(self.market.domain))) if wrong else made

    @rule(provider=providers, sender=anyone, options=evidence)
    def slash_equivocation(self, provider: Signer, sender: Signer, options: dict[str, Any]) -> None:
        payers, seqs = _payers(options), (options["seq"], options["seq"] + options["later"])
        pair = [self.receipt(provider, payers[i], seqs[i], options["totals"][i], wrong=options["wrong"][i]) for i in (0, 1)]
        self.do(sender.address, "slashEquivocation", *pair)

    @rule(provider=providers, sender=anyone, options=evidence)
    def slash_overclaim(self, provider: Signer, sender: Signer, options: dict[str, Any]) -> None:
        (payer, other), (total, claimed) = _payers(options), options["totals"]
        claimed_row = ClaimRow(payer=other, order_hash=ZERO_HASH, seq=options["seq"], cumulative_cost=Amount(claimed))
        text = Claim(provider=provider.address, rows=(claimed_row, replace(claimed_row, cumulative_cost=Amount(0))))
        signature = (THIEF if options["wrong"][0] else provider).sign_digest(text.digest(self.market.domain))
        receipt = self.receipt(provider, payer, options["seq"] + options["later"], total, wrong=options["wrong"][1])
        claim, place = Signed(text, signature), options["place"]
        self.play(
            lambda: self.book.slash_overclaim(sender.address, claim, place, receipt),
            lambda: self.market.call(
                sender.address, "slashOverclaim", text, place, signature, receipt.message, receipt.signature
            ),
        )

    # --------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def it_holds_what_it_owes_to_the_unit(self) -> None:
        """The held tokens equal purses plus credit plus stakes plus donations."""
        assert self.market.balance(self.market.escrow) == self.book.owed + self.donated

    @invariant()
    def no_tab_is_settled_above_the_highest_signed_ceiling(self) -> None:
        for tab, state in self.book.tabs.items():
            assert state.settled <= self.ceilings[tab]

    @invariant()
    def nothing_is_pledged_that_is_not_there(self) -> None:
        assert sum(tab.reserved for tab in self.book.tabs.values()) <= self.market.balance(self.market.escrow)
        assert all(0 <= purse.thawing <= purse.free for purse in self.book.purses.values())

    def compare(self) -> None:
        """The contract's whole state equals the book's."""
        ask, book = self.market.ask, self.book
        for key in KEYS:
            state = book.purses.get(key.address)
            assert ask("purse", key.address) == ((state.owner, state.free, state.thawing, state.thaw_at) if state else _NONE)
        for payer, provider in book.tabs:
            tab = book.tabs[payer, provider]
            assert ask("tab", payer, provider) == (tab.settled, tab.reserved, tab.release_at)
        for address in [*(p.address for p in PEOPLE), RULES.treasury]:
            account, bond = book.accounts[address], book.bonds[address]
            assert ask("account", address) == (account.credit, book.payout_of(address), account.fee_bps)
            assert ask("stakeOf", address) == (bond.staked, bond.unstaking, bond.unstake_at)
            assert self.market.balance(address) == book.coins[address]

    def everyone_leaves(self) -> None:
        """From any state, everyone withdraws everything: in the end the contract holds only the donations."""
        tabs = [
            (self.book.purses[key].owner, key, provider, tab) for (key, provider), tab in self.book.tabs.items() if tab.reserved
        ]
        for owner, key, provider, tab in tabs:
            if not tab.release_at:
                self.do(owner, "release", key, provider)
        self.wait(RULES.release)
        for owner, key, provider, _ in tabs:
            self.do(owner, "finishRelease", key, provider)
        purses = [(purse.owner, key, purse.free) for key, purse in self.book.purses.items() if purse.free]
        bonds = [
            (account_address, bond.staked + bond.unstaking)
            for account_address, bond in self.book.bonds.items()
            if bond.staked + bond.unstaking
        ]
        for owner, key, amount in purses:
            self.do(owner, "thaw", key, amount)
        for account_address, amount in bonds:
            self.do(account_address, "unstake", amount)
        self.wait(RULES.unstake)
        for owner, key, _ in purses:
            self.do(owner, "withdraw", key)
        for account_address, _ in bonds:
            self.do(account_address, "withdrawStake")
        for account_address in [w for w, account in self.book.accounts.items() if account.credit]:
            self.do(THIEF.address, "cashOut", account_address)
        assert self.market.balance(self.market.escrow) == self.donated

    def teardown(self) -> None:
        """Each example ends with a full comparison and with everyone's withdrawal."""
        if not self.broken:
            self.compare()
            self.everyone_leaves()
            self.compare()


_NONE = (ZERO_ADDRESS, 0, 0, 0)


def _outcome(must: Callable[[], list[Event]]) -> tuple[list[Event], ModelRefusal | None]:
    try:
        return must(), None
    except ModelRefusal as refusal:
        return [], refusal


def _payers(options: dict[str, Any]) -> tuple[Address, Address]:
    return KEYS[0].address, KEYS[options["other payer"]].address


TestEscrow = pytest.mark.timeout(3_600)(Escrow.TestCase)
_EXAMPLES = {"brief": 60, "": 120, "deep": 5_000}
_PROOF = os.environ.get("TALLYSTICK_PROOF", "")
TestEscrow.settings = settings(
    max_examples=_EXAMPLES[_PROOF],
    stateful_step_count=80 if _PROOF == "deep" else 50,
    derandomize=_PROOF == "brief",
    phases=(Phase.explicit, Phase.generate) if _PROOF == "brief" else tuple(Phase),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

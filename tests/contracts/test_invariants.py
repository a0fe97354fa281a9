"""Whatever anyone does in whatever order: the contract does what the model says, and the sentences below hold.

The machine drives the real bytecode. TALLYSTICK_PROOF=deep runs it for many times longer, brief for a fraction.
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
from tests.contracts.model_state import No


class Escrow(RuleBasedStateMachine):
    """People, purses, tabs and stakes on one chain, beside the book that says what they must be."""

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
        """One call: both refuse alike, or both do and tell the same."""
        self.broken = True
        before = {who.address: self.book.wealth(who.address) for who in PEOPLE}
        facts, no = _outcome(must)
        if no is not None:
            with pytest.raises(ContractError) as caught:
                call()
            assert caught.value.name == no.name, f"{caught.value}, but it must be {no}"
            assert no.values.items() <= caught.value.values.items()
        told = () if no else call()
        fees = sum(event.fee for event in told if isinstance(event, Settled))
        assert sum(event.amount for event in told if isinstance(event, FeeEarned)) == fees
        same = [replace(e, evidence=ZERO_HASH) if isinstance(e, Slashed) else e for e in without_fees(told)]
        assert same == facts
        self.follow(facts)
        self.losers(before, facts)
        self.broken = False

    def do(self, sender: Address, function: str, *arguments: object) -> None:
        """A call that the model knows by the same name and arguments."""
        must = getattr(self.book, snake_case(function))
        given = [part for a in arguments for part in ((a.message, a.signature) if isinstance(a, Signed) else (a,))]
        self.play(lambda: must(sender, *arguments), lambda: self.market.call(sender, function, *given))

    def follow(self, facts: list[Event]) -> None:
        """Nothing free leaves to an owner, and no stake to a provider, but what was announced long enough ago."""
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
        """Nobody becomes poorer but by the signature of a key, a receipt, or a payout address of their own."""
        willing = {self.book.purses[fact.payer].owner for fact in facts if isinstance(fact, Settled)}
        willing |= {fact.provider for fact in facts if isinstance(fact, Slashed)}
        willing |= {fact.account for fact in facts if isinstance(fact, CashedOut) and fact.payout != fact.account}
        assert {who for who, wealth in before.items() if self.book.wealth(who) < wealth} <= willing

    # ------------------------------------------------------------------------------------------------------------- purses

    def owner(self, key: Signer, *, wrong: bool) -> Address:
        """Who may do things with a purse, or a thief."""
        purse = self.book.purses.get(key.address)
        return THIEF.address if wrong or purse is None else purse.owner

    def purse_where(self, state: str, place: int, *, astray: bool) -> Signer:
        """One of the purses in which there is something, such as a thaw; or any."""
        found = [key for key in KEYS if not astray and getattr(self.book.purses.get(key.address), state, None)]
        return (found or KEYS)[place % len(found or KEYS)]

    def tab_where(self, state: str, place: int, *, astray: bool) -> tuple[Signer, Signer]:
        """One of the tabs in which there is something, such as a reservation; or any."""
        every = [(key, provider) for key in KEYS for provider in PROVIDERS]
        tabs = self.book.tabs
        found = [(k, p) for k, p in every if not astray and (k.address, p.address) in tabs]
        found = [(k, p) for k, p in found if getattr(tabs[k.address, p.address], state)]
        return (found or every)[place % len(found or every)]

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
        signature = (THIEF if wrong else owner).sign_digest(text.digest(coin_domain(self.market)))
        permit = SignedPermit(Amount(amount), Seconds(FAR), signature)
        arguments = (key.address, amount, FAR, *split_signature(signature))
        self.play(
            lambda: self.book.deposit_with_permit(owner.address, key.address, permit, valid=not wrong),
            lambda: self.market.call(owner.address, "depositWithPermit", *arguments),
        )

    @rule(key=keys, signed_for=keys, amount=amounts, paper=papers, wrong=rarely_wrong)
    def deposit_with_authorization(self, key: Signer, signed_for: Signer, amount: int, paper: Any, wrong: bool) -> None:
        """Anyone sends it; what was signed for another purse, or by another than the owner, is nothing."""
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

    @rule(place=places, astray=rarely_wrong, wrong=rarely_wrong)
    def cancel_thaw(self, place: int, astray: bool, wrong: bool) -> None:
        key = self.purse_where("thawing", place, astray=astray)
        self.do(self.owner(key, wrong=wrong), "cancelThaw", key.address)

    @rule(place=places, astray=rarely_wrong, wrong=rarely_wrong)
    def withdraw(self, place: int, astray: bool, wrong: bool) -> None:
        key = self.purse_where("thawing", place, astray=astray)
        self.do(self.owner(key, wrong=wrong), "withdraw", key.address)

    @rule(seconds=st.sampled_from([1, RULES.thaw - 1, RULES.thaw, RULES.release, RULES.unstake]))
    def wait(self, seconds: int) -> None:
        self.book.now = self.market.chain.now = self.book.now + seconds

    # --------------------------------------------------------------------------------------------------------------- tabs

    @rule(key=keys, provider=addresses, amount=amounts, wrong=rarely_wrong)
    def reserve(self, key: Signer, provider: Address, amount: int, wrong: bool) -> None:
        self.do(self.owner(key, wrong=wrong), "reserve", key.address, provider, amount)

    @rule(key=keys, provider=providers, goal=amounts, late=rarely_wrong, wrong=rarely_wrong)
    def secure(self, key: Signer, provider: Signer, goal: int, late: bool, wrong: bool) -> None:
        terms = {"reserve_target": Amount(min(goal, U96)), "deadline": self.book.now - late}
        order = self.market.order(key, provider.address, 0, **terms)
        if wrong:
            order = Signed(order.message, THIEF.sign_digest(order.message.digest(self.market.domain)))
        self.do(THIEF.address, "secure", order)

    @rule(place=places, astray=rarely_wrong, wrong=rarely_wrong)
    def release(self, place: int, astray: bool, wrong: bool) -> None:
        key, provider = self.tab_where("reserved", place, astray=astray)
        self.do(self.owner(key, wrong=wrong), "release", key.address, provider.address)

    @rule(place=places, astray=rarely_wrong, wrong=rarely_wrong)
    def finish_release(self, place: int, astray: bool, wrong: bool) -> None:
        key, provider = self.tab_where("release_at", place, astray=astray)
        self.do(self.owner(key, wrong=wrong), "finishRelease", key.address, provider.address)

    @rule(place=places, astray=rarely_wrong, floor=st.integers(0, 20) | amounts)
    def give_back(self, place: int, astray: bool, floor: int) -> None:
        key, provider = self.tab_where("reserved", place, astray=astray)
        self.do(provider.address, "giveBack", key.address, floor)

    @rule(place=places, floor=st.integers(0, 20) | amounts, late=rarely_wrong, wrong=rarely_wrong)
    def give_back_signed(self, place: int, floor: int, late: bool, wrong: bool) -> None:
        key, provider = self.tab_where("reserved", place, astray=False)
        floor = min(floor, U96)
        text = Release(payer=key.address, provider=provider.address, floor=Amount(floor), deadline=self.book.now - late)
        signer = THIEF if wrong else provider
        self.do(THIEF.address, "giveBackSigned", Signed(text, signer.sign_digest(text.digest(self.market.domain))))

    # --------------------------------------------------------------------------------------------------------- settlement

    def row(self, provider: Address, wish: dict[str, Any]) -> SettleRow:
        """A row to collect: an earlier one, or one that asks for more than the tab has settled, with or without a fault."""
        known = self.rows[provider]
        if 0 <= wish["again"] < len(known):
            return known[-1 - int(wish["again"])]
        poison, key = wish["poison"], wish["key"]
        payer = provider if poison == "own" else key.address
        settled = self.book.tabs[payer, provider].settled if (payer, provider) in self.book.tabs else 0
        ceiling, cost = (Amount(min(max(settled + wish[name], 0), U96)) for name in ("ceiling", "cost"))
        terms = {
            "payer": payer,
            "reserve_target": Amount(wish["target"]),
            "claim_by": self.book.now - (poison == "late"),
            "max_fee_bps": wish["rate"],
            "coordinator": wish["coordinator"].address,
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
        """Claims of several providers, whatever is in them."""
        batches = []
        for wish in wishes:
            provider = wish["provider"]
            batch = ClaimBatch(provider.address, tuple(self.row(provider.address, row) for row in wish["rows"]))
            if wish["how"] != "unsigned":
                digest = as_read(batch, self.market.domain).digest(self.market.domain)
                signature = (THIEF if wish["how"] == "forged" else provider).sign_digest(digest)
                batch = replace(batch, signature=signature[: 64 if wish["how"] == "cut" else 65])
            batches.append(batch)
        by = wishes[0]["provider"] if wishes and by_provider else sender
        self.do(by.address, "settle", batches)

    @rule(provider=providers, wishes=st.lists(rows, min_size=1, max_size=3))
    def collect(self, provider: Signer, wishes: list[dict[str, Any]]) -> None:
        """A provider's own rows without a fault."""
        made = tuple(self.row(provider.address, wish | {"poison": "", "again": -1}) for wish in wishes)
        batch = ClaimBatch(provider.address, made)
        signature = provider.sign_digest(as_read(batch, self.market.domain).digest(self.market.domain))
        self.do(provider.address, "settle", [replace(batch, signature=signature)])

    @rule(place=places, astray=rarely_wrong)
    def cash_out(self, place: int, astray: bool) -> None:
        found = [p.address for p in PEOPLE if astray or self.book.accounts[p.address].credit]
        self.do(THIEF.address, "cashOut", found[place % len(found)] if found else THIEF.address)

    @rule(who=anyone, payout=addresses, wrong=rarely_wrong)
    def set_payout(self, who: Signer, payout: Address, wrong: bool) -> None:
        self.do(who.address, "setPayout", self.market.escrow if wrong else payout)

    @rule(who=coordinators | anyone, bps=rates | st.just(10_001))
    def set_fee(self, who: Signer, bps: int) -> None:
        self.do(who.address, "setFee", bps)

    @rule(who=anyone, amount=st.integers(1, 5))
    def donate(self, who: Signer, amount: int) -> None:
        """Tokens that come without a call belong to nobody, and to nobody's harm."""
        if self.book.coins[who.address] >= amount:
            self.market.coin(who.address, "transfer", self.market.escrow, amount)
            self.book.coins[who.address] -= amount
            self.book.coins[self.market.escrow] += amount
            self.donated += amount

    # ------------------------------------------------------------------------------------------------------------- stakes

    @rule(who=providers | anyone, amount=amounts)
    def stake(self, who: Signer, amount: int) -> None:
        self.do(who.address, "stake", amount)

    @rule(who=providers, amount=amounts)
    def unstake(self, who: Signer, amount: int) -> None:
        self.do(who.address, "unstake", amount)

    @rule(who=providers)
    def withdraw_stake(self, who: Signer) -> None:
        self.do(who.address, "withdrawStake")

    def receipt(self, provider: Signer, payer: Address, seq: int, total: int, *, wrong: bool) -> Signed[Receipt]:
        """A provider's receipt, or one that somebody made up for it."""
        made = self.market.receipt(provider, payer, seq, total)
        return Signed(made.message, THIEF.sign_digest(made.message.digest(self.market.domain))) if wrong else made

    @rule(who=providers, sender=anyone, wish=evidence)
    def slash_equivocation(self, who: Signer, sender: Signer, wish: dict[str, Any]) -> None:
        payers, seqs = _payers(wish), (wish["seq"], wish["seq"] + wish["later"])
        pair = [self.receipt(who, payers[i], seqs[i], wish["totals"][i], wrong=wish["wrong"][i]) for i in (0, 1)]
        self.do(sender.address, "slashEquivocation", *pair)

    @rule(who=providers, sender=anyone, wish=evidence)
    def slash_overclaim(self, who: Signer, sender: Signer, wish: dict[str, Any]) -> None:
        (payer, other), (total, claimed) = _payers(wish), wish["totals"]
        said = ClaimRow(payer=other, order_hash=ZERO_HASH, seq=wish["seq"], cumulative_cost=Amount(claimed))
        text = Claim(provider=who.address, rows=(said, replace(said, cumulative_cost=Amount(0))))
        signature = (THIEF if wish["wrong"][0] else who).sign_digest(text.digest(self.market.domain))
        receipt = self.receipt(who, payer, wish["seq"] + wish["later"], total, wrong=wish["wrong"][1])
        claim, place = Signed(text, signature), wish["place"]
        self.play(
            lambda: self.book.slash_overclaim(sender.address, claim, place, receipt),
            lambda: self.market.call(
                sender.address, "slashOverclaim", text, place, signature, receipt.message, receipt.signature
            ),
        )

    # --------------------------------------------------------------------------------------------------------- invariants

    @invariant()
    def it_holds_what_it_owes_to_the_unit(self) -> None:
        """Tokens held = purses + credit + stakes, and what was given away."""
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
        """The contract's whole state is the book's."""
        ask, book = self.market.ask, self.book
        for key in KEYS:
            state = book.purses.get(key.address)
            assert ask("purse", key.address) == ((state.owner, state.free, state.thawing, state.thaw_at) if state else _NONE)
        for payer, provider in book.tabs:
            tab = book.tabs[payer, provider]
            assert ask("tab", payer, provider) == (tab.settled, tab.reserved, tab.release_at)
        for who in [*(p.address for p in PEOPLE), RULES.treasury]:
            account, bond = book.accounts[who], book.bonds[who]
            assert ask("account", who) == (account.credit, book.payout_of(who), account.fee_bps)
            assert ask("stakeOf", who) == (bond.staked, bond.unstaking, bond.unstake_at)
            assert self.market.balance(who) == book.coins[who]

    def everyone_leaves(self) -> None:
        """From wherever they are, all get out what is theirs: in the end the contract holds what was given away."""
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
        bonds = [(who, bond.staked + bond.unstaking) for who, bond in self.book.bonds.items() if bond.staked + bond.unstaking]
        for owner, key, amount in purses:
            self.do(owner, "thaw", key, amount)
        for who, amount in bonds:
            self.do(who, "unstake", amount)
        self.wait(RULES.unstake)
        for owner, key, _ in purses:
            self.do(owner, "withdraw", key)
        for who, _ in bonds:
            self.do(who, "withdrawStake")
        for who in [w for w, account in self.book.accounts.items() if account.credit]:
            self.do(THIEF.address, "cashOut", who)
        assert self.market.balance(self.market.escrow) == self.donated

    def teardown(self) -> None:
        """An example ends with a look at everything, and with everybody's leaving."""
        if not self.broken:
            self.compare()
            self.everyone_leaves()
            self.compare()


_NONE = (ZERO_ADDRESS, 0, 0, 0)


def _outcome(must: Callable[[], list[Event]]) -> tuple[list[Event], No | None]:
    try:
        return must(), None
    except No as no:
        return [], no


def _payers(wish: dict[str, Any]) -> tuple[Address, Address]:
    return KEYS[0].address, KEYS[wish["other payer"]].address


TestEscrow = pytest.mark.timeout(3_600)(Escrow.TestCase)
_EXAMPLES = {"brief": 60, "": 250, "deep": 5_000}
_PROOF = os.environ.get("TALLYSTICK_PROOF", "")
TestEscrow.settings = settings(
    max_examples=_EXAMPLES[_PROOF],
    stateful_step_count=80 if _PROOF == "deep" else 50,
    derandomize=_PROOF == "brief",
    phases=(Phase.explicit, Phase.generate) if _PROOF == "brief" else tuple(Phase),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

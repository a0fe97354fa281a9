"""The escrow in plain Python, written from the rules and not from the contract. A call raises No with the contract's error
name, or returns the events that the contract must emit. Amounts are Python integers and cannot overflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.events import (
    CashedOut,
    Deposited,
    Event,
    FeeEarned,
    FeeSet,
    PayoutSet,
    PurseOpened,
    Released,
    ReleaseStarted,
    Reserved,
    RowSkipped,
    Settled,
    SkipReason,
    Slashed,
    Staked,
    ThawCancelled,
    ThawStarted,
    Unstaked,
    UnstakeStarted,
    Withdrawn,
)
from tallystick.chain.token import SignedAuthorization, SignedPermit
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import Bind, Claim, Order, Receipt, Release
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash, Seconds
from tests.chain.harness import as_read, read_for
from tests.contracts.evm_harness import NOWHERE
from tests.contracts.model_state import Holdings, ModelRefusal, Purse, require_amount


class Book(Holdings):
    """The escrow. Every public method is a call of the contract by its name, with the sender first."""

    # ------------------------------------------------------------------------------------------------------------ purses

    def open(self, sender: Address, key: Address, owner: Address, signature: bytes) -> list[Event]:
        if ZERO_ADDRESS in {key, owner}:
            raise ModelRefusal("ZeroAddress")
        if key in self.purses:
            raise ModelRefusal("PurseExists", key=key)
        if sender != key:
            self.require_signed(key, Bind(key=key, owner=owner), signature)
        self.purses[key] = Purse(owner)
        return [PurseOpened(at=NOWHERE, key=key, owner=owner)]

    def deposit(self, sender: Address, key: Address, amount: int) -> list[Event]:
        purse = self.owned(sender, key)
        require_amount(amount)
        self.pull(sender, amount)
        purse.free += amount
        return [Deposited(at=NOWHERE, key=key, amount=Amount(amount))]

    def deposit_with_permit(self, sender: Address, key: Address, permit: SignedPermit, *, valid: bool) -> list[Event]:
        before = self.allowance[sender]
        if valid:
            self.allowance[sender] = permit.amount
        try:
            facts = self.deposit(sender, key, permit.amount)
        except ModelRefusal:
            self.allowance[sender] = before
            raise
        self.nonces[sender] += valid
        return facts

    def deposit_with_authorization(self, key: Address, signed: SignedAuthorization, *, signer: Address) -> list[Event]:
        if key not in self.purses:
            raise ModelRefusal("UnknownPurse", key=key)
        require_amount(signed.amount)
        owner = self.purses[key].owner
        nonce = (owner, key.encode() + signed.salt)
        if not signed.valid_after < self.now < signed.valid_before:
            raise ModelRefusal("OutsideValidity", validAfter=signed.valid_after, validBefore=signed.valid_before)
        if nonce in self.used:
            raise ModelRefusal("AuthorizationAlreadyUsed")
        if signer != owner:
            raise ModelRefusal("BadAuthorization", authorizer=owner)
        if self.coins[owner] < signed.amount:
            raise ModelRefusal("ERC20InsufficientBalance", sender=owner, balance=self.coins[owner], needed=signed.amount)
        self.used.add(nonce)
        self.coins[owner] -= signed.amount
        self.coins[self.domain.contract] += signed.amount
        self.purses[key].free += signed.amount
        return [Deposited(at=NOWHERE, key=key, amount=signed.amount)]

    def thaw(self, sender: Address, key: Address, amount: int) -> list[Event]:
        purse = self.owned(sender, key)
        require_amount(amount)
        if amount > purse.free:
            raise ModelRefusal("InsufficientFree", available=purse.free, wanted=amount)
        purse.thawing, purse.thaw_at = amount, self.now + self.rules.thaw
        return [ThawStarted(at=NOWHERE, key=key, amount=Amount(amount), thaw_at=Seconds(purse.thaw_at))]

    def cancel_thaw(self, sender: Address, key: Address) -> list[Event]:
        purse = self.owned(sender, key)
        if not purse.thawing:
            raise ModelRefusal("NotThawing", key=key)
        purse.thawing = purse.thaw_at = 0
        return [ThawCancelled(at=NOWHERE, key=key)]

    def withdraw(self, sender: Address, key: Address) -> list[Event]:
        purse = self.owned(sender, key)
        if not purse.thawing:
            raise ModelRefusal("NotThawing", key=key)
        if self.now < purse.thaw_at:
            raise ModelRefusal("TooEarly", readyAt=purse.thaw_at)
        amount = purse.thawing
        purse.free -= amount
        purse.thawing = purse.thaw_at = 0
        self.push(sender, amount)
        return [Withdrawn(at=NOWHERE, key=key, owner=sender, amount=Amount(amount))]

    # -------------------------------------------------------------------------------------------------------------- tabs

    def reserve(self, sender: Address, key: Address, provider: Address, amount: int) -> list[Event]:
        purse = self.owned(sender, key)
        require_amount(amount)
        if provider == ZERO_ADDRESS:
            raise ModelRefusal("ZeroAddress")
        if provider in {key, sender}:
            raise ModelRefusal("SelfDealing", account=provider)
        if amount > purse.free - purse.thawing:
            raise ModelRefusal("InsufficientFree", available=purse.free - purse.thawing, wanted=amount)
        return self._pledge(key, provider, amount)

    def secure(self, _sender: Address, signed: Signed[Order]) -> list[Event]:
        order = signed.message
        payer, provider = order.payer, order.provider
        if payer == provider:
            raise ModelRefusal("SelfDealing", account=provider)
        if self.now > order.deadline:
            raise ModelRefusal("Expired", deadline=order.deadline)
        self.require_signed(payer, order, signed.signature)
        if payer not in self.purses:
            raise ModelRefusal("UnknownPurse", key=payer)
        if self.purses[payer].thawing:
            raise ModelRefusal("Thawing", key=payer)
        tab = self.tabs[payer, provider]
        if tab.release_at:
            raise ModelRefusal("Releasing", payer=payer, provider=provider)
        added = min(self.purses[payer].free, order.reserve_target - tab.reserved)
        if added <= 0:
            raise ModelRefusal("NothingToReserve", payer=payer, provider=provider)
        return self._pledge(payer, provider, added)

    def _pledge(self, key: Address, provider: Address, amount: int) -> list[Event]:
        tab = self.tabs[key, provider]
        self.purses[key].free -= amount
        tab.reserved += amount
        tab.release_at = 0
        return [Reserved(at=NOWHERE, payer=key, provider=provider, amount=Amount(amount), reserved=Amount(tab.reserved))]

    def release(self, sender: Address, key: Address, provider: Address) -> list[Event]:
        self.owned(sender, key)
        tab = self.tabs[key, provider]
        if not tab.reserved:
            raise ModelRefusal("NothingReserved", payer=key, provider=provider)
        if tab.release_at:
            raise ModelRefusal("Releasing", payer=key, provider=provider)
        tab.release_at = self.now + self.rules.release
        return [ReleaseStarted(at=NOWHERE, payer=key, provider=provider, release_at=Seconds(tab.release_at))]

    def finish_release(self, sender: Address, key: Address, provider: Address) -> list[Event]:
        self.owned(sender, key)
        tab = self.tabs[key, provider]
        if not tab.release_at:
            raise ModelRefusal("NotReleasing", payer=key, provider=provider)
        if self.now < tab.release_at:
            raise ModelRefusal("TooEarly", readyAt=tab.release_at)
        return self._unpledge(key, provider, 0)

    def give_back(self, sender: Address, payer: Address, floor: int) -> list[Event]:
        if self.tabs[payer, sender].reserved <= floor:
            raise ModelRefusal("NothingReserved", payer=payer, provider=sender)
        return self._unpledge(payer, sender, floor)

    def give_back_signed(self, _sender: Address, signed: Signed[Release]) -> list[Event]:
        consent = signed.message
        if self.now > consent.deadline:
            raise ModelRefusal("Expired", deadline=consent.deadline)
        self.require_signed(consent.provider, consent, signed.signature)
        return self.give_back(consent.provider, consent.payer, consent.floor)

    def _unpledge(self, key: Address, provider: Address, floor: int) -> list[Event]:
        tab = self.tabs[key, provider]
        amount, tab.reserved = tab.reserved - floor, floor
        if not floor:
            tab.release_at = 0
        self.purses[key].free += amount
        return [Released(at=NOWHERE, payer=key, provider=provider, amount=Amount(amount), reserved=Amount(floor))]

    # -------------------------------------------------------------------------------------------------------- settlement

    def settle(self, _sender: Address, claims: Sequence[ClaimBatch]) -> list[Event]:
        if not claims:
            raise ModelRefusal("EmptyBatch")
        facts: list[Event] = []
        fees: Counter[Address] = Counter()
        for claim in claims:
            good = self.is_signed(claim.provider, as_read(claim, self.domain).digest(self.domain), claim.signature)
            facts += [self._settle_row(claim.provider, row, fees, good=good) for row in claim.rows]
        for coordinator, fee in fees.items():
            self.accounts[coordinator].credit += fee
        return facts

    def _settle_row(self, provider: Address, row: SettleRow, fees: Counter[Address], *, good: bool) -> Event:
        order = row.order.message
        reason = self._objection(provider, row) if good else SkipReason.BAD_CLAIM
        if reason is not SkipReason.NONE:
            return RowSkipped(at=NOWHERE, payer=order.payer, provider=provider, reason=reason)
        tab, purse = self.tabs[order.payer, provider], self.purses[order.payer]
        paid = min(row.cumulative_cost, order.ceiling, tab.settled + tab.reserved + purse.free) - tab.settled
        pledged = min(paid, tab.reserved)
        tab.settled += paid
        tab.reserved -= pledged
        purse.free -= paid - pledged
        if purse.thawing:
            purse.thawing = min(purse.thawing, purse.free)
            purse.thaw_at = purse.thaw_at if purse.thawing else 0
        elif not tab.release_at and order.reserve_target > tab.reserved:
            refill = min(order.reserve_target - tab.reserved, purse.free)
            tab.reserved += refill
            purse.free -= refill
        fee = paid * min(order.max_fee_bps, self.accounts[order.coordinator].fee_bps) // 10_000
        fees[order.coordinator] += fee
        self.accounts[provider].credit += paid - fee
        amounts = {"paid": Amount(paid), "fee": Amount(fee), "settled": Amount(tab.settled)}
        return Settled(at=NOWHERE, payer=order.payer, provider=provider, **amounts)

    def _objection(self, provider: Address, row: SettleRow) -> SkipReason:
        order = row.order.message
        digest = keccak(self.domain.prefix + read_for(provider, order).struct_hash())
        tab = self.tabs[order.payer, provider]
        if order.payer == provider:
            return SkipReason.SELF_DEALING
        if self.now > order.claim_by:
            return SkipReason.EXPIRED
        if not self.is_signed(order.payer, digest, row.order.signature):
            return SkipReason.BAD_SIGNATURE
        if min(row.cumulative_cost, order.ceiling) <= tab.settled:
            return SkipReason.NOTHING_OWED
        if order.payer not in self.purses:
            return SkipReason.UNKNOWN_PURSE
        return SkipReason.NONE if tab.reserved + self.purses[order.payer].free else SkipReason.UNFUNDED

    def cash_out(self, _sender: Address, account: Address) -> list[Event]:
        amount, payout = self.accounts[account].credit, self.payout_of(account)
        if not amount:
            raise ModelRefusal("NoCredit", account=account)
        self.accounts[account].credit = 0
        self.push(payout, amount)
        return [CashedOut(at=NOWHERE, account=account, payout=payout, amount=Amount(amount))]

    def set_payout(self, sender: Address, payout: Address) -> list[Event]:
        if payout in {self.domain.contract, self.token}:
            raise ModelRefusal("BadPayee", payee=payout)
        self.accounts[sender].payout = payout
        return [PayoutSet(at=NOWHERE, account=sender, payout=self.payout_of(sender))]

    def set_fee(self, sender: Address, bps: int) -> list[Event]:
        if bps > 10_000:
            raise ModelRefusal("FeeTooHigh", bps=bps)
        self.accounts[sender].fee_bps = bps
        return [FeeSet(at=NOWHERE, coordinator=sender, bps=bps)]

    # ------------------------------------------------------------------------------------------------------------ stakes

    def stake(self, sender: Address, amount: int) -> list[Event]:
        require_amount(amount)
        self.pull(sender, amount)
        self.bonds[sender].staked += amount
        return [Staked(at=NOWHERE, provider=sender, amount=Amount(amount))]

    def unstake(self, sender: Address, amount: int) -> list[Event]:
        bond = self.bonds[sender]
        total = bond.staked + bond.unstaking
        if amount > total:
            raise ModelRefusal("InsufficientStake", available=total, wanted=amount)
        bond.staked, bond.unstaking = total - amount, amount
        bond.unstake_at = self.now + self.rules.unstake if amount else 0
        at = Seconds(bond.unstake_at)
        return [UnstakeStarted(at=NOWHERE, provider=sender, amount=Amount(amount), unstake_at=at)]

    def withdraw_stake(self, sender: Address) -> list[Event]:
        bond = self.bonds[sender]
        if not bond.unstaking:
            raise ModelRefusal("NotUnstaking", provider=sender)
        if self.now < bond.unstake_at:
            raise ModelRefusal("TooEarly", readyAt=bond.unstake_at)
        amount, bond.unstaking, bond.unstake_at = bond.unstaking, 0, 0
        self.push(sender, amount)
        return [Unstaked(at=NOWHERE, provider=sender, amount=Amount(amount))]

    def slash_equivocation(self, sender: Address, receipt: Signed[Receipt], contradiction: Signed[Receipt]) -> list[Event]:
        first, second = receipt.message, contradiction.message
        same = (first.provider, first.payer, first.seq) == (second.provider, second.payer, second.seq)
        if not same or first == second:
            raise ModelRefusal("NotEvidence")
        self.require_signed(first.provider, first, receipt.signature)
        self.require_signed(first.provider, second, contradiction.signature)
        return self._slash(sender, first.provider, f"equivocation {first.payer} {first.seq}")

    def slash_overclaim(self, sender: Address, claim: Signed[Claim], row: int, receipt: Signed[Receipt]) -> list[Event]:
        provider, receipt_message = claim.message.provider, receipt.message
        if row >= len(claim.message.rows):
            raise ModelRefusal("NotEvidence")
        claimed = claim.message.rows[row]
        same = (provider, claimed.payer) == (receipt_message.provider, receipt_message.payer)
        if not same or claimed.seq > receipt_message.seq or claimed.cumulative_cost <= receipt_message.cumulative_cost:
            raise ModelRefusal("NotEvidence")
        self.require_signed(provider, claim.message, claim.signature)
        self.require_signed(provider, receipt_message, receipt.signature)
        return self._slash(sender, provider, f"overclaim {claimed.payer} {claimed.seq}")

    def _slash(self, reporter: Address, provider: Address, fault: str) -> list[Event]:
        evidence, bond = keccak(f"{provider} {fault}".encode()), self.bonds[provider]
        due = self.rules.penalty - self.taken[evidence]
        if not due:
            raise ModelRefusal("EvidenceUsed")
        amount = min(due, bond.staked + bond.unstaking)
        if not amount:
            raise ModelRefusal("NothingAtStake", provider=provider)
        self.taken[evidence] += amount
        from_staked = min(amount, bond.staked)
        bond.staked -= from_staked
        bond.unstaking -= amount - from_staked
        bond.unstake_at = bond.unstake_at if bond.unstaking else 0
        reward = amount // 5
        self.accounts[reporter].credit += reward
        self.accounts[self.rules.treasury].credit += amount - reward
        amounts = {"amount": Amount(amount), "reward": Amount(reward)}
        return [Slashed(at=NOWHERE, provider=provider, reporter=reporter, evidence=Hash(bytes(32)), **amounts)]


def without_fees(events: Sequence[Event]) -> Iterator[Event]:
    """The events of a settlement without those about summed fees."""
    return (event for event in events if not isinstance(event, FeeEarned))

"""The state of the escrow's model, behind the calls in model.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from tallystick.chain.escrow import EscrowRules
from tallystick.protocol.eip712 import Domain, Message
from tallystick.protocol.errors import BadSignature
from tallystick.protocol.signatures import recover
from tallystick.protocol.types import ZERO_ADDRESS, Address, Hash

TOP = 1 << 96


class ModelRefusal(Exception):
    """The contract must refuse the call with this error."""

    def __init__(self, name: str, **values: object) -> None:
        super().__init__(name, values)
        self.name, self.values = name, values


@dataclass
class Purse:
    """A payer's deposit; `thaw_at` is 0 while nothing thaws."""

    owner: Address
    free: int = 0
    thawing: int = 0
    thaw_at: int = 0


@dataclass
class Tab:
    """The tab between one payer and one provider."""

    settled: int = 0
    reserved: int = 0
    release_at: int = 0


@dataclass
class Account:
    """A provider's or a coordinator's credit."""

    credit: int = 0
    fee_bps: int = 0
    payout: Address = ZERO_ADDRESS


@dataclass
class Bond:
    """A provider's stake."""

    staked: int = 0
    unstaking: int = 0
    unstake_at: int = 0


class Holdings:
    """The whole state of the escrow and the part of its token's state that it depends on, with the queries that every call
    needs.
    """

    def __init__(self, domain: Domain, token: Address, rules: EscrowRules, now: int) -> None:
        self.domain, self.token, self.rules, self.now = domain, token, rules, now
        self.purses: dict[Address, Purse] = {}
        self.tabs: defaultdict[tuple[Address, Address], Tab] = defaultdict(Tab)
        self.accounts: defaultdict[Address, Account] = defaultdict(Account)
        self.bonds: defaultdict[Address, Bond] = defaultdict(Bond)
        self.taken: Counter[bytes] = Counter()
        self.coins: Counter[Address] = Counter()
        self.allowance: Counter[Address] = Counter()
        self.nonces: Counter[Address] = Counter()
        self.used: set[tuple[Address, bytes]] = set()

    @property
    def owed(self) -> int:
        """Purses, credit and stakes."""
        purses = sum(purse.free for purse in self.purses.values()) + sum(tab.reserved for tab in self.tabs.values())
        credit = sum(account.credit for account in self.accounts.values())
        return purses + credit + sum(bond.staked + bond.unstaking for bond in self.bonds.values())

    def reserved(self, key: Address) -> int:
        """The amount that a purse has reserved in all."""
        return sum(tab.reserved for (payer, _), tab in self.tabs.items() if payer == key)

    def wealth(self, account: Address) -> int:
        """Everything that an account owns: wallet, purses, credit, stake."""
        purses = sum(purse.free + self.reserved(key) for key, purse in self.purses.items() if purse.owner == account)
        bond = self.bonds[account]
        return self.coins[account] + purses + self.accounts[account].credit + bond.staked + bond.unstaking

    def payout_of(self, account: Address) -> Address:
        """The address to which an account's credit is paid."""
        return account if self.accounts[account].payout == ZERO_ADDRESS else self.accounts[account].payout

    def owned(self, sender: Address, key: Address) -> Purse:
        if key not in self.purses:
            raise ModelRefusal("UnknownPurse", key=key)
        if self.purses[key].owner != sender:
            raise ModelRefusal("NotOwner", key=key, caller=sender)
        return self.purses[key]

    def is_signed(self, signer: Address, digest: Hash, signature: bytes) -> bool:
        try:
            return recover(digest, signature) == signer != ZERO_ADDRESS
        except BadSignature:
            return False

    def require_signed(self, signer: Address, message: Message, signature: bytes) -> None:
        if not self.is_signed(signer, message.digest(self.domain), signature):
            raise ModelRefusal("BadSignature", signer=signer)

    def pull(self, account: Address, amount: int) -> None:
        if self.allowance[account] < amount:
            raise ModelRefusal(
                "ERC20InsufficientAllowance", spender=self.domain.contract, allowance=self.allowance[account], needed=amount
            )
        if self.coins[account] < amount:
            raise ModelRefusal("ERC20InsufficientBalance", sender=account, balance=self.coins[account], needed=amount)
        self.coins[account] -= amount
        self.allowance[account] -= amount
        self.coins[self.domain.contract] += amount

    def push(self, account: Address, amount: int) -> None:
        self.coins[self.domain.contract] -= amount
        self.coins[account] += amount


def require_amount(amount: int) -> None:
    """Refuses invalid amounts."""
    if not amount:
        raise ModelRefusal("ZeroAmount")
    if amount >= TOP:
        raise ModelRefusal("AmountTooLarge", amount=amount)

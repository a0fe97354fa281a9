"""Typed calls of the escrow contract. contracts/src/interfaces/IEscrow.sol documents each call and its errors.

Reads raise Unavailable. Writes take a Sender, wait for the receipt, and raise ContractError (with the name of the contract's
error), Refusal or Unavailable. Amounts are base units, times are Unix seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tallystick.chain.claims import ClaimBatch, pack_batches
from tallystick.chain.codec import WrongContract, load_abi
from tallystick.chain.deployment import Deployment
from tallystick.chain.endpoint import Rpc
from tallystick.chain.events import Event, read_logs
from tallystick.chain.sender import Sender
from tallystick.chain.token import SignedAuthorization, SignedPermit, Token, split_signature
from tallystick.protocol.eip712 import Message, Signed
from tallystick.protocol.messages import Bind, Claim, Order, Receipt, Release
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount, Hash, Seconds

E = TypeVar("E", bound=Event)


@dataclass(frozen=True, slots=True)
class Purse:
    """A payer's deposit. `owner` is None if it was never opened. `thawing` is part of `free`. `thaw_at` is 0 without a thaw."""

    owner: Address | None
    free: Amount
    thawing: Amount
    thaw_at: Seconds


@dataclass(frozen=True, slots=True)
class TabState:
    """A tab on chain: the total paid, the amount reserved now, and the end of a running release (0 without one)."""

    settled: Amount
    reserved: Amount
    release_at: Seconds


@dataclass(frozen=True, slots=True)
class ProviderAccount:
    """The account of a provider or coordinator.

    `credit` can be cashed out to `payout`. `stake` is the stake that counts; `unstaking` is the part that may leave from
    `unstake_at` on. `fee_bps` is the rate as a coordinator, in basis points.
    """

    credit: Amount
    payout: Address
    stake: Amount
    unstaking: Amount
    unstake_at: Seconds
    fee_bps: int


@dataclass(frozen=True, slots=True)
class EscrowRules:
    """The waits of a deployment in seconds, its penalty per piece of evidence, and the treasury.

    The treasury is credited with the part of a penalty that the reporter does not get.
    """

    thaw: int
    release: int
    unstake: int
    penalty: Amount
    treasury: Address


@dataclass(frozen=True, slots=True)
class TxResult:
    """A mined transaction with the escrow's events in it. `fee` is in wei."""

    hash: str
    block: int
    gas_used: int
    fee: int
    events: tuple[Event, ...]

    def of(self, event_class: type[E]) -> tuple[E, ...]:
        """The events of one class, in order."""
        return tuple(event for event in self.events if isinstance(event, event_class))


def purse_of(values: tuple[Any, ...]) -> Purse:
    """The purse that the contract's `purse` returned."""
    owner, free, thawing, thaw_at = values
    return Purse(None if owner == ZERO_ADDRESS else owner, Amount(free), Amount(thawing), Seconds(thaw_at))


def tab_of(values: tuple[Any, ...]) -> TabState:
    """The tab that the contract's `tab` returned."""
    settled, reserved, release_at = values
    return TabState(Amount(settled), Amount(reserved), Seconds(release_at))


def provider_of(account: tuple[Any, ...], stake_of: tuple[Any, ...]) -> ProviderAccount:
    """The account that the contract's `account` and `stakeOf` returned."""
    (credit, payout, fee_bps), (stake, unstaking, unstake_at) = account, stake_of
    return ProviderAccount(Amount(credit), payout, Amount(stake), Amount(unstaking), Seconds(unstake_at), fee_bps)


class Escrow:
    """One deployed escrow. The first call raises WrongChain if the endpoint serves another chain."""

    def __init__(self, rpc: Rpc, deployment: Deployment) -> None:
        self.rpc, self.deployment = rpc, deployment
        rpc.expect(deployment.chain_id)
        self.token = Token(rpc, deployment.token)
        self._abi = load_abi("Escrow")

    async def check(self) -> None:
        """Checks that the chain is the deployment's and has its escrow. Daemons call it at their start.

        Raises WrongChain or WrongContract, both with a remedy; Unavailable if the chain does not answer.
        """
        code = await self.rpc.request("eth_getCode", self.deployment.escrow, "latest")
        if code in ("0x", None):
            raise self._absent()
        (token,) = await self.read("token")
        if token != self.deployment.token:
            raise WrongContract(
                f"deployment.token: the escrow {self.deployment.escrow} settles in {token}, not in {self.deployment.token}",
            )

    def _absent(self) -> WrongContract:
        where = f"{self.deployment.escrow} on chain {self.deployment.chain_id} at {self.rpc.shown_url}"
        return WrongContract(f"there is no escrow at {where}. A local chain loses its state when it stops: deploy again")

    # ------------------------------------------------------------------------------------------------------------- reads

    async def read(self, function: str, *arguments: object, block: str = "latest") -> tuple[Any, ...]:
        """The untyped result of a view function of the contract."""
        call = self._abi.call(function, *arguments)
        return self._abi.result(function, await self.rpc.call(self.deployment.escrow, call, block=block))

    async def purse(self, key: Address, *, block: str = "latest") -> Purse:
        """The purse of a signing key."""
        return purse_of(await self.read("purse", key, block=block))

    async def tab(self, payer: Address, provider: Address, *, block: str = "latest") -> TabState:
        """The tab of a payer's key with a provider; all zero if it was never used."""
        return tab_of(await self.read("tab", payer, provider, block=block))

    async def provider(self, address: Address, *, block: str = "latest") -> ProviderAccount:
        """Credit, stake and fee rate of any account, also of a coordinator."""
        account, stake = await asyncio.gather(
            self.read("account", address, block=block), self.read("stakeOf", address, block=block)
        )
        return provider_of(account, stake)

    async def fee_bps(self, coordinator: Address) -> int:
        """The rate that a coordinator has registered, in basis points of what is paid: the contract takes this or what the order
        allows, whichever is less.
        """
        _, _, fee_bps = await self.read("account", coordinator)
        return int(fee_bps)

    async def rules(self) -> EscrowRules:
        """What the contract was made with."""
        names = ("thawPeriod", "releasePeriod", "unstakePeriod", "penalty", "treasury")
        thaw, release, unstake, penalty, treasury = [value for (value,) in await asyncio.gather(*map(self.read, names))]
        return EscrowRules(thaw, release, unstake, Amount(penalty), treasury)

    async def evidence_used(self, evidence: Hash) -> bool:
        """Whether this evidence has cost the provider the whole penalty; until then it can be brought again."""
        (used,) = await self.read("evidenceUsed", evidence)
        return bool(used)

    def calldata(self, function: str, *arguments: object) -> bytes:
        """The calldata of a call, for another wallet or contract to send."""
        return self._abi.call(function, *arguments)

    # ------------------------------------------------------------------------------------------------------------- purses

    async def _write(self, sender: Sender, function: str, *arguments: object) -> TxResult:
        mined = await sender.send(self.deployment.escrow, self._abi.call(function, *arguments))
        if not mined.logs:  # each call of the escrow emits an event, but a call of an empty address succeeds without any
            raise self._absent()
        return TxResult(mined.hash, mined.block, mined.gas_used, mined.fee, read_logs(mined.logs, self.deployment.escrow))

    async def open_purse(self, sender: Sender, key: Address, owner: Address, bind: Signed[Bind] | None = None) -> TxResult:
        """Binds a signing key to an owner for good. `bind` is not needed if the sender is the key."""
        return await self._write(sender, "open", key, owner, bind.signature if bind else b"")

    async def deposit(self, sender: Sender, key: Address, amount: Amount) -> TxResult:
        """Fills a purse that the sender owns. The sender must have approved the escrow (`token.approve`)."""
        return await self._write(sender, "deposit", key, amount)

    async def deposit_with_permit(self, sender: Sender, key: Address, permit: SignedPermit) -> TxResult:
        """Fills a purse that the sender owns, on the sender's permit (`token.permit`)."""
        rest = split_signature(permit.signature)
        return await self._write(sender, "depositWithPermit", key, permit.amount, permit.deadline, *rest)

    async def deposit_with_authorization(self, sender: Sender, key: Address, signed: SignedAuthorization) -> TxResult:
        """Fills a purse on its owner's authorization (`token.authorize`). Anyone may send it."""
        times = (signed.valid_after, signed.valid_before, signed.salt)
        rest = split_signature(signed.signature)
        return await self._write(sender, "depositWithAuthorization", key, signed.amount, *times, *rest)

    async def thaw(self, sender: Sender, key: Address, amount: Amount) -> TxResult:
        """Announces the withdrawal of free money. Reservations are not refilled meanwhile."""
        return await self._write(sender, "thaw", key, amount)

    async def cancel_thaw(self, sender: Sender, key: Address) -> TxResult:
        """Cancels a thaw."""
        return await self._write(sender, "cancelThaw", key)

    async def withdraw(self, sender: Sender, key: Address) -> TxResult:
        """Pays the thawed amount to the owner."""
        return await self._write(sender, "withdraw", key)

    # --------------------------------------------------------------------------------------------------------------- tabs

    async def reserve(self, sender: Sender, key: Address, provider: Address, amount: Amount) -> TxResult:
        """Reserves more of the free balance for a provider. Only the owner may send it."""
        return await self._write(sender, "reserve", key, provider, amount)

    async def secure(self, sender: Sender, order: Signed[Order]) -> TxResult:
        """Raises a reservation to the order's target. Pays nothing; anyone may send it."""
        return await self._write(sender, "secure", _fields(order.message), order.signature)

    async def release(self, sender: Sender, key: Address, provider: Address) -> TxResult:
        """Announces the end of a reservation. Only the owner may send it."""
        return await self._write(sender, "release", key, provider)

    async def finish_release(self, sender: Sender, key: Address, provider: Address) -> TxResult:
        """Takes the reservation back after the wait. Only the owner may send it."""
        return await self._write(sender, "finishRelease", key, provider)

    async def give_back(self, sender: Sender, payer: Address, floor: Amount) -> TxResult:
        """Lowers the sending provider's reservation to `floor` at once."""
        return await self._write(sender, "giveBack", payer, floor)

    async def give_back_signed(self, sender: Sender, consent: Signed[Release]) -> TxResult:
        """`give_back` on the provider's signature. Anyone may send it."""
        return await self._write(sender, "giveBackSigned", _fields(consent.message), consent.signature)

    # --------------------------------------------------------------------------------------------------------- settlement

    async def settle(self, sender: Sender, claims: Sequence[ClaimBatch]) -> TxResult:
        """Collects claims in one transaction. The events have one Settled or RowSkipped per row, in order."""
        return await self._write(sender, "settle", [claim.encode() for claim in claims])

    async def settle_all(self, sender: Sender, claims: Sequence[ClaimBatch]) -> list[TxResult]:
        """Collects claims in as many transactions as necessary, one after the other."""
        return [await self.settle(sender, batch) for batch in pack_batches(claims)]

    async def cash_out(self, sender: Sender, account: Address) -> TxResult:
        """Pays an account's credit to its payout address. Anyone may send it."""
        return await self._write(sender, "cashOut", account)

    async def set_payout(self, sender: Sender, payout: Address) -> TxResult:
        """Sets the payout address of the sender's credit. The zero address means the sender itself."""
        return await self._write(sender, "setPayout", payout)

    async def set_fee(self, sender: Sender, bps: int) -> TxResult:
        """Sets the sender's rate as a coordinator, in basis points of each payment."""
        return await self._write(sender, "setFee", bps)

    # ------------------------------------------------------------------------------------------------------------- stakes

    async def stake(self, sender: Sender, amount: Amount) -> TxResult:
        """Adds to the sender's stake. The sender must have approved the escrow."""
        return await self._write(sender, "stake", amount)

    async def unstake(self, sender: Sender, amount: Amount) -> TxResult:
        """Announces that `amount` of the stake, in all, will leave. 0 cancels it."""
        return await self._write(sender, "unstake", amount)

    async def withdraw_stake(self, sender: Sender) -> TxResult:
        """Pays the announced part of the stake to the sender after the wait."""
        return await self._write(sender, "withdrawStake")

    async def slash_equivocation(self, sender: Sender, first: Signed[Receipt], second: Signed[Receipt]) -> TxResult:
        """Slashes a provider for two different receipts with one payer and seq. The sender gets the reporter's share."""
        pair = [part for receipt in (first, second) for part in (_fields(receipt.message), receipt.signature)]
        return await self._write(sender, "slashEquivocation", *pair)

    async def slash_overclaim(self, sender: Sender, claim: Signed[Claim], row: int, receipt: Signed[Receipt]) -> TxResult:
        """Slashes a provider for a claim row above its own receipt of the same or a later seq."""
        rows = [_fields(item) for item in claim.message.rows]
        evidence = ((claim.message.provider, rows), row, claim.signature, _fields(receipt.message), receipt.signature)
        return await self._write(sender, "slashOverclaim", *evidence)


def _fields(message: Message) -> tuple[Any, ...]:
    """A message of scalar fields as ABI arguments."""
    return tuple(message.SCHEMA.read(message))

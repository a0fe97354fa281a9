"""One account that sends transactions and stays with each until it is in a block.

What can happen to a transaction on the way, and what is done about it:

- the answer to sending it is lost: it is sent again, as it is, until a block has it;
- it waits too long: it is replaced by the same call with fees that are a tenth higher; whichever of them is mined counts;
- its nonce is taken before it leaves: it gets the next; after it left: Replaced, since it can never be mined;
- its block is forgotten by the chain: it is sent again (as long as `confirmations` are waited for);
- it is not mined by the deadline: Unavailable, and the next transaction takes its nonce, so that only one of them can be mined.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from tallystick.chain.endpoint import Rpc, RpcError
from tallystick.chain.transactions import Call, Fees, Nonces, SignedTransaction, sign
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address, parse_address

MAX_TRANSACTION_GAS = 1 << 24
"""EIP-7825: no transaction may ask for more."""

MAX_FEE = 1_000 * 10**9
"""Wei a unit of gas. Fees are what the endpoint says the market asks; one that lies must not turn all coins into tips."""

LOOK_AFTER = 2.0
"""Seconds between looking after a transaction that no block has: is its nonce gone, must it be sent again?"""

_SURE = 2
"""So many looks in a row must find the nonce gone: nodes behind one address do not all know the same."""

_IN_A_RECEIPT = ("transactionHash", "status", "blockNumber", "gasUsed")
_log = logging.getLogger(__name__)


class Replaced(Unavailable):
    """Another transaction of the same key took the nonce, so this one did not happen and never will."""


@dataclass(frozen=True, slots=True)
class MinedTransaction:
    """A transaction that went through. `logs` are JSON-RPC log objects; `created` is the new contract's address, if any."""

    hash: str
    block: int
    gas_used: int
    fee: int
    created: Address | None
    logs: tuple[dict[str, Any], ...]


@dataclass(slots=True)
class _Flight:
    """One call on its way, in as many versions as there were fees."""

    call: Call
    gas: int
    nonce: int
    fees: Fees
    versions: list[SignedTransaction]
    started: float = field(default_factory=time.monotonic)
    looks_gone: int = 0

    def __str__(self) -> str:
        return f"transaction {self.versions[-1].hash}"


class Sender:
    """Sends EIP-1559 transactions of one key; concurrent sends never collide. Times are seconds.

    `deadline`: from sending to the last confirmation. `bump_after`: how long a transaction may wait before it is replaced by
    one with higher fees, each time. `max_fee`: wei a unit of gas that is never gone above. `confirmations`: blocks that must
    stand on a transaction's own before it counts.
    """

    def __init__(
        self,
        rpc: Rpc,
        signer: Signer,
        *,
        deadline: float = 90.0,
        poll: float = 0.05,
        bump_after: float = 15.0,
        max_fee: int | None = MAX_FEE,
        confirmations: int = 0,
    ) -> None:
        self.rpc, self.signer = rpc, signer
        self._deadline, self._poll, self._bump_after = deadline, poll, bump_after
        self._max_fee, self._confirmations = max_fee, confirmations
        self._nonces = Nonces()
        self._lock = asyncio.Lock()

    @property
    def address(self) -> Address:
        """The account that pays for gas."""
        return self.signer.address

    def forget_nonce(self) -> None:
        """Believes the chain at once where it went back, instead of after a moment's doubt."""
        self._nonces = Nonces()

    async def send(self, to: Address | None, data: bytes, *, value: int = 0, gas: int | None = None) -> MinedTransaction:
        """Sends and waits for the receipt. `to` None creates a contract; `value` is in wei; `gas` is estimated when not given.

        Raises ContractError (before anything is sent where an estimate shows it), Refusal, Replaced, Unavailable.
        """
        call = Call(self.address, to, data, value)
        if gas is None:
            estimate = await self.rpc.quantity("eth_estimateGas", call.to_json())
            gas = min(estimate + estimate // 5, max(estimate, MAX_TRANSACTION_GAS))
        flight = await self._submit(call, gas)
        try:
            receipt = await self._receipt(flight)
        finally:
            self._nonces.free(flight.nonce)
        return await self._mined(flight, receipt)

    # --------------------------------------------------------------------------------------------------------- departure

    async def _submit(self, call: Call, gas: int) -> _Flight:
        """Under a lock, so that transactions leave in the order of their nonces."""
        fees = await self._fees()
        busy: set[int] = set()
        async with self._lock:
            for _ in range(5):
                flight = await self._prepare(call, gas, fees, busy)
                try:
                    error = await self._offer(flight.versions[-1])
                except BaseException:
                    self._nonces.free(flight.nonce)
                    raise
                if error is None:
                    return flight
                self._nonces.free(flight.nonce)
                if "nonce" not in error.reason.lower() and "replacement" not in error.reason.lower():
                    raise error
                busy.add(flight.nonce)
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"{self.address}: its nonce keeps changing: who else sends with its key?")

    async def _prepare(self, call: Call, gas: int, fees: Fees, busy: set[int]) -> _Flight:
        chain_id, pending = await self.rpc.chain_id(), await self._pending()
        if self._nonces.any_given_up:
            self._nonces.forget_given_up(await self._count("latest"))
        nonce = self._nonces.take(pending, busy)
        beaten = self._nonces.fees_to_beat(nonce)
        paid = (beaten.raised(fees) if beaten else fees).capped(self._max_fee)
        return _Flight(call, gas, nonce, paid, [sign(self.signer, call, chain_id=chain_id, nonce=nonce, gas=gas, fees=paid)])

    async def _pending(self) -> int:
        """The chain's count of this account's transactions. One below what was seen mined is believed after a moment only: the
        node may be a little behind the one that was asked before.
        """
        for pause in (0.1, 0.3, 0.6, 0.0):
            floor, count = self._nonces.floor, await self._count("pending")
            if count >= floor:
                break
            await asyncio.sleep(pause)
        else:
            self._nonces.went_back(count)
        return count

    async def _offer(self, version: SignedTransaction) -> RpcError | None:
        """Hands a transaction to the node: None if the node has it now, or may have it; else what the node has against it."""
        try:
            await self.rpc.request("eth_sendRawTransaction", version.raw)
        except RpcError as error:
            if _is_known(error) or await self._knows(version.hash):
                return None
            return error
        except Unavailable:
            _log.warning("no answer to sending %s; it will be sent again", version.hash)  # it may have arrived
        return None

    async def _fees(self) -> Fees:
        latest = await self.rpc.block()
        if latest is None or latest.base_fee is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.rpc.url} has no EIP-1559 fees")
        try:
            tip = await self.rpc.quantity("eth_maxPriorityFeePerGas")
        except RpcError:  # not every node has it
            tip = max(0, await self.rpc.quantity("eth_gasPrice") - latest.base_fee)
        return Fees(tip, 2 * latest.base_fee + tip)

    async def _count(self, block: str) -> int:
        return await self.rpc.quantity("eth_getTransactionCount", self.address, block)

    async def _knows(self, key: str) -> bool:
        return await self.rpc.request("eth_getTransactionByHash", key) is not None

    # ------------------------------------------------------------------------------------------------------------ flight

    async def _receipt(self, flight: _Flight) -> dict[str, Any]:
        """The receipt, as soon as it is deep enough. An endpoint that does not answer meanwhile is waited for, too."""
        until, pause = flight.started + self._deadline, self._poll
        look_at, bump_at = (flight.started + after for after in (min(LOOK_AFTER, self._bump_after), self._bump_after))
        receipt = None
        while time.monotonic() < until:
            try:
                receipt = await self._find(flight)
                if receipt is not None and await self._is_deep(receipt):
                    self._nonces.landed(flight.nonce)
                    return receipt
                if receipt is None and time.monotonic() >= look_at:
                    due = time.monotonic() >= bump_at
                    await self._look_after(flight, bump=due)
                    look_at = time.monotonic() + min(LOOK_AFTER, self._bump_after)
                    bump_at = time.monotonic() + self._bump_after if due else bump_at
            except Replaced:
                raise
            except Unavailable as error:
                _log.warning("%s: waiting for the chain: %s", flight, error)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 1.0)
        if receipt is not None:
            self._nonces.landed(flight.nonce)
            short = f"has no {self._confirmations} confirmations"
        else:
            self._nonces.give_up(flight.nonce, flight.fees)
            short = "was not mined"
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"{flight} {short} within {self._deadline:g} s; it may still be")

    async def _find(self, flight: _Flight) -> dict[str, Any] | None:
        """The receipt of whichever version is in a block."""
        for version in reversed(flight.versions):
            receipt = await self.rpc.request("eth_getTransactionReceipt", version.hash)
            if _is_receipt(receipt):
                return dict(receipt)
            if receipt is not None:
                raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.rpc.url} answered with a receipt that is none")
        return None

    async def _is_deep(self, receipt: dict[str, Any]) -> bool:
        if self._confirmations == 0:
            return True
        mined = self.rpc.read_number("receipt.blockNumber", receipt["blockNumber"])
        return await self.rpc.block_number() - mined >= self._confirmations

    async def _look_after(self, flight: _Flight, *, bump: bool) -> None:
        if await self._count("latest") > flight.nonce:
            flight.looks_gone += 1
            if flight.looks_gone >= _SURE and await self._find(flight) is None:
                raise Replaced(
                    Code.CHAIN_UNAVAILABLE,
                    f"{flight} did not happen: another program that sends with the key of {self.address} used its nonce "
                    f"{flight.nonce}. Give each program a key of its own",
                )
            return
        flight.looks_gone = 0
        if bump:
            await self._bump(flight)
        else:
            await self._resend(flight)

    async def _bump(self, flight: _Flight) -> None:
        """Replaces what waits by the same call with higher fees, unless that would go above the limit."""
        fees = flight.fees.raised(await self._fees())
        if self._max_fee is not None and fees.most > self._max_fee:
            await self._resend(flight)
            return
        chain_id = await self.rpc.chain_id()
        version = sign(self.signer, flight.call, chain_id=chain_id, nonce=flight.nonce, gas=flight.gas, fees=fees)
        try:
            error = await self._offer(version)
        except Refusal as refusal:  # the account cannot pay for more: what was sent stays
            _log.warning("%s waits, and higher fees were refused: %s", flight, refusal)
            return
        if error is not None:
            _log.info("%s: a version with higher fees was refused: %s", flight, error)
        flight.fees = fees
        flight.versions.append(version)

    async def _resend(self, flight: _Flight) -> None:
        try:
            await self.rpc.request("eth_sendRawTransaction", flight.versions[-1].raw)
        except TallyError as error:
            _log.debug("sending %s again: %s", flight, error)

    # ----------------------------------------------------------------------------------------------------------- arrival

    async def _mined(self, flight: _Flight, receipt: dict[str, Any]) -> MinedTransaction:
        read = self.rpc.read_number
        block, status, used = (read(f"receipt.{name}", receipt[name]) for name in ("blockNumber", "status", "gasUsed"))
        price = read("receipt.effectiveGasPrice", receipt.get("effectiveGasPrice") or "0x0")
        if status != 1:
            with contextlib.suppress(Unavailable):  # the node may not know that block's state any more
                await self.rpc.request("eth_call", flight.call.to_json(), hex(block - 1))  # raises what the contract said
            raise Refusal(Code.CHAIN_REFUSED, f"{flight} failed, and would not fail now")
        created = receipt.get("contractAddress")
        return MinedTransaction(
            hash=receipt["transactionHash"],
            block=block,
            gas_used=used,
            fee=used * price,
            created=parse_address(created) if created else None,
            logs=tuple(receipt["logs"]),
        )


def _is_receipt(raw: Any) -> bool:
    if not isinstance(raw, dict) or not isinstance(raw.get("logs"), list):
        return False
    return all(isinstance(raw.get(name), str) for name in _IN_A_RECEIPT)


def _is_known(error: RpcError) -> bool:
    return any(words in error.reason.lower() for words in ("already known", "already imported", "known transaction"))

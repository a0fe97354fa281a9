"""Sending transactions of one account and following each until it is in a block.

The sender handles these failures:

- The response to the submission is lost: the same transaction is sent again until a block contains it.
- The transaction stays pending for too long: it is replaced by the same call with fees that are a tenth higher. Either version
  may be mined.
- Its nonce is already used when it is submitted: it gets the next nonce. If the nonce is used by another transaction later, the
  call raises Replaced, because this transaction can never be mined.
- The chain drops its block: the transaction is sent again, while `confirmations` are awaited.
- It is not mined by the deadline: the call raises Unavailable, and the next transaction reuses its nonce, so at most one of the
  two is mined.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from tallystick.chain.endpoint import Rpc
from tallystick.chain.rpc_errors import RpcError, RpcErrorKind
from tallystick.chain.transactions import Call, Fees, Nonces, SignedTransaction, sign
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address, parse_address

MAX_TRANSACTION_GAS = 1 << 24
"""The maximum gas limit of a transaction (EIP-7825)."""

MAX_FEE = 1_000 * 10**9
"""The default maximum fee in wei per unit of gas. The endpoint reports the market's fees, and a dishonest one must not be able to
spend all coins on tips."""

CHECK_SECONDS = 2.0
"""Seconds between two checks of a pending transaction: whether its nonce is used, and whether it must be sent again."""

_CHECKS_TO_CONFIRM = 2
"""Consecutive checks that must find the nonce used: the nodes behind one endpoint may differ for a moment."""

_RECEIPT_MEMBERS = ("transactionHash", "status", "blockNumber", "gasUsed")
_MAY_BE_PENDING = (RpcErrorKind.KNOWN_TRANSACTION, RpcErrorKind.NONCE_AHEAD)
"""Errors of a submission after which the transaction is followed, and sent again: the node has it, or lags behind another one."""

DEFAULT_TIP = 10**9
"""The tip in wei per unit of gas where the endpoint reports none."""

_log = logging.getLogger(__name__)


class Replaced(Unavailable):
    """Another transaction of the same key used the nonce, so this one can never be mined."""


@dataclass(frozen=True, slots=True)
class MinedTransaction:
    """A mined and successful transaction. `fee` is in wei; `created` is the address of a new contract.

    `logs` are JSON-RPC log objects.
    """

    hash: str
    block: int
    gas_used: int
    fee: int
    created: Address | None
    logs: tuple[dict[str, Any], ...]


@dataclass(slots=True)
class _Pending:
    """A pending call. `versions` are its transactions, one for each change of the fees."""

    call: Call
    gas: int
    nonce: int
    fees: Fees
    versions: list[SignedTransaction]
    started: float = field(default_factory=time.monotonic)
    nonce_used_checks: int = 0

    def __str__(self) -> str:
        return f"transaction {self.versions[-1].hash}"


class Sender:
    """Sends EIP-1559 transactions of one key. Concurrent sends get different nonces. Times are seconds.

    `deadline`: the time from the submission to the last confirmation. `poll`: the first interval between two requests for the
    receipt. `bump_after`: the time after which a pending transaction is replaced by one with higher fees. `max_fee`: the maximum
    in wei per unit of gas. `confirmations`: blocks required on top of the transaction's block.
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
        """Forgets all nonces, for callers that know that the chain dropped blocks. The next nonce is the chain's own count."""
        self._nonces = Nonces()

    async def send(self, to: Address | None, data: bytes, *, value: int = 0, gas: int | None = None) -> MinedTransaction:
        """Sends a transaction and waits for its receipt. `to` None creates a contract; `value` is in wei.

        `gas` is estimated if it is not given. Raises ContractError (before anything is sent, if the estimate fails), Refusal,
        Replaced, Unavailable.
        """
        call = Call(self.address, to, data, value)
        if gas is None:
            gas = await self._gas_limit(call)
        pending_tx = await self._submit(call, gas)
        try:
            receipt = await self._receipt(pending_tx)
        except asyncio.CancelledError:
            self._nonces.leave(pending_tx.nonce, pending_tx.fees)
            raise
        finally:
            self._nonces.release(pending_tx.nonce)
        return await self._mined(pending_tx, receipt)

    async def max_cost(self, to: Address, data: bytes) -> int:
        """The most that a transaction costs at the present fees, in wei. Raises ContractError if it would revert, Unavailable."""
        gas = await self._gas_limit(Call(self.address, to, data, 0))
        return gas * (await self._fees()).capped(self._max_fee).maximum

    async def _gas_limit(self, call: Call) -> int:
        estimate = await self.rpc.quantity("eth_estimateGas", call.to_json())
        return min(estimate + estimate // 5, max(estimate, MAX_TRANSACTION_GAS))

    # -------------------------------------------------------------------------------------------------------- submission

    async def _submit(self, call: Call, gas: int) -> _Pending:
        """Submits a call. A lock makes transactions leave in the order of their nonces."""
        fees = await self._fees()
        busy: set[int] = set()
        async with self._lock:
            for _ in range(5):
                pending_tx = await self._prepare(call, gas, fees, busy)
                try:
                    error = await self._submit_version(pending_tx.versions[-1])
                except asyncio.CancelledError:
                    self._nonces.leave(pending_tx.nonce, pending_tx.fees)
                    raise
                except BaseException:
                    self._nonces.release(pending_tx.nonce)
                    raise
                if error is None:
                    return pending_tx
                self._nonces.release(pending_tx.nonce)
                if error.kind is not RpcErrorKind.NONCE_USED:
                    raise error
                busy.add(pending_tx.nonce)
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"{self.address}: its nonce keeps changing; give each program its own key")

    async def _prepare(self, call: Call, gas: int, fees: Fees, busy: set[int]) -> _Pending:
        chain_id, pending = await self.rpc.chain_id(), await self._pending()
        if self._nonces.any_abandoned:
            self._nonces.forget_abandoned_below(await self._count("latest"))
        nonce = self._nonces.take(pending, busy)
        abandoned = self._nonces.pop_abandoned_fees(nonce)
        paid = (abandoned.raised(fees) if abandoned else fees).capped(self._max_fee)
        return _Pending(call, gas, nonce, paid, [sign(self.signer, call, chain_id=chain_id, nonce=nonce, gas=gas, fees=paid)])

    async def _pending(self) -> int:
        """The chain's count of this account's transactions.

        A count below the nonces seen mined is accepted only after several requests, because a node may lag behind another one.
        """
        for pause in (0.1, 0.3, 0.6, 0.0):
            floor, count = self._nonces.floor, await self._pending_count()
            if count >= floor:
                break
            await asyncio.sleep(pause)
        else:
            self._nonces.lower_floor(count)
        return count

    async def _submit_version(self, version: SignedTransaction) -> RpcError | None:
        """Submits a transaction. Returns None if the node has it or may have it, else the node's error."""
        try:
            await self.rpc.request("eth_sendRawTransaction", version.raw)
        except RpcError as error:
            if error.kind in _MAY_BE_PENDING or await self._knows(version.hash):
                return None
            return error
        except Unavailable:
            _log.warning("no response to the submission of %s; it will be sent again", version.hash)  # the node may have it
        return None

    async def _fees(self) -> Fees:
        latest = await self.rpc.block()
        if latest is None or latest.base_fee is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.rpc.shown_url} has no EIP-1559 fees")
        tip = await self._tip(latest.base_fee)
        return Fees(tip, 2 * latest.base_fee + tip)

    async def _tip(self, base_fee: int) -> int:
        """The market's tip, by the first method that the endpoint has."""
        for method in ("eth_maxPriorityFeePerGas", "eth_gasPrice"):
            try:
                raw = await self.rpc.request(method)
            except RpcError as error:
                if error.kind is RpcErrorKind.RATE_LIMIT:
                    raise
                continue
            if raw is not None:
                price = self.rpc.read_number(method, raw)
                return price if method == "eth_maxPriorityFeePerGas" else max(0, price - base_fee)
        return DEFAULT_TIP

    async def _pending_count(self) -> int:
        """The chain's count of this account's transactions, pending ones included as far as the endpoint knows them.

        Without the block tag `pending`, the transactions that this sender sent and no longer follows are added.
        """
        raw = await self.rpc.pending("eth_getTransactionCount", self.address, "pending")
        if raw is not None:
            return self.rpc.read_number("eth_getTransactionCount", raw)
        return self._nonces.after_unfollowed(await self._count("latest"))

    async def _count(self, block: str) -> int:
        return await self.rpc.quantity("eth_getTransactionCount", self.address, block)

    async def _knows(self, key: str) -> bool:
        return await self.rpc.request("eth_getTransactionByHash", key) is not None

    # ----------------------------------------------------------------------------------------------------------- pending

    async def _receipt(self, pending_tx: _Pending) -> dict[str, Any]:
        """The receipt, once it has its confirmations. An endpoint that does not answer is asked again until the deadline."""
        until, pause = pending_tx.started + self._deadline, self._poll
        check_at, bump_at = (pending_tx.started + after for after in (min(CHECK_SECONDS, self._bump_after), self._bump_after))
        receipt = None
        while time.monotonic() < until:
            try:
                receipt = await self._find(pending_tx)
                if receipt is not None and await self._is_confirmed(receipt):
                    self._nonces.mark_mined(pending_tx.nonce)
                    return receipt
                if receipt is None and time.monotonic() >= check_at:
                    due = time.monotonic() >= bump_at
                    await self._check_pending(pending_tx, bump=due)
                    check_at = time.monotonic() + min(CHECK_SECONDS, self._bump_after)
                    bump_at = time.monotonic() + self._bump_after if due else bump_at
            except Replaced:
                raise
            except Unavailable as error:
                _log.warning("%s: waiting for the chain: %s", pending_tx, error)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 1.0)
        if receipt is not None:
            self._nonces.mark_mined(pending_tx.nonce)
            outcome = f"has fewer than {self._confirmations} confirmations"
        else:
            self._nonces.abandon(pending_tx.nonce, pending_tx.fees)
            outcome = "was not mined"
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"{pending_tx} {outcome} within {self._deadline:g} s; it may still be mined")

    async def _find(self, pending_tx: _Pending) -> dict[str, Any] | None:
        """The receipt of the version that is in a block; None if no version is."""
        for version in reversed(pending_tx.versions):
            receipt = await self.rpc.request("eth_getTransactionReceipt", version.hash)
            if _is_receipt(receipt):
                return dict(receipt)
            if receipt is not None:
                raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.rpc.shown_url} returned a malformed receipt")
        return None

    async def _is_confirmed(self, receipt: dict[str, Any]) -> bool:
        if self._confirmations == 0:
            return True
        mined = self.rpc.read_number("receipt.blockNumber", receipt["blockNumber"])
        return await self.rpc.block_number() - mined >= self._confirmations

    async def _check_pending(self, pending_tx: _Pending, *, bump: bool) -> None:
        if await self._count("latest") > pending_tx.nonce:
            pending_tx.nonce_used_checks += 1
            if pending_tx.nonce_used_checks >= _CHECKS_TO_CONFIRM and await self._find(pending_tx) is None:
                raise Replaced(
                    Code.CHAIN_UNAVAILABLE,
                    f"{pending_tx} will not be mined: another program with the key of {self.address} used its nonce "
                    f"{pending_tx.nonce}. Give each program its own key",
                )
            return
        pending_tx.nonce_used_checks = 0
        if bump:
            await self._bump(pending_tx)
        else:
            await self._resend(pending_tx)

    async def _bump(self, pending_tx: _Pending) -> None:
        """Replaces the pending transaction by one with higher fees, unless they would exceed the maximum."""
        fees = pending_tx.fees.raised(await self._fees())
        if self._max_fee is not None and fees.maximum > self._max_fee:
            await self._resend(pending_tx)
            return
        chain_id = await self.rpc.chain_id()
        version = sign(self.signer, pending_tx.call, chain_id=chain_id, nonce=pending_tx.nonce, gas=pending_tx.gas, fees=fees)
        try:
            error = await self._submit_version(version)
        except Refusal as refusal:  # the account cannot pay the higher fees; the former version stays pending
            _log.warning("%s is pending, and higher fees were refused: %s", pending_tx, refusal)
            return
        if error is not None:
            _log.info("%s: a version with higher fees was refused: %s", pending_tx, error)
        pending_tx.fees = fees
        pending_tx.versions.append(version)

    async def _resend(self, pending_tx: _Pending) -> None:
        try:
            await self.rpc.request("eth_sendRawTransaction", pending_tx.versions[-1].raw)
        except TallyError as error:
            _log.debug("sending %s again: %s", pending_tx, error)

    # ------------------------------------------------------------------------------------------------------------- mined

    async def _mined(self, pending_tx: _Pending, receipt: dict[str, Any]) -> MinedTransaction:
        read = self.rpc.read_number
        block, status, used = (read(f"receipt.{name}", receipt[name]) for name in ("blockNumber", "status", "gasUsed"))
        price = read("receipt.effectiveGasPrice", receipt.get("effectiveGasPrice") or "0x0")
        if status != 1:
            with contextlib.suppress(Unavailable):  # the node may have pruned that block's state
                await self.rpc.request("eth_call", pending_tx.call.to_json(), hex(block - 1))  # raises the contract's error
            raise Refusal(Code.CHAIN_REFUSED, f"{pending_tx} reverted, but the same call succeeds now")
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
    return all(isinstance(raw.get(name), str) for name in _RECEIPT_MEMBERS)

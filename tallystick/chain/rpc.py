"""One JSON-RPC endpoint, and one account that sends transactions through it.

Transport faults, time-outs and rate limits become Unavailable after bounded retries; a revert becomes a ContractError that
names the contract's custom error. Every wait has a deadline.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError, ClientTimeout
from eth_account import Account
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.types import RPCEndpoint

from tallystick.chain.codec import revert_error
from tallystick.protocol.eip712 import Signer, keccak
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address, parse_address

MAX_TRANSACTION_GAS = 1 << 24
"""EIP-7825: no transaction may ask for more."""

_RATE_LIMITS = (-32005, 429)
_REVERTED = 3
_log = logging.getLogger(__name__)


class RpcError(Unavailable):
    """The endpoint answered with a JSON-RPC error that is not a revert; `number` is its code."""

    def __init__(self, method: str, number: int, message: str) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, f"{method}: {message} ({number})")
        self.number, self.reason = number, message


class Rpc:
    """JSON-RPC to one endpoint. `timeout` is seconds for one HTTP exchange, `attempts` how often a transport fault is tried."""

    def __init__(self, url: str, *, timeout: float = 10.0, attempts: int = 4, backoff: float = 0.1) -> None:
        self.url = url
        kwargs = {"timeout": ClientTimeout(timeout)}
        self._provider = AsyncHTTPProvider(url, kwargs, exception_retry_configuration=None)
        self.web3 = AsyncWeb3(self._provider)
        self._attempts, self._backoff = attempts, backoff
        self._chain_id: int | None = None

    async def request(self, method: str, *params: Any) -> Any:
        """The result of one method. Raises Unavailable, RpcError, ContractError or Refusal."""
        for attempt in itertools.count(1):
            try:
                return await self._once(method, params)
            except Unavailable as error:
                final = isinstance(error, RpcError) and error.number not in _RATE_LIMITS
                if final or attempt >= self._attempts:
                    raise
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1))
        raise AssertionError

    async def _once(self, method: str, params: tuple[Any, ...]) -> Any:
        try:
            response = await self._provider.make_request(RPCEndpoint(method), list(params))
        except (ClientError, TimeoutError, OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} does not answer {method}: {said}") from error
        if not isinstance(response, dict):
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} answered {method} with something else")
        if "error" in response:
            raise _error(method, response["error"])
        return response.get("result")

    async def chain_id(self) -> int:
        """The chain's id, asked once."""
        if self._chain_id is None:
            self._chain_id = int(await self.request("eth_chainId"), 16)
        return self._chain_id

    async def block_number(self) -> int:
        """The number of the last block."""
        return int(await self.request("eth_blockNumber"), 16)

    async def timestamp(self) -> int:
        """The time of the last block, in Unix seconds."""
        return int((await self.request("eth_getBlockByNumber", "latest", False))["timestamp"], 16)

    async def balance(self, account: Address) -> int:
        """Coins of an account, in wei."""
        return int(await self.request("eth_getBalance", account, "latest"), 16)

    async def call(self, to: Address, data: bytes, *, sender: Address | None = None, block: str = "latest") -> bytes:
        """The output of a call that changes nothing. Raises ContractError."""
        fields = {"to": to, "data": "0x" + data.hex()} | ({"from": sender} if sender else {})
        return bytes.fromhex((await self.request("eth_call", fields, block))[2:])

    async def close(self) -> None:
        """Closes the HTTP session."""
        await self._provider.disconnect()


def _error(method: str, error: Any) -> TallyError:
    if not isinstance(error, dict):
        return RpcError(method, 0, str(error)[:500])
    number, message, data = error.get("code", 0), str(error.get("message", ""))[:500], error.get("data")
    if isinstance(data, dict):  # some nodes wrap it
        data = data.get("data")
    if "insufficient funds" in message.lower():
        return Refusal(Code.INSUFFICIENT_FUNDS, f"{method}: {message}")
    if number == _REVERTED or "revert" in message.lower():
        returned = bytes.fromhex(data[2:]) if isinstance(data, str) and data.startswith("0x") else b""
        return revert_error(returned, message)
    return RpcError(method, number if isinstance(number, int) else 0, message)


@dataclass(frozen=True, slots=True)
class Mined:
    """A transaction that went through. `logs` are JSON-RPC log objects; `created` is the new contract's address, if any."""

    hash: str
    block: int
    gas_used: int
    created: Address | None
    logs: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Sent:
    hash: str
    raw: str
    nonce: int
    call: dict[str, str]


class Sender:
    """Sends EIP-1559 transactions of one key.

    Nonces are counted here, so concurrent sends never collide; let no other process send with the same key. `deadline` is
    seconds from sending to the receipt.
    """

    def __init__(self, rpc: Rpc, signer: Signer, *, deadline: float = 90.0, poll: float = 0.05) -> None:
        self.rpc, self.signer = rpc, signer
        self._deadline, self._poll = deadline, poll
        self._nonce: int | None = None
        self._lock = asyncio.Lock()

    @property
    def address(self) -> Address:
        """The account that pays for gas."""
        return self.signer.address

    def forget_nonce(self) -> None:
        """Asks the chain for the next nonce again, where something else has sent with this key or the chain went back."""
        self._nonce = None

    async def send(self, to: Address | None, data: bytes, *, value: int = 0, gas: int | None = None) -> Mined:
        """Sends and waits for the receipt. `to` None creates a contract; `value` is in wei; `gas` is estimated when not given.

        Raises ContractError (before anything is sent where an estimate shows it), Refusal, Unavailable.
        """
        call = {"from": self.address, "data": "0x" + data.hex(), "value": hex(value)} | ({"to": to} if to else {})
        if gas is None:
            estimate = int(await self.rpc.request("eth_estimateGas", call), 16)
            gas = min(estimate + estimate // 5, max(estimate, MAX_TRANSACTION_GAS))
        return await self._receipt(await self._submit(call, gas))

    async def _submit(self, call: dict[str, str], gas: int) -> _Sent:
        """Under a lock, so that transactions leave in the order of their nonces."""
        fees = await self._fees()
        async with self._lock:
            for _ in range(3):
                sent = await self._sign(call, gas, fees)
                try:
                    await self.rpc.request("eth_sendRawTransaction", sent.raw)
                except RpcError as error:
                    if not _is_known(error) and await self._is_unknown(sent.hash):
                        self._nonce = None
                        if "nonce" not in error.reason.lower():
                            raise
                        continue
                except Refusal:
                    self._nonce = None
                    raise
                except Unavailable:
                    # It may have arrived. Waiting for the receipt sends it again until the deadline.
                    _log.warning("no answer to sending %s; it will be sent again", sent.hash)
                self._nonce = sent.nonce + 1
                return sent
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"{self.address}: its nonce keeps changing: who else sends with its key?")

    async def _sign(self, call: dict[str, str], gas: int, fees: dict[str, int]) -> _Sent:
        if self._nonce is None:
            self._nonce = int(await self.rpc.request("eth_getTransactionCount", self.address, "pending"), 16)
        fields = {"type": 2, "chainId": await self.rpc.chain_id(), "nonce": self._nonce, "gas": gas} | fees
        body: dict[str, Any] = {"data": call["data"], "value": int(call["value"], 16)}
        if "to" in call:
            body["to"] = bytes.fromhex(call["to"][2:])
        raw = bytes(Account.sign_transaction(fields | body, self.signer.secret).raw_transaction)
        return _Sent("0x" + keccak(raw).hex(), "0x" + raw.hex(), self._nonce, call)

    async def _fees(self) -> dict[str, int]:
        tip = int(await self.rpc.request("eth_maxPriorityFeePerGas"), 16)
        base = int((await self.rpc.request("eth_getBlockByNumber", "latest", False))["baseFeePerGas"], 16)
        return {"maxPriorityFeePerGas": tip, "maxFeePerGas": 2 * base + tip}

    async def _is_unknown(self, key: str) -> bool:
        return await self.rpc.request("eth_getTransactionByHash", key) is None

    async def _receipt(self, sent: _Sent) -> Mined:
        until = time.monotonic() + self._deadline
        pause, resend = self._poll, time.monotonic() + 2.0
        while time.monotonic() < until:
            receipt = await self.rpc.request("eth_getTransactionReceipt", sent.hash)
            if receipt is not None:
                return await self._mined(sent, receipt)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 1.0)
            if time.monotonic() >= resend:
                resend = time.monotonic() + 10.0
                await self._resend(sent)
        self._nonce = None  # ask again: whatever holds this one up may have changed the count
        raise Unavailable(Code.CHAIN_UNAVAILABLE, f"transaction {sent.hash} was not mined within {self._deadline:g} s")

    async def _resend(self, sent: _Sent) -> None:
        try:
            await self.rpc.request("eth_sendRawTransaction", sent.raw)
        except TallyError as error:
            _log.debug("sending %s again: %s", sent.hash, error)

    async def _mined(self, sent: _Sent, receipt: dict[str, Any]) -> Mined:
        if int(receipt["status"], 16) != 1:
            before = hex(int(receipt["blockNumber"], 16) - 1)
            await self.rpc.request("eth_call", sent.call, before)  # raises what the contract said
            raise Refusal(Code.BAD_MESSAGE, f"transaction {sent.hash} failed, and would not fail now")
        created = receipt.get("contractAddress")
        return Mined(
            hash=sent.hash,
            block=int(receipt["blockNumber"], 16),
            gas_used=int(receipt["gasUsed"], 16),
            created=parse_address(created) if created else None,
            logs=tuple(receipt["logs"]),
        )


def _is_known(error: RpcError) -> bool:
    return any(words in error.reason.lower() for words in ("already known", "already imported", "known transaction"))

"""JSON-RPC client for one endpoint of a chain (https://ethereum.github.io/execution-apis/).

Transport errors, timeouts, rate limits and malformed responses raise Unavailable after a bounded number of retries. A revert
raises a ContractError with the contract's custom error. Every request has a timeout, and every response a maximum size.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from tallystick.chain.codec import revert_error
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.types import Address

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_PAUSE = 10.0

MAX_NUMBER = (1 << 63) - 1
"""The largest block number and timestamp that is accepted: the largest integer of a database."""

_RATE_LIMITS = (429, -32005, -32007)
_BUSY = (408, 429)
_REVERTED = (3, -32015)
_HASH = re.compile(r"0x[0-9a-fA-F]{64}")
_HEX = re.compile(r"0x[0-9a-fA-F]*")
_JSON = {"content-type": "application/json"}


def is_hash(raw: object) -> bool:
    """Whether a JSON value is the hash of a block or a transaction."""
    return isinstance(raw, str) and _HASH.fullmatch(raw) is not None


class RpcError(Unavailable):
    """The endpoint returned an error that is not a revert. `number` is the JSON-RPC code, or the HTTP status."""

    def __init__(self, method: str, number: int, message: str) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, f"{method}: {message} ({number})")
        self.number, self.reason = number, message


class WrongChain(Unavailable):
    """The endpoint serves another chain than the deployment's. A retry does not help: the settings must change."""

    retry = False


class _RequestFailed(Unavailable):
    """One HTTP exchange failed. `pause` is the endpoint's Retry-After in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, message)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class Block:
    """What is of interest in a block's header. `base_fee` is wei a unit of gas; None where the chain has no EIP-1559 fees."""

    number: int
    hash: str
    timestamp: int
    base_fee: int | None


class Rpc:
    """One endpoint. `timeout` is seconds for one HTTP exchange, `attempts` how often a transport fault is tried."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        attempts: int = 4,
        backoff: float = 0.1,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.url, self._sleep = url, sleep
        self._timeout, self._attempts, self._backoff = ClientTimeout(timeout), attempts, backoff
        self._session: ClientSession | None = None
        self._ids = itertools.count(1)
        self._chain_id: int | None = None
        self._expected: int | None = None

    def expect(self, chain_id: int) -> None:
        """From now on every request raises WrongChain if the endpoint is of another chain."""
        self._expected = chain_id

    async def request(self, method: str, *params: Any) -> Any:
        """The result of one method. Raises Unavailable, RpcError, WrongChain, ContractError or Refusal."""
        (result,) = await self.batch((method, *params))
        if isinstance(result, TallyError):
            raise result
        return result

    async def batch(self, *calls: Sequence[Any]) -> list[Any]:
        """The results of several (method, *params), in one HTTP exchange and therefore by one node.

        The result of a method that failed is its error. Raises Unavailable, WrongChain.
        """
        if self._expected is not None and self._expected != await self.chain_id():
            raise WrongChain(
                Code.CHAIN_UNAVAILABLE,
                f"the deployment is on chain {self._expected}, but {self.url} is chain {self._chain_id}: give the address of a "
                f"node of chain {self._expected}, or the deployment file of chain {self._chain_id}",
            )
        return await self._with_retries(calls)

    async def _with_retries(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        for attempt in itertools.count(1):
            try:
                results = await self._exchange(calls)
                limited = next((r for r in results if isinstance(r, RpcError) and r.number in _RATE_LIMITS), None)
                if limited is None or attempt >= self._attempts:
                    return results
                pause = 0.0
            except _RequestFailed as fault:
                if attempt >= self._attempts:
                    raise
                pause = fault.pause
            await self._sleep(min(max(pause, self._backoff * 2 ** (attempt - 1)), MAX_PAUSE))
        raise AssertionError

    async def _exchange(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        requests = [{"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params} for method, *params in calls]
        name = calls[0][0] if len(calls) == 1 else f"{len(calls)} requests"
        answers = await self._post(requests[0] if len(requests) == 1 else requests, name)
        if isinstance(answers, dict) and answers.get("error") is not None:  # an error of the whole batch, or of the only request
            return [_error(call[0], answers["error"]) for call in calls]
        listed = answers if isinstance(answers, list) else [answers]
        by_id = {answer["id"]: answer for answer in listed if isinstance(answer, dict) and isinstance(answer.get("id"), int)}
        return [self._result(request, by_id.get(request["id"])) for request in requests]

    def _result(self, request: dict[str, Any], answer: dict[str, Any] | None) -> Any:
        if answer is not None and answer.get("error") is not None:
            return _error(request["method"], answer["error"])
        if answer is None or "result" not in answer:
            raise _RequestFailed(f"the chain at {self.url} returned no result for {request['method']}")
        return answer["result"]

    async def _post(self, body: Any, name: str) -> Any:
        """Posts a request and decodes the response. A JSON-RPC error in the body takes precedence over the HTTP status."""
        if self._session is None:
            self._session = ClientSession(timeout=self._timeout, trust_env=uses_proxy(self.url))
        try:
            async with self._session.post(self.url, data=orjson.dumps(body), headers=_JSON) as response:
                raw, status = await _read(response), response.status
        except (ClientError, TimeoutError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise _RequestFailed(
                f"the chain at {self.url} does not answer {name}: {reason}; start its node, or correct the JSON-RPC URL (rpc)"
            ) from error
        answer = _decode(raw)
        if status == 200 and answer is not None:
            return answer
        if status not in _BUSY and status < 500:
            if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
                return answer
            if status >= 300:
                return {"error": {"code": status, "message": f"HTTP {status} {response.reason}"}}
        reason = f"HTTP {status} {response.reason}" if status >= 300 else "something that is not JSON"
        raise _RequestFailed(
            f"the chain at {self.url} answered {name} with {reason}", _seconds(response.headers.get("retry-after"))
        )

    async def chain_id(self) -> int:
        """The chain's id, requested once."""
        if self._chain_id is None:
            (answer,) = await self._with_retries([("eth_chainId",)])
            if isinstance(answer, TallyError):
                raise answer
            self._chain_id = self.read_number("eth_chainId", answer)
        return self._chain_id

    async def quantity(self, method: str, *params: Any) -> int:
        """The result of a method that returns a number."""
        return self.read_number(method, await self.request(method, *params))

    def read_number(self, method: str, raw: object) -> int:
        """Reads a number in a method's result. Raises Unavailable if it is not in hex form."""
        if not isinstance(raw, str) or not _HEX.fullmatch(raw) or len(raw) < 3:
            raise Unavailable(
                Code.CHAIN_UNAVAILABLE, f"{method}: expected a number in hex from the chain at {self.url}, got {str(raw)[:80]!r}"
            )
        return int(raw, 16)

    async def block_number(self) -> int:
        """The number of the last block."""
        return await self.quantity("eth_blockNumber")

    async def block(self, block: int | str = "latest") -> Block | None:
        """A block by number or tag; None if it does not exist yet."""
        raw = await self.request("eth_getBlockByNumber", hex(block) if isinstance(block, int) else block, False)
        return self.read_block(raw)

    def read_block(self, raw: object) -> Block | None:
        """Reads a block. Raises Unavailable if it is malformed."""
        if raw is None:
            return None
        known = raw if isinstance(raw, dict) else {}
        number, timestamp = (self.read_number(f"block.{name}", known.get(name)) for name in ("number", "timestamp"))
        if not is_hash(known.get("hash")) or max(number, timestamp) > MAX_NUMBER:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} returned a malformed block")
        fee = known.get("baseFeePerGas")
        return Block(number, known["hash"], timestamp, None if fee is None else self.read_number("block.baseFeePerGas", fee))

    async def timestamp(self) -> int:
        """The time of the last block, in Unix seconds."""
        latest = await self.block()
        if latest is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} has no blocks")
        return latest.timestamp

    async def now(self) -> int:
        """The time in Unix seconds that a transaction sent now would probably have: that of the pending block."""
        raw = await self.request("eth_getBlockByNumber", "pending", False)
        return self.read_number("block.timestamp", raw.get("timestamp")) if isinstance(raw, dict) else await self.timestamp()

    async def balance(self, account: Address) -> int:
        """The balance of an account in wei."""
        return await self.quantity("eth_getBalance", account, "latest")

    async def call(self, to: Address, data: bytes, *, sender: Address | None = None, block: str = "latest") -> bytes:
        """The output of a read-only call. Raises ContractError."""
        fields = {"to": to, "data": "0x" + data.hex()} | ({"from": sender} if sender else {})
        raw = await self.request("eth_call", fields, block)
        try:
            return bytes.fromhex(raw.removeprefix("0x"))
        except (AttributeError, ValueError):
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"eth_call: expected bytes in hex from the chain at {self.url}") from None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


async def _read(response: ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > MAX_RESPONSE_BYTES:
            raise ValueError(f"more than {MAX_RESPONSE_BYTES} bytes")
    return bytes(raw)


def _decode(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def _seconds(raw: str | None) -> float:
    return float(raw) if raw is not None and raw.isascii() and raw.isdigit() else 0.0


def _error(method: str, error: Any) -> TallyError:
    if not isinstance(error, dict):
        return RpcError(method, 0, str(error)[:500])
    number, message, data = error.get("code", 0), str(error.get("message", ""))[:500], error.get("data")
    if isinstance(data, dict):  # some nodes nest the data
        data = data.get("data")
    if "insufficient funds" in message.lower():
        return Refusal(Code.INSUFFICIENT_FUNDS, f"{method}: {message}")
    if number in _REVERTED or "revert" in message.lower():
        match = _HEX.search(data) if isinstance(data, str) else None  # Nethermind puts text before the data
        digits = match[0][2:] if match else ""
        return revert_error(bytes.fromhex(digits) if len(digits) % 2 == 0 else b"", message)
    return RpcError(method, number if isinstance(number, int) else 0, message)

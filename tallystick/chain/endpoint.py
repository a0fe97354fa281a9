"""JSON-RPC to one endpoint of a chain (https://ethereum.github.io/execution-apis/).

Transport faults, time-outs, rate limits and nonsense become Unavailable after bounded retries; a revert becomes a ContractError
that names the contract's custom error. Every wait has a deadline, every answer a largest size.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from tallystick.chain.codec import revert_error
from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address

MAX_RESPONSE_BYTES = 64 * 1024 * 1024
MAX_PAUSE = 10.0

MAX_NUMBER = (1 << 63) - 1
"""No chain has more blocks or seconds, and no database takes more."""

_RATE_LIMITS = (429, -32005, -32007)
_BUSY = (408, 429)
_REVERTED = (3, -32015)
_HASH = re.compile(r"0x[0-9a-fA-F]{64}")
_HEX = re.compile(r"0x[0-9a-fA-F]*")
_JSON = {"content-type": "application/json"}


def is_hash(raw: object) -> bool:
    """Whether this is what names a block or a transaction."""
    return isinstance(raw, str) and _HASH.fullmatch(raw) is not None


class RpcError(Unavailable):
    """The endpoint answered with an error that is not a revert; `number` is the JSON-RPC code, or the HTTP status."""

    def __init__(self, method: str, number: int, message: str) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, f"{method}: {message} ({number})")
        self.number, self.reason = number, message


class WrongChain(Unavailable):
    """The endpoint is of another chain than the deployment. Waiting does not help: the settings must change."""

    retry = False


class _Fault(Unavailable):
    """One exchange failed; `pause` is how long the endpoint wants to be left alone."""

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

    def __init__(self, url: str, *, timeout: float = 10.0, attempts: int = 4, backoff: float = 0.1) -> None:
        self.url = url
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
        """The results of several (method, *params) in one exchange, so by one and the same node; an error in place of a result
        where a method failed. Raises Unavailable, WrongChain.
        """
        if self._expected is not None and self._expected != await self.chain_id():
            raise WrongChain(
                Code.CHAIN_UNAVAILABLE,
                f"the deployment is on chain {self._expected}, but {self.url} is chain {self._chain_id}: give the address of a "
                f"node of chain {self._expected}, or the deployment file of chain {self._chain_id}",
            )
        return await self._patiently(calls)

    async def _patiently(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        for attempt in itertools.count(1):
            try:
                results = await self._exchange(calls)
                limited = next((r for r in results if isinstance(r, RpcError) and r.number in _RATE_LIMITS), None)
                if limited is None or attempt >= self._attempts:
                    return results
                pause = 0.0
            except _Fault as fault:
                if attempt >= self._attempts:
                    raise
                pause = fault.pause
            await asyncio.sleep(min(max(pause, self._backoff * 2 ** (attempt - 1)), MAX_PAUSE))
        raise AssertionError

    async def _exchange(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        requests = [{"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params} for method, *params in calls]
        what = calls[0][0] if len(calls) == 1 else f"{len(calls)} requests"
        answers = await self._post(requests[0] if len(requests) == 1 else requests, what)
        if isinstance(answers, dict) and answers.get("error") is not None:  # of the whole batch, or of the only request
            return [_error(call[0], answers["error"]) for call in calls]
        listed = answers if isinstance(answers, list) else [answers]
        by_id = {answer["id"]: answer for answer in listed if isinstance(answer, dict) and isinstance(answer.get("id"), int)}
        return [self._result(request, by_id.get(request["id"])) for request in requests]

    def _result(self, request: dict[str, Any], answer: dict[str, Any] | None) -> Any:
        if answer is not None and answer.get("error") is not None:
            return _error(request["method"], answer["error"])
        if answer is None or "result" not in answer:
            raise _Fault(f"the chain at {self.url} answered {request['method']} with something else")
        return answer["result"]

    async def _post(self, body: Any, what: str) -> Any:
        """The decoded answer. An HTTP status that is no success counts only where the body is no JSON-RPC error."""
        if self._session is None:
            self._session = ClientSession(timeout=self._timeout)
        try:
            async with self._session.post(self.url, data=orjson.dumps(body), headers=_JSON) as response:
                raw, status = await _read(response), response.status
        except (ClientError, TimeoutError, OSError, ValueError) as error:
            said = str(error) or type(error).__name__
            raise _Fault(f"the chain at {self.url} does not answer {what}: {said}") from error
        answer = _decode(raw)
        if status == 200 and answer is not None:
            return answer
        if status not in _BUSY and status < 500:
            if isinstance(answer, dict) and isinstance(answer.get("error"), dict):
                return answer
            if status >= 300:
                return {"error": {"code": status, "message": f"HTTP {status} {response.reason}"}}
        said = f"HTTP {status} {response.reason}" if status >= 300 else "something that is not JSON"
        raise _Fault(f"the chain at {self.url} answered {what} with {said}", _seconds(response.headers.get("retry-after")))

    async def chain_id(self) -> int:
        """The chain's id, asked once."""
        if self._chain_id is None:
            (answer,) = await self._patiently([("eth_chainId",)])
            if isinstance(answer, TallyError):
                raise answer
            self._chain_id = self.read_number("eth_chainId", answer)
        return self._chain_id

    async def quantity(self, method: str, *params: Any) -> int:
        """The result of a method that answers with a number."""
        return self.read_number(method, await self.request(method, *params))

    def read_number(self, method: str, raw: object) -> int:
        """A number from its hex form. Raises Unavailable for what is none."""
        if not isinstance(raw, str) or not _HEX.fullmatch(raw) or len(raw) < 3:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} answered {method} with {str(raw)[:80]!r}")
        return int(raw, 16)

    async def block_number(self) -> int:
        """The number of the last block."""
        return await self.quantity("eth_blockNumber")

    async def block(self, which: int | str = "latest") -> Block | None:
        """A block by number or tag; None if there is none yet."""
        raw = await self.request("eth_getBlockByNumber", hex(which) if isinstance(which, int) else which, False)
        return self.read_block(raw)

    def read_block(self, raw: object) -> Block | None:
        """A block from its JSON. Raises Unavailable for what is none."""
        if raw is None:
            return None
        known = raw if isinstance(raw, dict) else {}
        number, timestamp = (self.read_number(f"block.{name}", known.get(name)) for name in ("number", "timestamp"))
        if not is_hash(known.get("hash")) or max(number, timestamp) > MAX_NUMBER:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} answered with a block that is none")
        fee = known.get("baseFeePerGas")
        return Block(number, known["hash"], timestamp, None if fee is None else self.read_number("block.baseFeePerGas", fee))

    async def timestamp(self) -> int:
        """The time of the last block, in Unix seconds."""
        latest = await self.block()
        if latest is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} has no blocks")
        return latest.timestamp

    async def now(self) -> int:
        """The time that a transaction sent now would have, as well as it can be known: that of the block to come."""
        raw = await self.request("eth_getBlockByNumber", "pending", False)
        return self.read_number("block.timestamp", raw.get("timestamp")) if isinstance(raw, dict) else await self.timestamp()

    async def balance(self, account: Address) -> int:
        """Coins of an account, in wei."""
        return await self.quantity("eth_getBalance", account, "latest")

    async def call(self, to: Address, data: bytes, *, sender: Address | None = None, block: str = "latest") -> bytes:
        """The output of a call that changes nothing. Raises ContractError."""
        fields = {"to": to, "data": "0x" + data.hex()} | ({"from": sender} if sender else {})
        raw = await self.request("eth_call", fields, block)
        try:
            return bytes.fromhex(raw.removeprefix("0x"))
        except (AttributeError, ValueError):
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.url} answered a call with no bytes") from None

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
    if isinstance(data, dict):  # some nodes wrap it
        data = data.get("data")
    if "insufficient funds" in message.lower():
        return Refusal(Code.INSUFFICIENT_FUNDS, f"{method}: {message}")
    if number in _REVERTED or "revert" in message.lower():
        found = _HEX.search(data) if isinstance(data, str) else None  # Nethermind puts words before it
        digits = found[0][2:] if found else ""
        return revert_error(bytes.fromhex(digits) if len(digits) % 2 == 0 else b"", message)
    return RpcError(method, number if isinstance(number, int) else 0, message)

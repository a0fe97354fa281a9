"""JSON-RPC client for one endpoint of a chain (https://ethereum.github.io/execution-apis/).

Endpoints differ, and the client adapts to each:

- Transport errors, timeouts, rate limits (an HTTP status or an error object, of a batch or of some of its members) and nodes that
  lag behind the chain's head are tried again, a bounded number of times, after the time that the endpoint asks for.
- A batch that is refused as too large is sent in parts, and the size that works is remembered.
- Responses may be out of order, have their ids as strings, or be a list with one element.
- An endpoint without the block tag `pending` is asked for the `latest` block instead.

What still fails raises Unavailable; a revert raises a ContractError with the contract's custom error. Every request has a
timeout, every response a maximum size, and no message shows the path or query of the URL, which often contain an API key.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tallystick.chain.log_span import LogSpan
from tallystick.chain.rpc_errors import RpcError, RpcErrorKind, read_rpc_error, refuses_range
from tallystick.chain.rpc_transport import RequestFailed, RpcResponse, RpcTransport
from tallystick.protocol.errors import Code, TallyError, Unavailable
from tallystick.protocol.public_url import without_secrets
from tallystick.protocol.types import Address

MAX_PAUSE = 10.0
MAX_NUMBER = (1 << 63) - 1
"""The largest block number and timestamp that is accepted: the largest integer of a database."""

_LIMIT_BACKOFF = 5
"""The pause after a rate limit is so many times longer than after a transport fault, if the endpoint names none."""
_BATCH_LIMIT_ATTEMPTS = 3
"""Attempts at a batch that is refused as a whole for a rate limit. Then it is split, since each of its requests may count."""
_REFUSED_ANYWAY = (401, 402, 404, 405)
"""HTTP statuses that refuse every request alike, so a smaller batch does not help."""
_HASH = re.compile(r"0x[0-9a-fA-F]{64}")
_HEX = re.compile(r"0x[0-9a-fA-F]*")


def is_hash(raw: object) -> bool:
    """Whether a JSON value is the hash of a block or a transaction."""
    return isinstance(raw, str) and _HASH.fullmatch(raw) is not None


class WrongChain(Unavailable):
    """The endpoint serves another chain than the deployment's. A retry does not help: the settings must change."""

    retry = False


class BatchSplit(Unavailable):
    """The endpoint answers these requests in several exchanges only, which different nodes may answer."""

    def __init__(self) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, "the chain's endpoint does not answer so many requests in one batch")


@dataclass(frozen=True, slots=True)
class Block:
    """What is of interest in a block's header. `base_fee` is wei a unit of gas; None where the chain has no EIP-1559 fees."""

    number: int
    hash: str
    timestamp: int
    base_fee: int | None


class Rpc:
    """One endpoint. `timeout` is seconds for one HTTP exchange. `attempts` is how often a transport fault is tried in a row,
    `limit_attempts` how often a rate limit or a node that lags is.

    `shown_url` is the URL for messages, without an API key. `log_span` is the range of blocks that one eth_getLogs may have.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        attempts: int = 4,
        limit_attempts: int = 6,
        backoff: float = 0.1,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.url, self.log_span, self._sleep = url, LogSpan(), sleep
        self._transport = RpcTransport(url, timeout)
        self.shown_url = self._transport.shown_url
        self._attempts, self._limit_attempts, self._backoff = attempts, limit_attempts, backoff
        self._batch_cap: int | None = None
        self._without_pending = set[str]()
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

    async def batch(self, *calls: Sequence[Any], together: bool = False) -> list[Any]:
        """The results of several (method, *params), in as few HTTP exchanges as the endpoint permits.

        With `together` it is one exchange, and therefore one node answers, or BatchSplit is raised. The result of a method that
        failed is its error. Raises Unavailable, WrongChain.
        """
        if self._expected is not None and self._expected != await self.chain_id():
            raise WrongChain(
                Code.CHAIN_UNAVAILABLE,
                f"the deployment is on chain {self._expected}, but {self.shown_url} is chain {self._chain_id}: give the address "
                f"of a node of chain {self._expected}, or the deployment file of chain {self._chain_id}",
            )
        return await self._answers(calls, together=together)

    # ---------------------------------------------------------------------------------------------------- batches and retries

    async def _answers(self, calls: Sequence[Sequence[Any]], *, together: bool = False) -> list[Any]:
        """The results of a batch, which is split if the endpoint refuses its size. The size that is accepted is remembered."""
        if self._batch_cap is not None and len(calls) > self._batch_cap:
            return await self._split(calls, self._batch_cap, together=together)
        try:
            answers = await self._persistently(calls, together=together)
            size, limited = _smaller_batch(answers), _is_limited(answers)
        except RequestFailed as fault:
            if len(calls) == 1 or fault.http_status is None:
                raise
            answers, size, limited = [], 1, _is_limited([fault])  # some endpoints fail on every batch
        if together and limited and not any(isinstance(answer, RpcError) and refuses_range(answer) for answer in answers):
            raise BatchSplit
        if size is None:
            return answers
        answers = await self._split(calls, size, together=together)
        if not limited and not all(isinstance(answer, RpcError) for answer in answers):
            self._batch_cap = min(size, self._batch_cap or size)
        return answers

    async def _split(self, calls: Sequence[Sequence[Any]], size: int, *, together: bool) -> list[Any]:
        if together:
            raise BatchSplit
        answers = []
        for start in range(0, len(calls), size):
            answers += await self._answers(calls[start : start + size])
        return answers

    async def _persistently(self, calls: Sequence[Sequence[Any]], *, together: bool) -> list[Any]:
        """The results of one batch. Transport faults and temporary errors are tried again, the latter for the members concerned.

        Raises RequestFailed after the last attempt.
        """
        answers: list[Any] = [None] * len(calls)
        waiting, attempt = list(range(len(calls))), 1
        while True:
            try:
                newest = await self._exchange([calls[place] for place in waiting])
            except RequestFailed as fault:
                if attempt >= self._allowed([fault], len(waiting)):
                    raise
                await self._pause([fault], attempt)
                attempt += 1
                continue
            for place, answer in zip(waiting, newest, strict=True):
                answers[place] = answer
            again = [place for place in waiting if _is_temporary(calls[place], answers[place])]
            attempt = attempt if len(again) == len(waiting) or together else 1
            if not again or attempt >= self._allowed(newest, len(waiting)):
                return answers
            await self._pause(newest, attempt)
            waiting = waiting if together else again
            attempt += 1

    def _allowed(self, answers: Sequence[Any], calls: int) -> int:
        """How many attempts in a row such answers may have."""
        if any(isinstance(answer, RequestFailed) for answer in answers) and not _is_limited(answers):
            return self._attempts
        return self._limit_attempts if calls == 1 else min(self._limit_attempts, _BATCH_LIMIT_ATTEMPTS)

    async def _pause(self, answers: Sequence[Any], attempt: int) -> None:
        asked = max((answer.pause for answer in answers if isinstance(answer, RpcError | RequestFailed)), default=0.0)
        own = self._backoff * 2 ** (attempt - 1)
        if not asked and _is_limited(answers):
            own *= _LIMIT_BACKOFF
        await self._sleep(min(max(asked, own), MAX_PAUSE))

    async def _exchange(self, calls: Sequence[Sequence[Any]]) -> list[Any]:
        """The results and errors of one HTTP exchange, in the order of the calls. Raises RequestFailed."""
        requests = [{"jsonrpc": "2.0", "id": next(self._ids), "method": method, "params": params} for method, *params in calls]
        name = calls[0][0] if len(calls) == 1 else f"{len(calls)} requests"
        response = await self._transport.post(requests[0] if len(requests) == 1 else requests, name)
        document = response.document
        listed = document if isinstance(document, list) else [document]
        by_id = {key: answer for answer in listed if (key := _id(answer)) is not None}
        of_all = next((a for a in listed if isinstance(a, dict) and a.get("error") and (_id(a) is None or a is document)), None)
        if len(requests) == 1 and isinstance(document, dict) and document.get("id") is None:
            by_id[requests[0]["id"]] = document
        results = [self._result(request, by_id.get(request["id"], of_all), response, len(calls) > 1) for request in requests]
        if response.status >= 500 and all(isinstance(r, RpcError) and r.kind is RpcErrorKind.OTHER for r in results):
            text = f"the chain at {self.shown_url} answered HTTP {response.status}: {results[0]}"
            raise RequestFailed(text, http_status=response.status, pause=response.pause)
        refusal = next((r for r in results if isinstance(r, RpcError) and r.kind is RpcErrorKind.BATCH_LIMIT), None)
        missing = next((r for r in results if isinstance(r, RequestFailed)), None)
        if missing is not None and refusal is None:
            raise missing
        return [refusal if isinstance(result, RequestFailed) else result for result in results]

    def _result(self, request: dict[str, Any], answer: dict[str, Any] | None, response: RpcResponse, batch: bool) -> Any:
        """A member's result, its error, or RequestFailed if the endpoint returned neither."""
        if answer is not None and answer.get("error") is not None:
            raw = answer["error"]
            if isinstance(raw, dict):
                raw = raw | {"message": without_secrets(str(raw.get("message") or ""), self.url)}
            error = read_rpc_error(request["method"], raw, at=self.shown_url, status=response.status, batch=batch)
            if isinstance(error, RpcError):
                error.pause = error.pause or response.pause
            return error
        if answer is None or "result" not in answer:
            text = f"the chain at {self.shown_url} returned no result for {request['method']}"
            return RequestFailed(text, http_status=response.status, pause=response.pause)
        return answer["result"]

    async def chain_id(self) -> int:
        """The chain's id, requested once."""
        if self._chain_id is None:
            (answer,) = await self._answers([("eth_chainId",)])
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
                Code.CHAIN_UNAVAILABLE,
                f"{method}: expected a number in hex from the chain at {self.shown_url}, got {str(raw)[:80]!r}",
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
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.shown_url} returned a malformed block")
        fee = known.get("baseFeePerGas")
        return Block(number, known["hash"], timestamp, None if fee is None else self.read_number("block.baseFeePerGas", fee))

    async def timestamp(self) -> int:
        """The time of the last block, in Unix seconds."""
        latest = await self.block()
        if latest is None:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, f"the chain at {self.shown_url} has no blocks")
        return latest.timestamp

    async def now(self) -> int:
        """The time in Unix seconds that a transaction sent now would probably have: that of the pending block."""
        raw = await self.pending("eth_getBlockByNumber", "pending", False)
        return self.read_number("block.timestamp", raw.get("timestamp")) if isinstance(raw, dict) else await self.timestamp()

    async def pending(self, method: str, *params: Any) -> Any:
        """The result of a method with the block tag `pending` in its parameters; None if the endpoint does not know the tag."""
        if method in self._without_pending:
            return None
        try:
            return await self.request(method, *params)
        except RpcError as error:
            if error.kind is RpcErrorKind.RATE_LIMIT:
                raise
            if error.kind is not RpcErrorKind.BEHIND:
                self._without_pending.add(method)
            return None

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
            raise Unavailable(
                Code.CHAIN_UNAVAILABLE, f"eth_call: expected bytes in hex from the chain at {self.shown_url}"
            ) from None

    async def close(self) -> None:
        """Closes the connections."""
        await self._transport.close()


def _id(answer: object) -> int | None:
    """The id of a response. Some proxies return numbers as strings."""
    raw = answer.get("id") if isinstance(answer, dict) else None
    if isinstance(raw, str) and raw.isascii() and raw.isdigit():
        return int(raw)
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else None


def _is_temporary(call: Sequence[Any], answer: Any) -> bool:
    """Whether the same request may succeed soon: a rate limit, or a node that lags behind another one of the endpoint."""
    if isinstance(answer, RpcError):
        return answer.kind in (RpcErrorKind.RATE_LIMIT, RpcErrorKind.BEHIND)
    return answer is None and tuple(call[:2]) == ("eth_getBlockByNumber", "latest")


def _is_limited(answers: Sequence[Any]) -> bool:
    """Whether a rate limit is among these answers."""
    return any(
        (isinstance(answer, RpcError) and answer.kind is RpcErrorKind.RATE_LIMIT)
        or (isinstance(answer, RequestFailed) and (answer.http_status == HTTPStatus.TOO_MANY_REQUESTS or answer.pause > 0))
        for answer in answers
    )


def _smaller_batch(answers: Sequence[Any]) -> int | None:
    """The size to try after these answers to a batch; None if the answers stand.

    A batch was refused if an error says so, or if all members have the same error and that error may be of the batch.
    """
    errors = [answer for answer in answers if isinstance(answer, RpcError)]
    refusal = next((error for error in errors if error.kind is RpcErrorKind.BATCH_LIMIT), None)
    if len(answers) == 1 or not errors:
        return None
    if refusal is not None:
        named = [int(number) for number in re.findall(r"(?<![\w-])\d{1,5}(?!\w)", refusal.reason)]
        return max((number for number in named if 0 < number < len(answers)), default=len(answers) // 2)
    if len(errors) < len(answers) or len({(error.number, error.reason) for error in errors}) > 1:
        return None
    if errors[0].kind is RpcErrorKind.RATE_LIMIT:
        return 1
    return None if errors[0].number in _REFUSED_ANYWAY else len(answers) // 2

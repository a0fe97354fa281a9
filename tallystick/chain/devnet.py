"""The local chain as a JSON-RPC server, which `tally chain` runs for several processes to share.

It serves the standard methods that web3 libraries and wallets use, single or in batches, and the evm_ methods of test chains:
move the clock, mine, snapshot, revert (https://ethereum.org/developers/docs/apis/json-rpc). All methods run on one worker thread,
so a slow call delays other calls but not the event loop. `GET /health` does not use the worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
from eth_account.hdaccount import seed_from_mnemonic
from eth_account.hdaccount.deterministic import HDPath
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tallystick.chain.evm import GAS_LIMIT, PRIORITY_FEE, Evm, EvmCall, Rejected, Reverted
from tallystick.chain.hex_encoding import InvalidParams, parse_data, parse_quantity
from tallystick.chain.local_access import LocalAccessGuard
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signer

MNEMONIC = "test test test test test test test test test test test junk"
"""The mnemonic that all Ethereum test chains use. Its keys are public and must hold no real money."""

MAX_BODY = 4 * 1024 * 1024
MAX_BATCH = 200
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, BAD_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
REVERTED, REJECTED = 3, -32000

_log = logging.getLogger(__name__)
_ABSENT = object()


def dev_accounts(count: int = 10) -> list[Signer]:
    """The funded accounts of the local chain, which are the same in every run (BIP-44, m/44'/60'/0'/0/i of MNEMONIC)."""
    seed = seed_from_mnemonic(MNEMONIC, "")
    return [Signer(HDPath(f"m/44'/60'/0'/0/{i}").derive(seed)) for i in range(count)]


def build_app(chain_id: int = 31337, accounts: int = 10, *, origins: Sequence[str] = (), hosts: Sequence[str] = ()) -> ASGIApp:
    """An ASGI app that serves a new chain: POST / takes JSON-RPC 2.0, GET /health returns the chain id.

    `origins` are the web pages that may use it, `hosts` the further host names of requests (see LocalAccessGuard).
    """
    evm = Evm(chain_id, [bytes.fromhex(signer.address[2:]) for signer in dev_accounts(accounts)])
    handler = JsonRpcHandler(evm, [signer.address for signer in dev_accounts(accounts)])
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evm")

    async def rpc(request: Request) -> Response:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return JSONResponse(_error(None, INVALID_REQUEST, f"request larger than {MAX_BODY} bytes"), 413)
        answer = await asyncio.get_running_loop().run_in_executor(worker, handler.handle, bytes(body))
        return Response(answer, media_type="application/json")

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "chain_id": chain_id})

    return LocalAccessGuard(Starlette(routes=[Route("/", rpc, methods=["POST"]), Route("/health", health)]), origins, hosts)


def _error(request_id: Any, code: int, message: str, extra: object = _ABSENT) -> dict[str, Any]:
    error = {"code": code, "message": message} | ({} if extra is _ABSENT else {"data": extra})
    return {"jsonrpc": "2.0", "id": request_id, "error": error}


class _JsonRpcError(Exception):
    """A JSON-RPC error: code, message and, for a revert, data."""


class JsonRpcHandler:
    """Answers JSON-RPC requests from one Evm. Not thread-safe."""

    def __init__(self, evm: Evm, accounts: list[str]) -> None:
        self.evm = evm
        self._methods = self._standard(accounts) | self._testing()

    def handle(self, body: bytes) -> bytes:
        """The response to a request or a batch. Errors of the caller are JSON-RPC errors in the response."""
        try:
            request = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            return orjson.dumps(_error(None, PARSE_ERROR, f"not JSON: {error}"))
        if not isinstance(request, list):
            return orjson.dumps(self._respond(request))
        if not 0 < len(request) <= MAX_BATCH:
            return orjson.dumps(_error(None, INVALID_REQUEST, f"a batch has 1 to {MAX_BATCH} requests"))
        return orjson.dumps([self._respond(item) for item in request])

    def _respond(self, request: object) -> dict[str, Any]:
        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return _error(None, INVALID_REQUEST, "expected an object with jsonrpc, id, method and params")
        request_id = request.get("id")
        try:
            result = self._result(request["method"], request.get("params", []))
        except _JsonRpcError as error:
            return _error(request_id, *error.args)
        return {"jsonrpc": "2.0", "id": request_id, "result": result}

    def _result(self, name: str, params: object) -> Any:
        method = self._methods.get(name)
        if method is None:
            raise _JsonRpcError(NO_METHOD, f"the method {name[:80]} does not exist")
        if not isinstance(params, list):
            raise _JsonRpcError(BAD_PARAMS, "params: expected a list")
        try:
            return method(*params)
        except Reverted as error:
            raise _JsonRpcError(REVERTED, str(error), "0x" + error.data.hex()) from None
        except Rejected as error:
            raise _JsonRpcError(REJECTED, str(error)) from None
        except (InvalidParams, TypeError) as error:
            raise _JsonRpcError(BAD_PARAMS, str(error)) from None
        except Exception as error:  # a bug here or in py-evm fails this call and not the chain
            _log.exception("devnet: %s failed", name)
            raise _JsonRpcError(INTERNAL, f"{type(error).__name__}: {error}") from error

    # ------------------------------------------------------------------------------------------------------------ methods

    def _standard(self, accounts: list[str]) -> dict[str, Callable[..., Any]]:
        evm = self.evm
        return {
            "web3_clientVersion": lambda: "tallystick-devnet",
            "web3_sha3": lambda raw: "0x" + keccak(parse_data(raw)).hex(),
            "net_version": lambda: str(evm.chain_id),
            "net_listening": lambda: True,
            "eth_chainId": lambda: hex(evm.chain_id),
            "eth_syncing": lambda: False,
            "eth_accounts": lambda: accounts,
            "eth_blockNumber": lambda: hex(len(evm.blocks) - 1),
            "eth_gasPrice": lambda: hex(evm.base_fee + PRIORITY_FEE),
            "eth_maxPriorityFeePerGas": lambda: hex(PRIORITY_FEE),
            "eth_feeHistory": self._fee_history,
            "eth_getBalance": lambda account, block="latest": hex(evm.balance(parse_data(account, 20), self._block(block))),
            "eth_getCode": lambda account, block="latest": "0x" + evm.code(parse_data(account, 20), self._block(block)).hex(),
            "eth_getTransactionCount": lambda account, block="latest": hex(
                evm.nonce(parse_data(account, 20), self._block(block))
            ),
            "eth_getStorageAt": lambda account, slot, block="latest": (
                f"0x{evm.storage(parse_data(account, 20), parse_quantity(slot), self._block(block)):064x}"
            ),
            "eth_call": self._call,
            "eth_estimateGas": self._estimate,
            "eth_sendRawTransaction": lambda raw: evm.send_raw(parse_data(raw)),
            "eth_getTransactionByHash": lambda key: evm.transactions.get("0x" + parse_data(key, 32).hex()),
            "eth_getTransactionReceipt": lambda key: evm.receipts.get("0x" + parse_data(key, 32).hex()),
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": self._block_by_hash,
            "eth_getLogs": self._logs,
        }

    def _testing(self) -> dict[str, Callable[..., Any]]:
        evm = self.evm

        def mine(blocks: object = 1) -> str:
            evm.mine(min(max(parse_quantity(blocks), 1), 1_000))
            return "0x0"

        def set_time(timestamp: object) -> None:
            evm.set_time(parse_quantity(timestamp))

        return {
            "evm_increaseTime": lambda seconds: hex(evm.increase_time(parse_quantity(seconds))),
            "evm_setNextBlockTimestamp": set_time,
            "evm_mine": mine,
            "evm_snapshot": lambda: hex(evm.snapshot()),
            "evm_revert": lambda snapshot: evm.revert(parse_quantity(snapshot)),
        }

    def _block(self, raw: object) -> int:
        """The number of an existing block, given by number, by tag, or by an EIP-1898 object. Raises Rejected."""
        if isinstance(raw, dict):
            if "blockHash" in raw:
                return self._number_of(raw["blockHash"])
            raw = raw.get("blockNumber")
        last = len(self.evm.blocks) - 1
        if raw in ("latest", "pending", "safe", "finalized", None):
            return last
        number = 0 if raw == "earliest" else parse_quantity(raw)
        if number > last:
            raise Rejected(f"block not found: {number}, the last is {last}")
        return number

    def _number_of(self, raw: object) -> int:
        block_hash = "0x" + parse_data(raw, 32).hex()
        for number in range(len(self.evm.blocks) - 1, -1, -1):
            if self.evm.blocks[number]["hash"] == block_hash:
                return number
        raise Rejected(f"block not found: {block_hash}")

    def _call(self, call: object, block: object = "latest", *_: object) -> str:
        return "0x" + self.evm.call(_read_call(call), self._block(block)).hex()

    def _estimate(self, call: object, block: object = "latest", *_: object) -> str:
        return hex(self.evm.estimate_gas(_read_call(call), self._block(block)))

    def _block_by_number(self, raw: object, full: object = False) -> dict[str, Any] | None:
        if raw == "pending":  # no transaction is pending; the time is that of the next block
            last = self.evm.blocks[-1]
            pending = {"hash": None, "number": hex(len(self.evm.blocks)), "timestamp": hex(self.evm.next_timestamp())}
            return last | pending | {"parentHash": last["hash"], "transactions": [], "baseFeePerGas": hex(self.evm.base_fee)}
        try:
            return self._with_bodies(self._block(raw), full)
        except Rejected:
            return None

    def _block_by_hash(self, raw: object, full: object = False) -> dict[str, Any] | None:
        try:
            return self._with_bodies(self._number_of(raw), full)
        except Rejected:
            return None

    def _with_bodies(self, number: int, full: object) -> dict[str, Any]:
        block = self.evm.blocks[number]
        return block | {"transactions": [self.evm.transactions[key] for key in block["transactions"]]} if full else block

    def _fee_history(self, count: object, newest: object = "latest", percentiles: object = None) -> dict[str, Any]:
        last = self._block(newest)
        first = max(0, last + 1 - min(parse_quantity(count), 1_024))
        headers = self.evm.headers[first : last + 1]
        after = self.evm.headers[last + 1].base_fee_per_gas if last + 1 < len(self.evm.headers) else self.evm.base_fee
        rewards = len(percentiles) if isinstance(percentiles, list) else 0
        return {
            "oldestBlock": hex(first),
            "baseFeePerGas": [hex(header.base_fee_per_gas) for header in headers] + [hex(after)],
            "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
            "reward": [[hex(PRIORITY_FEE)] * rewards for _ in headers],
        }

    def _logs(self, wanted: object) -> list[dict[str, Any]]:
        if not isinstance(wanted, dict):
            raise InvalidParams("expected a filter object")
        if "blockHash" in wanted:
            first = last = self._number_of(wanted["blockHash"])
        else:
            newest = len(self.evm.blocks) - 1
            first = self._block(wanted.get("fromBlock", "latest")) if wanted.get("fromBlock") != "earliest" else 0
            last = (
                newest if wanted.get("toBlock") in (None, "latest", "pending") else min(parse_quantity(wanted["toBlock"]), newest)
            )
        addresses = _any_of(wanted.get("address"))
        topics = [_any_of(topic) for topic in wanted.get("topics") or []]
        return [log for log in self.evm.logs if first <= int(log["blockNumber"], 16) <= last and _matches(log, addresses, topics)]


def _read_call(raw: object) -> EvmCall:
    if not isinstance(raw, dict):
        raise InvalidParams("expected a call object")
    return EvmCall(
        sender=parse_data(raw.get("from") or "0x" + "00" * 20, 20),
        to=parse_data(raw["to"], 20) if raw.get("to") else b"",
        data=parse_data(raw.get("input") or raw.get("data") or "0x"),
        value=parse_quantity(raw.get("value") or 0),
        gas=min(parse_quantity(raw.get("gas") or GAS_LIMIT), GAS_LIMIT),
    )


def _any_of(raw: object) -> set[str] | None:
    """The alternatives of one filter member in lower case; None if any value matches."""
    if raw is None:
        return None
    return {"0x" + parse_data(item).hex() for item in (raw if isinstance(raw, list) else [raw])}


def _matches(log: dict[str, Any], addresses: set[str] | None, topics: list[set[str] | None]) -> bool:
    if addresses and log["address"] not in addresses:
        return False
    if len(topics) > len(log["topics"]):
        return False
    return all(not wanted or topic in wanted for wanted, topic in zip(topics, log["topics"], strict=False))

"""A JSON-RPC proxy in front of a real chain that injects the faults a test asks for."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import httpx

from tallystick.protocol.codecs import keccak
from tests.chain.harness import serving


class Fault(Enum):
    """The fault that the proxy injects instead of forwarding a request and its answer."""

    RATE_LIMIT = "429"
    LIMIT_ERROR = "a JSON-RPC error that means 429"
    BROKEN = "500"
    GARBAGE = "no JSON"
    NONSENSE = "JSON, but no answer"
    HANG = "no answer"
    CUT = "half an answer, then a closed connection"
    LOSE = "passes the request on, then closes the connection"
    SWALLOW = "acknowledges a transaction and forgets it"
    NO_METHOD = "a JSON-RPC error: there is no such method"


class Proxy:
    """`faults` lists, for each method, what happens to its next requests; `calls` counts what arrived, by method.

    `answers` replace the results of a method, in a batch from place `alter_from` on; `most_blocks` is the largest range of logs.
    """

    def __init__(self, target: str) -> None:
        self.target, self.url = target, ""
        self.reset()

    def reset(self) -> None:
        """Clears all faults, altered answers and counts."""
        self.faults: dict[str, list[Fault]] = {}
        self.answers: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()
        self.alter_from, self.most_blocks = 0, 1 << 32

    def plan(self, method: str, *faults: Fault) -> None:
        """Applies these faults to the next requests of a method."""
        self.faults.setdefault(method, []).extend(faults)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        requests = json.loads(body)
        methods = [request["method"] for request in (requests if isinstance(requests, list) else [requests])]
        self.calls.update(methods)
        fault = next((self.faults[m].pop(0) for m in methods if self.faults.get(m)), None)
        if fault is None:
            await _reply(send, 200, self._altered(requests, await self._pass_on(body)))
        else:
            await self._misbehave(fault, requests, body, send)

    def _altered(self, requests: Any, raw: bytes) -> bytes:
        answers = json.loads(raw)
        pairs = list(zip(requests, answers, strict=True)) if isinstance(requests, list) else [(requests, answers)]
        for place, (request, answer) in enumerate(pairs):
            if request["method"] in self.answers and (len(pairs) == 1 or place >= self.alter_from):
                answer.pop("error", None)
                answer["result"] = self.answers[request["method"]]
            if request["method"] == "eth_getLogs" and _blocks(request["params"][0]) > self.most_blocks:
                del answer["result"]
                answer["error"] = {"code": -32602, "message": "block range is too wide"}
        return json.dumps(answers).encode()

    async def _pass_on(self, body: bytes) -> bytes:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            return (await client.post(self.target, content=body, headers={"content-type": "application/json"})).content

    async def _misbehave(self, fault: Fault, request: Any, body: bytes, send: Any) -> None:
        if fault is Fault.RATE_LIMIT:
            await _reply(send, 429, b"slow down", (b"retry-after", b"0"))
        elif fault is Fault.LIMIT_ERROR:
            error = {"code": -32005, "message": "limit exceeded"}
            await _reply(send, 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}).encode())
        elif fault is Fault.NO_METHOD:
            error = {"code": -32601, "message": "the method does not exist/is not available"}
            await _reply(send, 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}).encode())
        elif fault is Fault.BROKEN:
            await _reply(send, 500, b'{"error": "internal"}')
        elif fault is Fault.GARBAGE:
            await _reply(send, 200, b"<html>\xff\xfe")
        elif fault is Fault.NONSENSE:
            await _reply(send, 200, b'{"jsonrpc": "2.0", "id": 0}')
        elif fault is Fault.HANG:
            await asyncio.sleep(1)
        elif fault is Fault.SWALLOW:
            key = "0x" + keccak(bytes.fromhex(request["params"][0][2:])).hex()
            await _reply(send, 200, json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": key}).encode())
        else:
            answer = await self._pass_on(body) if fault is Fault.LOSE else b'{"jsonrpc": "2.0", "id"'
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100000")]})
            await send({"type": "http.response.body", "body": answer[:10], "more_body": True})
            # Ending here, short of the announced length, makes the server close the connection.


def _blocks(wanted: dict[str, str]) -> int:
    return int(wanted["toBlock"], 16) - int(wanted["fromBlock"], 16) + 1


async def _reply(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    known = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": known})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def misbehaving(target: str) -> Iterator[Proxy]:
    """Serves a proxy in front of a chain on a port of its own."""
    proxy = Proxy(target)
    with serving(proxy) as proxy.url:
        yield proxy

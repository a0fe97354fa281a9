"""Hosted JSON-RPC providers as they are: a proxy in front of a real chain that limits, refuses and answers in their manners."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from tests.chain.harness import serving

Requests = list[dict[str, Any]]


@dataclass(frozen=True)
class Reply:
    """A response: a JSON document, or a text with its content type."""

    document: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None


Refuse = Callable[["OddProvider", Requests], Reply | None]
"""Refuses a whole exchange, or returns None."""
RefuseMember = Callable[["OddProvider", dict[str, Any]], dict[str, Any] | None]
"""The error of one request, or None."""
Alter = Callable[[Any], Any]
"""Changes the document of a response."""


@dataclass
class OddProvider:
    """`refuse` and `refuse_member` come before the chain, `alter` after it. Counts what arrived, by size of the batch."""

    target: str
    refuse: Refuse | None = None
    refuse_member: RefuseMember | None = None
    alter: Alter | None = None
    compress: bool = False
    sizes: list[int] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    refused: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        document = json.loads(body)
        requests = document if isinstance(document, list) else [document]
        self.sizes.append(len(requests))
        self.calls.update(request["method"] for request in requests)
        reply = self.refuse(self, requests) if self.refuse else None
        if reply is None:
            answers = [await self._answer(request) for request in requests]
            answer = answers if isinstance(document, list) else answers[0]
            reply = Reply(self.alter(answer) if self.alter else answer)
        else:
            self.refused += 1
        await self._send(reply, send)

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        error = self.refuse_member(self, request) if self.refuse_member else None
        if error is not None:
            self.refused += 1
            return {"jsonrpc": "2.0", "id": request["id"], "error": error}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            answer: dict[str, Any] = (await client.post(self.target, json=request)).json()
            return answer

    async def _send(self, reply: Reply, send: Any) -> None:
        raw = orjson.dumps(reply.document) if reply.text is None else reply.text.encode()
        headers = {"content-type": "application/json" if reply.text is None else "text/html"} | reply.headers
        if self.compress:
            raw, headers = gzip.compress(raw), headers | {"content-encoding": "gzip"}
        headers["content-length"] = str(len(raw))
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
        await send({"type": "http.response.body", "body": raw})


@contextmanager
def odd(target: str, **behaviour: Any) -> Iterator[tuple[OddProvider, str]]:
    """Serves a provider in front of a chain on a port of its own. Yields it with its URL, which contains a key."""
    provider = OddProvider(target, **behaviour)
    with serving(provider) as url:
        yield provider, f"{url}/v3/{KEY}"


KEY = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"


def error(number: int, message: str, **extra: Any) -> dict[str, Any]:
    """A JSON-RPC error object."""
    return {"code": number, "message": message} | extra


def every_other(reply: Callable[[Requests], Reply]) -> Refuse:
    """Refuses the first exchange, the third, and so on."""
    return lambda provider, requests: reply(requests) if len(provider.sizes) % 2 == 1 else None


def each_with(number: int, message: str, *, status: int = 200, **extra: Any) -> Callable[[Requests], Reply]:
    """The same error for each request, as an array for a batch."""

    def reply(requests: Requests) -> Reply:
        errors = [{"jsonrpc": "2.0", "id": request["id"], "error": error(number, message, **extra)} for request in requests]
        return Reply(errors if len(errors) > 1 else errors[0], status)

    return reply


def whole(number: int, message: str, status: int = 200) -> Callable[[Requests], Reply]:
    """One error object for all requests, without an id."""
    return lambda _: Reply({"jsonrpc": "2.0", "id": None, "error": error(number, message)}, status)


def page(status: int, text: str = "<html><title>Sign in</title></html>", **headers: str) -> Callable[[Requests], Reply]:
    """A web page."""
    return lambda _: Reply(None, status, {name.replace("_", "-"): value for name, value in headers.items()}, text)


def more_than(most: int, reply: Callable[[Requests], Reply]) -> Refuse:
    """Refuses batches of more than `most` requests."""
    return lambda _, requests: reply(requests) if len(requests) > most else None


def wide_logs(most: int, message: str, number: int = -32600) -> RefuseMember:
    """Refuses an eth_getLogs over more than `most` blocks. `{first}` and `{last}` in the message are a range that would do."""

    def refuse(_: OddProvider, request: dict[str, Any]) -> dict[str, Any] | None:
        query = request["params"][0] if request["method"] == "eth_getLogs" else {}
        if "fromBlock" not in query:
            return None
        first, last = int(query["fromBlock"], 16), int(query["toBlock"], 16)
        return error(number, message.format(first=hex(first), last=hex(first + most - 1))) if last - first >= most else None

    return refuse


def without_pending(number: int, message: str) -> RefuseMember:
    """Refuses the block tag `pending`."""
    return lambda _, request: error(number, message) if "pending" in request["params"] else None

"""Records the answer of a turn on its way to the caller: gives it the gateway's ids, and stores it before its end is sent."""

from __future__ import annotations

import secrets
from typing import Any

from starlette.types import Message, Send

from tallystick.client.dialects.responses_events import ResponseEvents, ResponseRewriter
from tallystick.client.gateway.response_state import ResponseState, Turn
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.routes import JSON, media_type
from tallystick.protocol.sse import EVENT_STREAM

_STORED = ("completed", "incomplete")


class ResponseRecorder:
    """An ASGI `send` for the answer of one turn. Errors, and answers that are no Response, pass unchanged."""

    def __init__(self, send: Send, state: ResponseState, turn: Turn) -> None:
        self._send, self._state, self._turn = send, state, turn
        self._start: Message | None = None
        """The head of a whole answer, which waits for its body because the body's length changes."""
        self._body = bytearray()
        self._events: ResponseEvents | None = None
        self._rewriter: ResponseRewriter | None = None

    async def __call__(self, message: Message) -> None:
        """Passes on a message of ASGI."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body" and self._events is not None:
            await self._send_events(self._events, message.get("body", b""), more=bool(message.get("more_body")))
        elif message["type"] == "http.response.body" and self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_whole(self._start, bytes(self._body))
        else:
            await self._send(message)

    async def _begin(self, message: Message) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message.get("headers", ())}
        kind = media_type(headers.get("content-type", ""))
        if message["status"] == 200 and kind in (JSON, EVENT_STREAM):
            job = headers.get("x-tally-job") or secrets.token_hex(16)
            self._rewriter = ResponseRewriter(job, self._turn.members, self._turn.fixed, self._turn.created)
            if kind == JSON:
                self._start = message
                return
            self._events = ResponseEvents(self._rewriter)
            message = {**message, "headers": [pair for pair in message["headers"] if pair[0].lower() != b"content-length"]}
        await self._send(message)

    async def _send_whole(self, start: Message, body: bytes) -> None:
        try:
            document = load_lenient(body)
        except ValueError:
            document = None
        if isinstance(document, dict) and isinstance(document.get("output"), list) and self._rewriter is not None:
            response = self._rewriter.document(document)
            await self._store(response)
            body = dump_lenient(response)
        headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    async def _send_events(self, events: ResponseEvents, data: bytes, *, more: bool) -> None:
        rewritten = events.feed(data)
        if not more:
            rewritten += events.finish()
        for event, response in rewritten:
            if response is not None:
                await self._store(response)
            await self._send({"type": "http.response.body", "body": event, "more_body": True})
        if not more:
            await self._send({"type": "http.response.body", "body": b""})

    async def _store(self, response: dict[str, Any]) -> None:
        if response.get("status") in _STORED:
            await self._state.keep(self._turn, response)

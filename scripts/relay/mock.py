"""A mock engine with almost no cost: an OpenAI-compatible endpoint on uvloop with its own HTTP parser.

The request's `user` member controls it: "200 0.02" streams 200 chunks, 0.02 seconds apart.
"""

from __future__ import annotations

import asyncio
import sys

import orjson
import uvloop

MODEL = "bench"
BODY = 500
"""Bytes of a reply that is not streamed."""

_CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"bench","choices":[%s]}\n\n'
_ROLE = _CHUNK % b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
_WORD = _CHUNK % b'{"index":0,"delta":{"content":"word "},"finish_reason":null}'
_LAST = _CHUNK % b'{"index":0,"delta":{},"finish_reason":"stop"}'
_USAGE = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"bench","choices":[],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}}\n\n'
)
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _whole() -> bytes:
    message = {"role": "assistant", "content": ""}
    reply = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18},
    }
    message["content"] = "x" * (BODY - len(orjson.dumps(reply)))
    return _json(orjson.dumps(reply))


def _json(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def _piece(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_WHOLE = _whole()
_MODELS = _json(orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}]}))


class MockEngine(asyncio.Protocol):
    """One connection, which answers requests with a content-length in sequence."""

    def __init__(self) -> None:
        self._buffer = b""
        self._transport: asyncio.Transport
        self._stream: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport  # type: ignore[assignment]  # TCP's is an asyncio.Transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Stops the stream."""
        if self._stream is not None:
            self._stream.cancel()

    def data_received(self, data: bytes) -> None:
        """Answers each complete request."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            start = head.find(b"content-length:")
            size = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get"):
            self._transport.write(_MODELS)
            return
        if not body:  # routers probe their engines so
            self._transport.write(_json(b"{}"))
            return
        request = orjson.loads(body)
        if not request.get("stream"):
            self._transport.write(_WHOLE)
            return
        chunks, gap = (request.get("user") or "8 0").split()
        report_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self._stream = asyncio.get_running_loop().create_task(self._run(int(chunks), float(gap), report_usage=report_usage))

    async def _run(self, chunks: int, gap: float, *, report_usage: bool) -> None:
        write = self._transport.write
        write(_STREAM + _piece(_ROLE))
        for _ in range(chunks):
            if gap:
                await asyncio.sleep(gap)
            write(_piece(_WORD))
        if report_usage:
            write(_piece(_USAGE % (chunks, chunks + 9)))
        write(_piece(_LAST) + _piece(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockEngine, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))

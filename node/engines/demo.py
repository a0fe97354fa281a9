"""The demo engine: an OpenAI-compatible server in its own process that is a stand-in, and says so.

No model is behind it. Its one model is called `tally-demo-stand-in`, and every answer says that it is a stand-in and repeats some
of what was asked. The token rule, also in each answer's `system_fingerprint`: one token for each word between white space.

It can be told to be slow or to fail, by its settings and by POST /demo/behaviour, for the next `times` requests or for good:

    {"first_token_seconds": 0.5, "token_seconds": 0.02, "fail": "die", "after": 3, "times": 1}

    fail          what it does
    none          answers
    bad_request   400, the client's fault
    busy          429
    error         500
    hang          takes the request and says nothing
    die           closes the connection in mid-answer, after `after` tokens
    stall         stops in mid-answer, after `after` tokens, and keeps the connection
    garbage       sends broken JSON after `after` tokens
    no_usage      leaves usage out

Start it with `python -m node.engines.demo --port 8000`; it prints its address, and stops on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

import orjson
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tallystick.protocol.sse import DONE, EVENT_STREAM
from tallystick.runtime.serving import serving, wait_for_stop_signal

MODEL = "tally-demo-stand-in"
OWNER = "tally-demo"
FINGERPRINT = "stand-in:one-token-per-word"
CONTEXT_TOKENS = 8_192
_DIMENSIONS = 16
_ECHO_WORDS = 24
_FOR_EVER = 3_600.0
_SLICE_SECONDS = 0.05


class FailureMode(str, Enum):
    """Ways to fail; the module's docstring tells what each does."""

    NONE = "none"
    BAD_REQUEST = "bad_request"
    BUSY = "busy"
    ERROR = "error"
    HANG = "hang"
    DIE = "die"
    STALL = "stall"
    GARBAGE = "garbage"
    NO_USAGE = "no_usage"


@dataclass(frozen=True, slots=True)
class Simulation:
    """How the engine behaves. Times are seconds, `after` counts tokens, `times` requests (0: from now on)."""

    first_token_seconds: float = 0.0
    token_seconds: float = 0.0
    fail: FailureMode = FailureMode.NONE
    after: int = 1
    times: int = 0

    @classmethod
    def from_json(cls, raw: Any) -> Simulation:
        """Reads what POST /demo/behaviour takes. Raises ValueError or TypeError."""
        return cls(**(raw | {"fail": FailureMode(raw.get("fail", "none"))}))


class DemoEngine:
    """The server as an ASGI app (`app`). `seen` counts the requests that it got, `stopped` the answers that nobody read to
    their end.
    """

    def __init__(self, behaviour: Simulation | None = None) -> None:
        self._usual = behaviour or Simulation()
        self._next: Simulation | None = None
        self._left = 0
        self._numbers = itertools.count(1)
        self.seen = self.stopped = 0
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/demo/behaviour", self._behave, methods=["POST", "GET"]),
            ]
        )

    async def _models(self, _request: Request) -> Response:
        entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": OWNER, "max_model_len": CONTEXT_TOKENS}
        return _json({"object": "list", "data": [entry]})

    async def _behave(self, request: Request) -> Response:
        if request.method == "POST":
            try:
                told = Simulation.from_json(orjson.loads(await request.body()))
            except (ValueError, TypeError, AttributeError) as error:
                known = ", ".join(field.name for field in fields(Simulation))
                return _error(400, f"expected an object with some of {known}: {error}")
            if told.times:
                self._next, self._left = told, told.times
            else:
                self._usual, self._next, self._left = told, None, 0
        return _json({"usual": asdict(self._usual), "left": self._left, "seen": self.seen, "stopped": self.stopped})

    def _behaviour(self) -> Simulation:
        self.seen += 1
        if self._next is None:
            return self._usual
        told, self._left = self._next, self._left - 1
        if not self._left:
            self._next = None
        return told

    async def _chat(self, request: Request) -> Response:
        body = await _body(request)
        messages = body.get("messages") if body else None
        if body is None or not isinstance(messages, list) or not messages:
            return _error(400, "messages: expected a list with at least one message")
        return await self._answer(request, body, " ".join(map(_content, messages)), chat=True)

    async def _complete(self, request: Request) -> Response:
        body = await _body(request)
        if body is None or not isinstance(prompt := body.get("prompt"), str):
            return _error(400, "prompt: expected a string")
        return await self._answer(request, body, prompt, chat=False)

    async def _embed(self, request: Request) -> Response:
        body = await _body(request)
        texts = body.get("input") if body else None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return _error(400, "input: expected a string or a list of strings")
        if (failed := await self._refusal(request, self._behaviour())) is not None:
            return failed
        words = sum(len(text.split()) for text in texts)
        data = [{"object": "embedding", "index": i, "embedding": _embedding(text)} for i, text in enumerate(texts)]
        usage = {"prompt_tokens": words, "total_tokens": words}
        return _json({"object": "list", "model": MODEL, "data": data, "usage": usage})

    async def _answer(self, request: Request, body: dict[str, Any], prompt: str, *, chat: bool) -> Response:
        behaviour = self._behaviour()
        if (failed := await self._refusal(request, behaviour)) is not None:
            return failed
        asked = _content(body["messages"][-1]) if chat else prompt
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        said = _words(_reply(asked))
        cut = said[:limit] if isinstance(limit, int) and 0 < limit < len(said) else said
        options = body.get("stream_options") or {}
        answer = _Answer(
            number=next(self._numbers),
            chat=chat,
            words=cut,
            finish="length" if len(cut) < len(said) else "stop",
            usage=_usage(len(prompt.split()), len(cut)) if behaviour.fail is not FailureMode.NO_USAGE else None,
            in_stream=bool(options.get("include_usage")),
        )
        if body.get("stream"):
            return StreamingResponse(self._watched(request, answer, behaviour), media_type=EVENT_STREAM)
        await _pause(request, behaviour.first_token_seconds + behaviour.token_seconds * len(cut))
        whole = b'{"choices": [' if behaviour.fail is FailureMode.GARBAGE else orjson.dumps(answer.whole())
        return Response(whole, media_type="application/json")

    async def _refusal(self, request: Request, behaviour: Simulation) -> Response | None:
        if behaviour.fail is FailureMode.HANG:
            await _pause(request, _FOR_EVER)
        status = {FailureMode.BAD_REQUEST: 400, FailureMode.BUSY: 429, FailureMode.ERROR: 500}.get(behaviour.fail)
        return None if status is None else _error(status, f"told to answer {status}")

    async def _watched(self, request: Request, answer: _Answer, behaviour: Simulation) -> AsyncIterator[bytes]:
        finished = False
        try:
            async for event in self._stream(request, answer, behaviour):
                yield event
            finished = True
        finally:
            self.stopped += not finished

    async def _stream(self, request: Request, answer: _Answer, behaviour: Simulation) -> AsyncIterator[bytes]:
        if answer.chat:
            yield answer.event({"role": "assistant", "content": ""})
        await _pause(request, behaviour.first_token_seconds)
        for i, word in enumerate(answer.words):
            if i == behaviour.after:
                if behaviour.fail is FailureMode.DIE:
                    raise ConnectionAbortedError("told to die in mid-answer")
                if behaviour.fail is FailureMode.STALL:
                    await _pause(request, _FOR_EVER)
                if behaviour.fail is FailureMode.GARBAGE:
                    yield b'data: {"choices": [{"delta": \n\n'
            if i:
                await _pause(request, behaviour.token_seconds)
            yield answer.event({"content": word})
        yield answer.event({}, answer.finish)
        if answer.in_stream and answer.usage is not None:
            yield answer.usage_event()
        yield b"data: " + DONE + b"\n\n"


@dataclass(frozen=True, slots=True)
class _Answer:
    """One answer in OpenAI's two shapes."""

    number: int
    chat: bool
    words: list[str]
    finish: str
    usage: dict[str, Any] | None
    in_stream: bool

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"demo-{self.number}",
            "object": kind,
            "created": 0,
            "model": MODEL,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }

    def whole(self) -> dict[str, Any]:
        text = "".join(self.words)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self.finish}
        usage = {"usage": self.usage} if self.usage is not None else {}
        return self._frame("chat.completion" if self.chat else "text_completion", [choice]) | usage

    def event(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return _event(self._frame(self._kind, [choice]) | ({"usage": None} if self.in_stream else {}))

    def usage_event(self) -> bytes:
        return _event(self._frame(self._kind, []) | {"usage": self.usage})

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


async def _pause(request: Request, seconds: float) -> None:
    """Waits, but not for a client that is gone."""
    while seconds > 0:
        if await request.is_disconnected():
            raise ConnectionAbortedError("the client left")
        await asyncio.sleep(min(seconds, _SLICE_SECONDS))
        seconds -= _SLICE_SECONDS


def _reply(asked: str) -> str:
    words = asked.split()
    echo = " ".join(words[:_ECHO_WORDS]) + (" …" if len(words) > _ECHO_WORDS else "")
    return (
        f"This is {MODEL}, a stand-in and not a model: no thought went into this answer. You wrote {len(words)} words: "
        f'"{echo}". Put a real engine behind this node and the same request will reach it, sealed and paid for in the same way.'
    )


def _words(text: str) -> list[str]:
    """The words of a text, each with the space before it: what is streamed adds up to the text."""
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split())]


def _content(message: Any) -> str:
    """The text of a chat message, whose content is a string or a list of parts."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _embedding(text: str) -> list[float]:
    """A vector that means nothing, but is the same for the same text."""
    digest = hashlib.sha256(text.encode()).digest()
    return [(byte - 127.5) / 127.5 for byte in digest[:_DIMENSIONS]]


async def _body(request: Request) -> dict[str, Any] | None:
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _error(status: int, message: str) -> Response:
    return _json({"error": {"message": message, "type": "demo_error", "param": None, "code": None}}, status)


def build_app(behaviour: Simulation | None = None) -> Starlette:
    """The demo engine as an ASGI app."""
    return DemoEngine(behaviour).app


async def serve(host: str, port: int, behaviour: Simulation | None = None) -> None:
    """Serves the demo engine until SIGTERM or SIGINT; prints its address first. Raises Unavailable if it can't listen."""
    async with serving(build_app(behaviour), host, port) as bound:
        sys.stdout.write(f"http://{host}:{bound}\n")
        sys.stdout.flush()
        await wait_for_stop_signal()


def main(arguments: Iterator[str] | list[str] | None = None) -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(prog="node.engines.demo", description="An OpenAI-compatible stand-in for an engine.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--first-token-seconds", type=float, default=0.0)
    parser.add_argument("--token-seconds", type=float, default=0.0, help="from one token to the next")
    parser.add_argument("--fail", type=FailureMode, choices=list(FailureMode), default=FailureMode.NONE, metavar="HOW")
    parser.add_argument("--after", type=int, default=1, help="tokens before it fails in mid-answer")
    given = parser.parse_args(list(arguments) if arguments is not None else None)
    behaviour = replace(
        Simulation(),
        first_token_seconds=given.first_token_seconds,
        token_seconds=given.token_seconds,
        fail=given.fail,
        after=given.after,
    )
    uvloop.run(serve(given.host, given.port, behaviour))


if __name__ == "__main__":
    main()

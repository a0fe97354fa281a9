"""The demo engine: an OpenAI-compatible server without a model, for demonstrations and tests.

Its one model is called `tally-demo-stand-in`. Every answer says that it comes from a stand-in and repeats part of the prompt.
Each word between white space counts as one token; each answer's `system_fingerprint` says so. Log-probabilities are those of
`demo_model.py`, in llama.cpp's form, and texts can be scored as by vLLM: with POST /tokenize and `prompt_logprobs`.

The engine can simulate delays and failures: by its command line, and by POST /demo/behaviour for the next `times` requests (0:
for all further ones):

    {"first_token_seconds": 0.5, "token_seconds": 0.02, "fail": "die", "after": 3, "times": 1}

    fail          effect
    none          answers
    bad_request   answers 400, the client's fault
    busy          answers 429
    error         answers 500
    hang          accepts the request and never answers
    die           closes the connection after `after` tokens of the answer
    stall         stops after `after` tokens of the answer and keeps the connection open
    garbage       sends broken JSON after `after` tokens of the answer
    no_usage      leaves out the usage

Start it with `python -m node.engines.demo --port 8000`. It prints its address, and stops on SIGTERM or SIGINT.
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

from node.engines.demo_answer import MODEL, DemoAnswer
from node.engines.demo_model import DemoModel
from tallystick.protocol.sse import DONE, EVENT_STREAM
from tallystick.protocol.token_scores import MAX_TOP
from tallystick.runtime.serving import serving, wait_for_stop_signal

OWNER = "tally-demo"
CONTEXT_TOKENS = 8_192
_DIMENSIONS = 16
_ECHO_WORDS = 24
_FOREVER_SECONDS = 3_600.0
_POLL_SECONDS = 0.05


class FailureMode(str, Enum):
    """The failures that can be simulated; see the module's docstring."""

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
    """What to simulate. `after` counts tokens; `times` counts requests, 0 for all further ones."""

    first_token_seconds: float = 0.0
    token_seconds: float = 0.0
    fail: FailureMode = FailureMode.NONE
    after: int = 1
    times: int = 0

    @classmethod
    def from_json(cls, raw: Any) -> Simulation:
        """Reads the body of POST /demo/simulation. Raises ValueError or TypeError."""
        return cls(**(raw | {"fail": FailureMode(raw.get("fail", "none"))}))


class DemoEngine:
    """The server; `app` is its ASGI app. `seen` counts requests, `stopped` counts streams that were not read to their end."""

    def __init__(self, simulation: Simulation | None = None) -> None:
        self._usual = simulation or Simulation()
        self._next: Simulation | None = None
        self._remaining = 0
        self._numbers = itertools.count(1)
        self._model = DemoModel(lambda question: _reply(question).split())
        self.seen = self.stopped = 0
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/embeddings", self._embed, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/demo/behaviour", self._behave, methods=["POST", "GET"]),
            ]
        )

    async def _models(self, _request: Request) -> Response:
        entry = {"id": MODEL, "object": "model", "created": 0, "owned_by": OWNER, "max_model_len": CONTEXT_TOKENS}
        return _json({"object": "list", "data": [entry]})

    async def _behave(self, request: Request) -> Response:
        if request.method == "POST":
            try:
                simulation = Simulation.from_json(orjson.loads(await request.body()))
            except (ValueError, TypeError, AttributeError) as error:
                names = ", ".join(field.name for field in fields(Simulation))
                return _error(400, f"expected an object with members out of {names}: {error}")
            if simulation.times:
                self._next, self._remaining = simulation, simulation.times
            else:
                self._usual, self._next, self._remaining = simulation, None, 0
        return _json({"usual": asdict(self._usual), "left": self._remaining, "seen": self.seen, "stopped": self.stopped})

    def _next_simulation(self) -> Simulation:
        self.seen += 1
        if self._next is None:
            return self._usual
        simulation, self._remaining = self._next, self._remaining - 1
        if not self._remaining:
            self._next = None
        return simulation

    async def _chat(self, request: Request) -> Response:
        body = await _body(request)
        messages = body.get("messages") if body else None
        if body is None or not isinstance(messages, list) or not messages:
            return _error(400, "messages: expected a list with at least one message")
        return await self._answer(request, body, " ".join(map(_content, messages)), chat=True)

    async def _complete(self, request: Request) -> Response:
        body = await _body(request)
        prompt = body.get("prompt") if body else None
        if body is not None and isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return await self._score(request, body, prompt)
        if body is None or not isinstance(prompt, str):
            return _error(400, "prompt: expected a string, or ids of POST /tokenize")
        return await self._answer(request, body, prompt, chat=False)

    async def _tokenize(self, request: Request) -> Response:
        """As vLLM's: of `prompt`, or of `messages`."""
        body = await _body(request) or {}
        messages, prompt = body.get("messages"), body.get("prompt")
        if isinstance(messages, list) and messages:
            tokens = self._model.tokenize_messages(list(map(_content, messages)))
        elif isinstance(prompt, str):
            tokens = self._model.tokenize(prompt, is_prompt=body.get("add_special_tokens") is not False)
        else:
            return _error(404, "expected `messages` or `prompt`")
        return _json({"tokens": tokens, "count": len(tokens), "max_model_len": CONTEXT_TOKENS})

    async def _score(self, request: Request, body: dict[str, Any], tokens: list[int]) -> Response:
        """As vLLM's completion of one token after a prompt of ids, with `prompt_logprobs`."""
        if (refusal := await self._refusal(request, self._next_simulation())) is not None:
            return refusal
        asked = [value for name in ("prompt_logprobs", "logprobs") if type(value := body.get(name)) is int]
        top = max(1, min([*asked, MAX_TOP]))
        try:
            *rows, following = self._model.score(tokens, top)
        except ValueError as error:
            return _error(400, str(error))
        best = {f"token_id:{token}": value for token, value in (following or {}).items()}
        token, logprob = next(iter(best.items()), ("token_id:0", 0.0))
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._model.text_of(int(token.removeprefix("token_id:"))),
            "logprobs": {"tokens": [token], "token_logprobs": [logprob], "top_logprobs": [best], "text_offset": [0]},
            "finish_reason": "length",
        }
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [row and {str(other): {"logprob": value} for other, value in row.items()} for row in rows]
        return _json({"object": "text_completion", "model": MODEL, "choices": [choice], "usage": _usage(len(tokens), 1)})

    async def _embed(self, request: Request) -> Response:
        body = await _body(request)
        texts = body.get("input") if body else None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return _error(400, "input: expected a string or a list of strings")
        if (refusal := await self._refusal(request, self._next_simulation())) is not None:
            return refusal
        words = sum(len(text.split()) for text in texts)
        data = [{"object": "embedding", "index": i, "embedding": _embedding(text)} for i, text in enumerate(texts)]
        usage = {"prompt_tokens": words, "total_tokens": words}
        return _json({"object": "list", "model": MODEL, "data": data, "usage": usage})

    async def _answer(self, request: Request, body: dict[str, Any], prompt: str, *, chat: bool) -> Response:
        simulation = self._next_simulation()
        if (refusal := await self._refusal(request, simulation)) is not None:
            return refusal
        question = _content(body["messages"][-1]) if chat else prompt
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        reply = _words(_reply(question))
        words = reply[:limit] if isinstance(limit, int) and 0 < limit < len(reply) else reply
        options = body.get("stream_options") or {}
        answer = DemoAnswer(
            number=next(self._numbers),
            chat=chat,
            words=words,
            finish="length" if len(words) < len(reply) else "stop",
            usage=_usage(len(prompt.split()), len(words)) if simulation.fail is not FailureMode.NO_USAGE else None,
            usage_in_stream=bool(options.get("include_usage")),
            logprobs=self._logprobs(body, reply, words, chat=chat),
        )
        if body.get("stream"):
            return StreamingResponse(self._counted_stream(request, answer, simulation), media_type=EVENT_STREAM)
        await _pause(request, simulation.first_token_seconds + simulation.token_seconds * len(words))
        whole = b'{"choices": [' if simulation.fail is FailureMode.GARBAGE else orjson.dumps(answer.whole())
        return Response(whole, media_type="application/json")

    def _logprobs(self, body: dict[str, Any], reply: list[str], words: list[str], *, chat: bool) -> list[dict[str, Any]] | None:
        """A position of `logprobs.content` for each word of the answer, if the request asks for them."""
        asked = body.get("top_logprobs", 0) if chat and body.get("logprobs") is True else None if chat else body.get("logprobs")
        if type(asked) is not int:
            return None
        rows = self._model.rows([word.strip() for word in reply], max(1, min(asked, MAX_TOP)))
        return [self._model.entry(row, word) for row, word in zip(rows, words, strict=False)]

    async def _refusal(self, request: Request, simulation: Simulation) -> Response | None:
        if simulation.fail is FailureMode.HANG:
            await _pause(request, _FOREVER_SECONDS)
        status = {FailureMode.BAD_REQUEST: 400, FailureMode.BUSY: 429, FailureMode.ERROR: 500}.get(simulation.fail)
        return None if status is None else _error(status, f"simulated status {status}")

    async def _counted_stream(self, request: Request, answer: DemoAnswer, simulation: Simulation) -> AsyncIterator[bytes]:
        finished = False
        try:
            async for event in self._stream(request, answer, simulation):
                yield event
            finished = True
        finally:
            self.stopped += not finished

    async def _stream(self, request: Request, answer: DemoAnswer, simulation: Simulation) -> AsyncIterator[bytes]:
        if answer.chat:
            yield answer.event({"role": "assistant", "content": ""})
        await _pause(request, simulation.first_token_seconds)
        for i, word in enumerate(answer.words):
            if i == simulation.after:
                if simulation.fail is FailureMode.DIE:
                    raise ConnectionAbortedError("simulated connection loss")
                if simulation.fail is FailureMode.STALL:
                    await _pause(request, _FOREVER_SECONDS)
                if simulation.fail is FailureMode.GARBAGE:
                    yield b'data: {"choices": [{"delta": \n\n'
            if i:
                await _pause(request, simulation.token_seconds)
            yield answer.event({"content": word}, position=i)
        yield answer.event({}, answer.finish)
        if answer.usage_in_stream and answer.usage is not None:
            yield answer.usage_event()
        yield b"data: " + DONE + b"\n\n"


async def _pause(request: Request, seconds: float) -> None:
    """Waits `seconds`. Raises ConnectionAbortedError once the client has disconnected."""
    while seconds > 0:
        if await request.is_disconnected():
            raise ConnectionAbortedError("the client disconnected")
        await asyncio.sleep(min(seconds, _POLL_SECONDS))
        seconds -= _POLL_SECONDS


def _reply(question: str) -> str:
    words = question.split()
    echo = " ".join(words[:_ECHO_WORDS]) + (" …" if len(words) > _ECHO_WORDS else "")
    return (
        f"This is {MODEL}, a stand-in and not a model: no thought went into this answer. You wrote {len(words)} words: "
        f'"{echo}". Put a real engine behind this node and the same request will reach it, sealed and paid for in the same way.'
    )


def _words(text: str) -> list[str]:
    """The words of a text, each with the space before it, so that the streamed words add up to the text."""
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
    """A meaningless vector that is always the same for the same text."""
    digest = hashlib.sha256(text.encode()).digest()
    return [(byte - 127.5) / 127.5 for byte in digest[:_DIMENSIONS]]


async def _body(request: Request) -> dict[str, Any] | None:
    try:
        body = orjson.loads(await request.body())
    except orjson.JSONDecodeError:
        return None
    return body if isinstance(body, dict) else None


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _error(status: int, message: str) -> Response:
    return _json({"error": {"message": message, "type": "demo_error", "param": None, "code": None}}, status)


def build_app(simulation: Simulation | None = None) -> Starlette:
    """The demo engine as an ASGI app."""
    return DemoEngine(simulation).app


async def serve(host: str, port: int, simulation: Simulation | None = None) -> None:
    """Prints the address and serves until SIGTERM or SIGINT. Raises Unavailable if the port cannot be bound."""
    async with serving(build_app(simulation), host, port) as bound:
        sys.stdout.write(f"stand-in engine on http://{host}:{bound}/v1\n")
        sys.stdout.flush()
        await wait_for_stop_signal()


def main(arguments: Iterator[str] | list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="node.engines.demo", description="Serves an OpenAI-compatible demo engine without a model."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one")
    parser.add_argument("--first-token-seconds", type=float, default=0.0, help="seconds before the first token")
    parser.add_argument("--token-seconds", type=float, default=0.0, help="seconds between two tokens")
    parser.add_argument(
        "--fail",
        type=FailureMode,
        choices=list(FailureMode),
        default=FailureMode.NONE,
        metavar="MODE",
        help=f"failure to simulate: {', '.join(mode.value for mode in FailureMode)}",
    )
    parser.add_argument("--after", type=int, default=1, help="tokens of the answer before the failure")
    options = parser.parse_args(list(arguments) if arguments is not None else None)
    simulation = replace(
        Simulation(),
        first_token_seconds=options.first_token_seconds,
        token_seconds=options.token_seconds,
        fail=options.fail,
        after=options.after,
    )
    uvloop.run(serve(options.host, options.port, simulation))


if __name__ == "__main__":
    main()

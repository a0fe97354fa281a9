"""What engines really say, through the whole market: what the client gets, how the job ends, and what its receipt bills.

Node and client read the same answers apart from each other, so each row also shows that the client accepts the node's bill.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from scripts.relay import processes
from tests.e2e.extra_node import node_beside
from tests.e2e.scripted_engine import ABORT, MODEL, Part, ScriptedEngine, chunked, head, scripted_engine

CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
JSON_HEAD = head("application/json")
CONTEXT_TOKENS = 8_192
UNPAID = "nothing was billed"


def event(**members: object) -> bytes:
    """One event of a stream; a `type` also names it."""
    name = f"event: {members['type']}\n".encode() if "type" in members else b""
    return name + b"data: " + json.dumps(members).encode() + b"\n\n"


def delta(finish: str | None = None, **members: object) -> bytes:
    """One event of a chat."""
    return event(id="c", object="chat.completion.chunk", choices=[{"index": 0, "delta": members, "finish_reason": finish}])


def usage(given: object, output: object, **more: object) -> bytes:
    """The event with the usage."""
    return event(choices=[], usage={"prompt_tokens": given, "completion_tokens": output, **more})


def whole(usage: object = None, finish: str | None = "stop", **members: object) -> bytes:
    """A whole chat answer with the text "Hello there."."""
    message = {"role": "assistant", "content": "Hello there.", **members}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()


ROLE, HELLO, THERE, STOP = delta(role="assistant", content=""), delta(content="Hello"), delta(content=" there."), delta("stop")
COUNTED, DONE = usage(12, 4), b"data: [DONE]\n\n"
TEXT = (ROLE, HELLO, THERE)
STARTED = event(
    type="message_start", message={"type": "message", "content": [], "usage": {"input_tokens": 25, "output_tokens": 1}}
)
BLOCK = event(type="content_block_start", index=0, content_block={"type": "text", "text": ""})
PIECE = event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "Hello there."})
ENDING = event(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9})
STOPPED = event(type="message_stop")
MESSAGE = (
    b'{"type":"message","content":[{"type":"text","text":"Hello there."}],"stop_reason":"end_turn",'
    b'"usage":{"input_tokens":25,"output_tokens":9}}'
)
MADE = event(type="response.created", response={"id": "r", "status": "in_progress", "output": []})
SAID = event(type="response.output_text.delta", delta="Hello there.")
OUTPUT = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello there."}]}]
RESULT = {"id": "r", "status": "completed", "output": OUTPUT, "usage": {"input_tokens": 12, "output_tokens": 4}}
COMPLETED = event(type="response.completed", response=RESULT)
COUNTS = {"prompt_tokens": 12, "completion_tokens": 4}
LONG_TEXT = "Hello there, this is a whole sentence of words."
"""47 bytes: twelve tokens by the fallback rule."""
OUTPUT_BYTES = len(whole({"prompt_tokens": 10**9, "completion_tokens": 10**9}))
"""The most output tokens that an answer of so many bytes can have."""
ESTIMATED = -1
"""Stands for input tokens by the fallback rule, which depend on the bytes of the request."""


@dataclass(frozen=True)
class Case:
    """A script, what the client sends, and what is right.

    `outcome`: the receipt's; None if no receipt with output reaches the client. `billed`: input, cached and output tokens of a
    charged receipt; None if nothing is charged. `shows`: a part of the answer that the client gets.
    """

    parts: tuple[Part, ...]
    stream: bool = True
    path: str = CHAT
    members: dict[str, Any] | None = None
    status: int = 200
    outcome: str | None = "completed"
    billed: tuple[int, int, int] | None = (12, 0, 4)
    shows: str = ""


def failed(*parts: Part, path: str = CHAT, shows: str = UNPAID) -> Case:
    """Output arrived, and then the engine failed: an error at the end of the stream, and no charge."""
    return Case(parts, path=path, outcome="provider_error", billed=None, shows=shows)


def unanswered(*parts: Part, status: int = 502, stream: bool = True, path: str = CHAT, shows: str = '"fault":"engine"') -> Case:
    """Nothing arrived: another provider would be tried, and nobody pays."""
    return Case(parts, path=path, stream=stream, status=status, outcome=None, billed=None, shows=shows)


def own_error(*parts: Part, status: int = 400, stream: bool = True, path: str = CHAT, shows: str) -> Case:
    """The engine's own error reaches the client, uncharged."""
    return Case(parts, path=path, stream=stream, status=status, outcome="upstream_error", billed=None, shows=shows)


def answered(
    *parts: Part,
    billed: tuple[int, int, int] = (12, 0, 4),
    path: str = CHAT,
    members: dict[str, Any] | None = None,
    outcome: str = "completed",
    shows: str = "there",
) -> Case:
    """A whole answer, as a document."""
    return Case(parts, stream=False, path=path, members=members, outcome=outcome, billed=billed, shows=shows)


END_OF_STREAM = {
    "[DONE] with one newline": Case((head(), *TEXT, STOP, COUNTED, DONE[:-1])),
    "[DONE] without a newline": Case((head(), *TEXT, STOP, COUNTED, DONE[:-2])),
    "[DONE] without a space": Case((head(), *TEXT, STOP, COUNTED, b"data:[DONE]\n\n")),
    "carriage returns": Case((head(), *(part.replace(b"\n", b"\r\n") for part in (*TEXT, STOP, COUNTED, DONE[:-1])))),
    "finish without its blank line, and no [DONE]": Case((head(), *TEXT, STOP[:-2]), billed=(ESTIMATED, 0, 3)),
    "usage without its newline, and no [DONE]": Case((head(), *TEXT, STOP, COUNTED[:-2])),
    "a completion without [DONE]": Case(
        (head(), event(choices=[{"text": "Hello there.", "index": 0, "finish_reason": "length"}]), COUNTED[:-1]),
        path=COMPLETIONS, members={"prompt": "Hi"}, outcome="length",
    ),
    "a response without its last blank line": Case((head(), MADE, SAID, COMPLETED[:-2]), path=RESPONSES),
    "a message without its last blank line": Case((head(), STARTED, BLOCK, PIECE, ENDING, STOPPED[:-2]), path=MESSAGES,
                                                 billed=(25, 0, 9)),
    "the connection resets after [DONE]": Case((*chunked(*TEXT, STOP, COUNTED, DONE)[:-1], 2.0, ABORT)),
    "text that ends without a finish reason": failed(head(), *TEXT),
    "half an event": failed(head(), *TEXT, STOP[:40]),
    "the connection resets after text": failed(*chunked(*TEXT)),
}  # fmt: skip
FAILURES = {
    "an error object in mid-stream": failed(head(), *TEXT, event(object="error", message="EngineCore died", code=500), DONE),
    "an error member in mid-stream": failed(head(), *TEXT, event(error={"message": "died"}), DONE),
    "an event that is named error in mid-stream": failed(head(), *TEXT, b'event: error\ndata: {"message":"died"}\n\n', DONE),
    "an error inside a choice": failed(
        head(), *TEXT, event(choices=[{"index": 0, "delta": {}, "finish_reason": None, "error": {"code": 502}}]), DONE
    ),
    **{f"the finish reason {reason!r}": failed(head(), *TEXT, delta(reason), COUNTED, DONE)
       for reason in ("abort", "error", "null", "", "cancelled", "Aborted")},
    "an empty finish reason, then a reset": unanswered(*chunked(delta("", role="assistant", content=""))),
    "a role, then the end": unanswered(head(), ROLE),
    "a whole answer that was aborted": unanswered(JSON_HEAD, whole({"prompt_tokens": 9}, finish="abort"), stream=False),
    "a whole answer with an empty finish reason": unanswered(JSON_HEAD, whole({"prompt_tokens": 9}, finish=""), stream=False),
    "an error as a whole answer": unanswered(JSON_HEAD, b'{"object":"error","message":"died","code":500}', stream=False),
    "a bad request as the first event": own_error(
        head(), event(error={"message": "context length exceeded", "code": 400}), DONE, shows="context length exceeded"
    ),
    "a bad request in error_type as the first event": own_error(
        head(), event(error_type="context_length_exceeded", error_message="9000 tokens"), DONE, shows="9000 tokens"
    ),
    "a bad request as the whole answer of 200": own_error(
        JSON_HEAD, b'{"error":{"message":"tools must be an array","code":400}}', stream=False, shows="tools must be an array"
    ),
    "a failure as the first event": unanswered(head(), event(error={"message": "internal error", "code": 500}), DONE),
    "a busy engine as the first event": unanswered(
        head(), event(error={"message": "overloaded", "code": 503}), DONE, status=503, shows='"retry":true'
    ),
    "a message without its last events": failed(
        head(), STARTED, BLOCK, PIECE, path=MESSAGES, shows='event: error\ndata: {"type":"error","error":{'
    ),
    "a message without message_stop": failed(head(), STARTED, BLOCK, PIECE, ENDING, path=MESSAGES),
    "a message that ends with [DONE]": failed(head(), STARTED, BLOCK, PIECE, DONE, path=MESSAGES),
    "an error in a message": failed(
        head(), STARTED, PIECE, event(type="error", error={"type": "api_error", "message": "died"}), path=MESSAGES
    ),
    "a response without its last event": failed(head(), MADE, SAID, path=RESPONSES, shows="event: error\ndata: "),
    "a response that failed": failed(
        head(), MADE, SAID, event(type="response.failed", response={"status": "failed"}), path=RESPONSES
    ),
}  # fmt: skip
FORMS = {
    "halves of an emoji": Case((head(), *TEXT, delta(content="\ud83d"), delta(content="\ude00"), STOP, COUNTED, DONE),
                               shows="\\ud83d"),
    "half an emoji in a document": answered(
        JSON_HEAD, whole(COUNTS, content="there \ud83d"), shows="there \\ud83d"
    ),
    "NaN and Infinity": answered(
        JSON_HEAD, whole(COUNTS, score=1).replace(b'"score": 1', b'"score": [NaN, -Infinity]'),
        shows="[NaN, -Infinity]",
    ),
    "invalid UTF-8": Case((head(), ROLE, HELLO.replace(b"Hello", b"Hello there\xf0\x9f"), STOP, COUNTED, DONE)),
    "a control character": Case((head(), ROLE, HELLO.replace(b"Hello", b"Hello\tthere"), STOP, COUNTED, DONE)),
    "no content type": Case((head(None), *TEXT, STOP, COUNTED, DONE)),
    "a stream called octets": Case((head("application/octet-stream"), *TEXT, STOP, COUNTED, DONE)),
    "a stream called JSON": Case((JSON_HEAD, b": processing\n\n", *TEXT, STOP, COUNTED, DONE)),
    "a document instead of a stream": Case((JSON_HEAD, whole(COUNTS)), shows="data: [DONE]"),
    "a stream instead of a document": answered(head(), *TEXT, STOP, COUNTED, DONE, shows='"content":"Hello there."'),
    "an error document instead of a stream": own_error(
        JSON_HEAD, b'{"error":{"message":"context length exceeded","code":400}}', shows="context length exceeded"
    ),
    "a message instead of its stream": Case((JSON_HEAD, MESSAGE), path=MESSAGES, billed=(25, 0, 9), shows="event: message_stop"),
    "a response instead of its stream": Case((JSON_HEAD, json.dumps(RESULT).encode()), path=RESPONSES,
                                             shows="event: response.completed"),
    "a document without a content type": answered(head(None), whole(COUNTS)),
}  # fmt: skip
USAGES = {
    "DeepSeek's cache": answered(
        JSON_HEAD, whole({"prompt_tokens": 500, "completion_tokens": 4, "prompt_cache_hit_tokens": 400}), billed=(500, 400, 4)
    ),
    "OpenAI's cache": answered(
        JSON_HEAD, whole({"prompt_tokens": 500, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 400}}),
        billed=(500, 400, 4),
    ),
    "usage in the choice": Case(
        (head(), *TEXT, event(choices=[{"delta": {}, "finish_reason": "stop", "usage": COUNTS}]),
         DONE)
    ),
    "Groq's usage": Case((head(), *TEXT, STOP, event(choices=[], x_groq={"usage": COUNTS}), DONE)),
    "usage in each event": Case(
        (head(), ROLE, *(event(choices=[{"delta": {"content": "there"}}], usage={"prompt_tokens": 12, "completion_tokens": n})
                         for n in range(1, 5)), STOP, DONE)
    ),
    "no count of the output": Case((head(), ROLE, delta(content=LONG_TEXT), STOP, usage(12, None, total_tokens=None), DONE),
                                   billed=(12, 0, 12)),
    "no count of the output in a document": answered(
        JSON_HEAD, whole(COUNTS | {"completion_tokens": None, "total_tokens": 12}, content=LONG_TEXT), billed=(12, 0, 12)
    ),
    "zeros": Case((head(), ROLE, delta(content=LONG_TEXT), STOP, usage(0, 0, total_tokens=0), DONE), billed=(ESTIMATED, 0, 12)),
    "no usage": Case((head(), ROLE, delta(content=LONG_TEXT), STOP, DONE), billed=(ESTIMATED, 0, 12)),
    "reasoning outside the output": answered(
        JSON_HEAD, whole({"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 86}, reasoning_content="think " * 60),
        billed=(21, 0, 65),
    ),
    "a message": Case((head(), STARTED, BLOCK, PIECE, ENDING, STOPPED), path=MESSAGES, billed=(25, 0, 9)),
    "a message whose input was cached": Case(
        (head(), event(type="message_start", message={"usage": {"input_tokens": 25, "cache_read_input_tokens": 300}}), BLOCK,
         PIECE, ENDING, STOPPED), path=MESSAGES, billed=(325, 300, 9),
    ),
    "a whole message": answered(JSON_HEAD, MESSAGE, path=MESSAGES, billed=(25, 0, 9)),
    "camel case": answered(JSON_HEAD, whole({"inputTokens": 12, "outputTokens": 4, "totalTokens": 16})),
    "counts as texts": answered(JSON_HEAD, whole({"prompt_tokens": "12", "completion_tokens": "4"})),
    "an impossible count": answered(JSON_HEAD, whole({"prompt_tokens": -1, "completion_tokens": 4}), billed=(ESTIMATED, 0, 3)),
    "more than can be true": answered(
        JSON_HEAD, whole({"prompt_tokens": 10**9, "completion_tokens": 10**9}), billed=(ESTIMATED, 0, OUTPUT_BYTES)
    ),
    "an image in a message": Case(
        (JSON_HEAD, MESSAGE), stream=False, path=MESSAGES, billed=(25, 0, 9), shows="there",
        members={"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://x.y/z"}}]}]},
    ),
    "an image by its URL": answered(
        JSON_HEAD, whole({"prompt_tokens": 1_400, "completion_tokens": 4}), billed=(1_400, 0, 4),
        members={"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {
            "type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]}]},
    ),
    "an image of 200 KB": answered(
        JSON_HEAD, whole({"prompt_tokens": 1_400, "completion_tokens": 4}), billed=(1_400, 0, 4),
        members={"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
            "url": "data:image/jpeg;base64," + "A" * 270_000}}]}]},
    ),
}  # fmt: skip
REQUESTS = {
    "an echo of the prompt": answered(
        JSON_HEAD, b'{"choices":[{"index":0,"text":"Once upon a time","finish_reason":"length","logprobs":{"tokens":["Once"]}}],'
        b'"usage":{"prompt_tokens":4,"completion_tokens":0,"total_tokens":4}}',
        path=COMPLETIONS, members={"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1},
        billed=(4, 0, 0), outcome="length", shows="Once upon a time",
    ),
    "a seed of 25 digits": answered(
        JSON_HEAD, whole(COUNTS), members={"seed": 10**24 + 7}
    ),
    "half an emoji in the prompt": answered(
        JSON_HEAD, whole(COUNTS), members={"messages": [{"role": "user", "content": "\ud83d"}]}
    ),
    "a completion without a limit": answered(
        JSON_HEAD, b'{"choices":[{"text":"there","finish_reason":"length"}],"usage":{"prompt_tokens":12,"completion_tokens":4}}',
        path=COMPLETIONS, members={"prompt": "Once"}, outcome="length",
    ),
    "a long stream without a limit": Case(
        (head(), ROLE, delta(content="word ") * 5_000, STOP, DONE), billed=(ESTIMATED, 0, 4_096), outcome="length",
        members={"messages": [{"role": "user", "content": "word " * 6_000}]}, shows='"finish_reason":"length"',
    ),
    "a long prompt without a limit": answered(
        JSON_HEAD, whole({"prompt_tokens": 7_031, "completion_tokens": 4}), billed=(7_031, 0, 4),
        members={"messages": [{"role": "user", "content": "word " * 6_000}]},
    ),
    "a prompt longer than any context": Case(
        (JSON_HEAD, whole()), stream=False, status=400, outcome=None, billed=None, shows="context",
        members={"messages": [{"role": "user", "content": "word " * 60_000}]},
    ),
    "signs of life before the first token": Case(
        (head(), *[part for _ in range(16) for part in (b": keep-alive\n\n", 0.5)], *TEXT, STOP, COUNTED, DONE)
    ),
    "a place in the queue before the first token": Case(
        (head(), *[part for n in range(16) for part in (event(status="queued", position=n), 0.5)], *TEXT, STOP, COUNTED, DONE)
    ),
    "a busy engine that says when": unanswered(
        head("application/json", "retry-after: 30", status=429), b'{"error":{"message":"Rate limit reached"}}',
        status=503, shows='"retry_after":30',
    ),
}  # fmt: skip
CASES = END_OF_STREAM | FAILURES | FORMS | USAGES | REQUESTS
_TOML = f"""
[[engines]]
url = "URL"
slots = 64
input_price = "1"
output_price = "1"
[[engines.models]]
name = "{MODEL}"
input_price = "1"
output_price = "1"
context_tokens = {CONTEXT_TOKENS}
[engines.spec]
features = ["{MESSAGES}", "{RESPONSES}", "vision"]
[deadlines]
first_token = 5.0
between_tokens = 60.0
"""


def _request(name: str, case: Case) -> dict[str, Any]:
    hi = [{"role": "user", "content": "Say hello, please."}]
    by_path: dict[str, dict[str, Any]] = {CHAT: {"messages": hi, "user": name}, COMPLETIONS: {"user": name}}
    by_path[RESPONSES] = {"input": "Hi", "user": name}
    by_path[MESSAGES] = {"messages": hi, "max_tokens": 100, "metadata": {"user_id": name}}
    streamed = {"stream": True} if case.stream else {}
    return {"model": MODEL} | by_path[case.path] | streamed | (case.members or {})


async def _record(http: httpx.AsyncClient, job: str) -> dict[str, Any]:
    """The job as the client's ledger has it, once it has ended."""
    async with asyncio.timeout(60):
        while True:
            record: dict[str, Any] = (await http.get(f"/tally/jobs/{job}")).json()
            if record.get("state") not in ("open", "running"):
                return record
            await asyncio.sleep(0.05)


@asynccontextmanager
async def _market(folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedEngine]]:
    async with (
        processes.upstream() as mock,
        processes.market(folder, mock) as site,
        scripted_engine({name: case.parts for name, case in CASES.items()}) as engine,
        node_beside(folder, site, _TOML.replace("URL", engine.url), model=MODEL),
        httpx.AsyncClient(base_url=site.gateway, trust_env=False, timeout=120) as http,
    ):
        yield http, engine


async def _differences(http: httpx.AsyncClient, name: str, case: Case, at_once: asyncio.Semaphore) -> list[str]:
    """What is wrong with a case's answer and bill."""
    request = _request(name, case)
    sent = json.dumps(request).encode()
    async with at_once:
        answer = await http.post(case.path, content=sent, headers={"content-type": "application/json"})
        job = answer.headers.get("x-tally-job")
        record: dict[str, Any] = {"outcome": None, "cost": "0", "usage": None} if job is None else await _record(http, job)
    billed, usage = None, record["usage"]
    if usage is not None and int(record["cost"]):
        given = ESTIMATED if case.billed and case.billed[0] == ESTIMATED else usage["inputTokens"]
        billed = (given, usage["cachedInputTokens"], usage["outputTokens"])
        assert 0 < usage["inputTokens"] <= max(len(sent), CONTEXT_TOKENS)
    text = answer.content.decode(errors="replace")
    if case.outcome == "provider_error" and answer.status_code == 502:
        case = unanswered()  # the node read the text and the fault at once, so that the text was not delivered
    compared = {
        "status": (answer.status_code, case.status),
        "outcome": (record["outcome"], case.outcome),
        "billed": (billed, case.billed),
        "text": (case.shows if case.shows in text else text[-400:], case.shows),
    }
    return [f"{name}: {what}: expected {right!r}, got {got!r}" for what, (got, right) in compared.items() if got != right]


async def test_what_engines_really_say(tmp_path: Path) -> None:
    """Every row at once on one node; a row that is wrong does not hide the others."""
    async with _market(tmp_path / "market") as (http, engine):
        at_once = asyncio.Semaphore(4)
        results = await asyncio.gather(*(_differences(http, name, case, at_once) for name, case in CASES.items()))
        differences = [line for result in results for line in result]
        assert not differences, "\n".join(differences)
        assert engine.body("an echo of the prompt")["max_tokens"] == 0
        assert engine.body("a seed of 25 digits")["seed"] == 10**24 + 7
        assert "max_tokens" not in engine.body("a completion without a limit")
        assert "max_tokens" not in engine.body("a long prompt without a limit")
        assert b'"\\ud83d"' in engine.asked["half an emoji in the prompt"][1]
        assert "a prompt longer than any context" not in engine.asked, "nobody pays for it"

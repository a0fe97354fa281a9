"""What engines really answer: how their odd forms are delivered, billed, or refused as the failures that they are."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest

from node.domain.requests import EngineRequest
from node.engines.openai_http import read_wait
from node.ports import ResponseEnd, ResponsePart, ResponseStart
from tallystick.protocol.errors import Code
from tallystick.protocol.routes import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from tallystick.protocol.usage_reports import ReportedUsage
from tests.node.engines.raw import answers_with, head
from tests.node.engines.test_openai_http import DONE, ROLE, STOP, STREAM, USAGE, WHOLE, WORD, ask, body, fault

KEPT_USAGE = EngineRequest(CHAT, b"{}", stream=True, strip_usage=False, rename=None)
RENAMED = EngineRequest(CHAT, b"{}", stream=True, strip_usage=True, rename=("org/model", "model"))
MESSAGE_STREAM = EngineRequest(MESSAGES, b"{}", stream=True, strip_usage=False, rename=None)
MESSAGE = EngineRequest(MESSAGES, b"{}", stream=False, strip_usage=False, rename=None)
RESPONSE_STREAM = EngineRequest(RESPONSES, b"{}", stream=True, strip_usage=False, rename=None)
RESPONSE = EngineRequest(RESPONSES, b"{}", stream=False, strip_usage=False, rename=None)
BARE_HEAD = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
JSON_HEAD = head(200, "application/json")


def event(**members: object) -> bytes:
    """One event of a stream; a `type` also names it."""
    name = f"event: {members['type']}\n".encode() if "type" in members else b""
    return name + b"data: " + orjson.dumps(members) + b"\n\n"


def finish(reason: str) -> bytes:
    """The event with a finish reason."""
    return event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])


def whole(usage: object = None, **members: object) -> bytes:
    """A whole chat answer with the text "four"."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "four"}, "finish_reason": "stop"}
    return orjson.dumps({"choices": [choice | members], "usage": usage})


STARTED = event(type="message_start", message={"content": [], "usage": {"input_tokens": 25, "output_tokens": 1}})
BLOCK = event(type="content_block_start", index=0, content_block={"type": "text", "text": ""})
TEXT = event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "four"})
ENDING = event(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 9})
STOPPED = event(type="message_stop")
MADE = event(type="response.created", response={"status": "in_progress"})
SAID = event(type="response.output_text.delta", delta="four")
RESULT = {
    "status": "completed",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "four"}]}],
    "usage": {"input_tokens": 12, "output_tokens": 4},
}
COMPLETED = event(type="response.completed", response=RESULT)

COUNTED = {"prompt_tokens": 5, "completion_tokens": 2}
COMPLETE = {
    "[DONE] with one newline": (STREAM, (head(), WORD, STOP, USAGE, DONE[:-1]), (5, 2)),
    "[DONE] without a newline": (STREAM, (head(), WORD, STOP, USAGE, DONE[:-2]), (5, 2)),
    "[DONE] with a carriage return": (STREAM, (head(), WORD, STOP, USAGE, DONE[:-2] + b"\r"), (5, 2)),
    "usage without its blank line": (KEPT_USAGE, (head(), WORD, STOP, USAGE[:-2]), (5, 2)),
    "finish without its blank line": (STREAM, (head(), WORD, STOP[:-2]), None),
    "a comment after the end": (STREAM, (head(), WORD, STOP, USAGE, b": bye"), (5, 2)),
    "a byte order mark": (STREAM, (head(), b"\xef\xbb\xbf" + WORD, STOP, USAGE, DONE), (5, 2)),
    "a response's last event without its blank line": (RESPONSE_STREAM, (head(), MADE, SAID, COMPLETED[:-2]), (12, 4)),
    "a message without its last blank line": (MESSAGE_STREAM, (head(), STARTED, BLOCK, TEXT, ENDING, STOPPED[:-2]), (25, 9)),
    "a message": (MESSAGE_STREAM, (head(), STARTED, BLOCK, TEXT, ENDING, STOPPED), (25, 9)),
    "no content type": (STREAM, (BARE_HEAD, WORD, STOP, USAGE, DONE), (5, 2)),
    "plain text": (STREAM, (head(200, "text/plain"), b": hi\n\n", WORD, STOP, USAGE, DONE), (5, 2)),
    "a stream that is called JSON": (STREAM, (JSON_HEAD, WORD, STOP, USAGE, DONE), (5, 2)),
    "empty finish reasons before the last": (STREAM, (head(), finish(""), WORD, finish("null"), STOP, USAGE, DONE), (5, 2)),
    "a later event with an empty reason": (STREAM, (head(), WORD, STOP, finish(""), USAGE, DONE), (5, 2)),
    "the status 201": (STREAM, (head(201), WORD, STOP, USAGE, DONE), (5, 2)),
    "a document with the status 201": (WHOLE, (head(201, "application/json"), whole(COUNTED)), (5, 2)),
    "empty data": (STREAM, (head(), b"data:\n\n", WORD, STOP, USAGE, DONE), (5, 2)),
    "a queue position": (STREAM, (head(), event(status="queued", message="position 3"), WORD, STOP, USAGE, DONE), (5, 2)),
    "JSON without a content type": (WHOLE, (BARE_HEAD, whole(COUNTED)), (5, 2)),
    "JSON as plain text": (WHOLE, (head(200, "text/plain"), b" \n" + whole(COUNTED)), (5, 2)),
    "JSON that is called a stream": (WHOLE, (head(), whole(COUNTED)), (5, 2)),
    "white space that keeps the connection open": (
        WHOLE, (JSON_HEAD, b"\n", b"\n" * 50, whole(COUNTED)), (5, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
async def test_an_odd_form_is_a_whole_answer(name: str) -> None:
    """The text is delivered in the form that was asked for, and the engine's own count is billed."""
    request, parts, counts = COMPLETE[name]
    events = await ask(answers_with(*parts), request)
    assert events[0] == ResponseStart(200, "text/event-stream" if request.stream else "application/json")
    assert b"four" in body(events) or b"word" in body(events)
    assert isinstance(events[-1], ResponseEnd)
    assert events[-1].usage == (None if counts is None else ReportedUsage(counts[0], 0, counts[1]))
    assert not request.stream or body(events).endswith(b"\n\n"), "a reader gets every event whole"


async def test_a_document_instead_of_a_stream() -> None:
    """A client that asked for a stream gets a stream, and the whole answer in it."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = whole(
        {"prompt_tokens": 5, "completion_tokens": 2}, message={"role": "assistant", "content": "four", "tool_calls": [call]}
    )
    for start in (JSON_HEAD, head(), BARE_HEAD):
        events = await ask(answers_with(start, answer), KEPT_USAGE)
        assert events[0] == ResponseStart(200, "text/event-stream")
        first, counted, done = body(events).split(b"\n\n")[:3]
        delta = orjson.loads(first[6:])["choices"][0]
        assert (delta["delta"]["content"], delta["finish_reason"]) == ("four", "stop")
        assert delta["delta"]["tool_calls"] == [{"index": 0} | call]
        assert orjson.loads(counted[6:])["usage"] == {"prompt_tokens": 5, "completion_tokens": 2}
        assert done == b"data: [DONE]"
        assert events[-1] == ResponseEnd(body(events), 4 + 3, ReportedUsage(5, 0, 2))
    assert b"usage" not in body(await ask(answers_with(JSON_HEAD, answer), STREAM)).split(b"\n\n", 1)[1]


async def test_a_document_instead_of_a_stream_of_other_dialects() -> None:
    """Responses and messages come as the events of their own dialect."""
    said = body(await ask(answers_with(JSON_HEAD, orjson.dumps(RESULT)), RESPONSE_STREAM))
    assert b"event: response.output_text.delta\n" in said
    assert b"event: response.completed\n" in said
    block = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    content = [{"type": "text", "text": "four"}, block]
    message: dict[str, Any] = {"type": "message", "content": content, "stop_reason": "tool_use", "stop_sequence": None}
    message["usage"] = {"input_tokens": 25, "output_tokens": 9}
    events = await ask(answers_with(JSON_HEAD, orjson.dumps(message)), MESSAGE_STREAM)
    names = [line[7:].decode() for line in body(events).split(b"\n") if line.startswith(b"event: ")]
    block_events = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert names == ["message_start", *block_events * 2, "message_delta", "message_stop"]
    back = await ask(answers_with(head(), body(events)), MESSAGE)
    assert orjson.loads(body(back)) == message
    assert isinstance(back[-1], ResponseEnd)
    assert back[-1].usage == ReportedUsage(25, 0, 9)


async def test_a_stream_instead_of_a_document() -> None:
    """A client that asked for one document gets it, put together from the events."""
    calls = [
        event(
            choices=[
                {"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a'}}]}}
            ]
        ),
        event(choices=[{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "", "function": {"arguments": '":1}'}}]}}]),
    ]
    events = await ask(answers_with(head(), ROLE, WORD, WORD, *calls, STOP, USAGE, DONE), WHOLE)
    assert events[0] == ResponseStart(200, "application/json")
    document = orjson.loads(body(events))
    message = document["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", "wordword")
    assert message["tool_calls"] == [{"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":1}'}}]
    assert (document["choices"][0]["finish_reason"], document["usage"]) == ("stop", {"prompt_tokens": 5, "completion_tokens": 2})
    assert isinstance(events[-1], ResponseEnd)
    assert events[-1].usage == ReportedUsage(5, 0, 2)
    text = event(choices=[{"text": "four"}]) + event(choices=[{"text": "!", "finish_reason": "length"}])
    request = EngineRequest(COMPLETIONS, b"{}", stream=False, strip_usage=False, rename=None)
    events = await ask(answers_with(head(), text, DONE), request)
    assert orjson.loads(body(events))["choices"][0]["text"] == "four!"
    assert events[-1] == ResponseEnd(body(events), 5, truncated=True)
    response = body(await ask(answers_with(head(), MADE, SAID, COMPLETED), RESPONSE))
    assert orjson.loads(response) == RESULT


CUT_OFF = {
    "a failure in mid-stream": (STREAM, (head(), WORD, event(object="error", message="died", code=500), DONE)),
    "fields of an error in mid-stream": (STREAM, (head(), WORD, event(error_type="x", error_message="died"), DONE)),
    "a detail in mid-stream": (STREAM, (head(), WORD, event(detail="died"), DONE)),
    "a message and a code in mid-stream": (STREAM, (head(), WORD, event(message="died", code=500), DONE)),
    "an error of the request in mid-stream": (STREAM, (head(), WORD, event(error={"message": "context length", "code": 400}))),
    "an error as the rest": (STREAM, (head(), WORD, event(error={"message": "died"})[:-2])),
    "no [DONE] after an empty reason": (STREAM, (head(), WORD, finish(""))),
    "an empty reason": (STREAM, (head(), WORD, finish(""), DONE)),
    "a reason null": (STREAM, (head(), WORD, finish("null"), USAGE, DONE)),
    "an empty reason alone": (STREAM, (head(), ROLE, finish(""))),
    "a whole answer with an empty reason": (WHOLE, (JSON_HEAD, whole(finish_reason=""))),
    "a whole answer that was aborted": (WHOLE, (JSON_HEAD, whole(finish_reason="abort"))),
    "an error object": (WHOLE, (JSON_HEAD, orjson.dumps({"object": "error", "message": "died", "code": 500}))),
    "a message without its last event": (MESSAGE_STREAM, (head(), STARTED, BLOCK, TEXT)),
    "a message without message_stop": (MESSAGE_STREAM, (head(), STARTED, BLOCK, TEXT, ENDING)),
    "a message that ends with [DONE]": (MESSAGE_STREAM, (head(), STARTED, BLOCK, TEXT, DONE)),
    "a message with an error": (MESSAGE_STREAM, (head(), STARTED, TEXT, event(type="error", error={"type": "x"}), STOPPED)),
    "a response that ends with [DONE]": (RESPONSE_STREAM, (head(), MADE, SAID, DONE)),
    "a response that was cancelled": (RESPONSE_STREAM, (head(), SAID, event(type="response.cancelled", response={}))),
    "an event that is named error in mid-stream": (STREAM, (head(), WORD, b'event: error\ndata: {"message":"died"}\n\n', DONE)),
    "an error in a choice": (STREAM, (head(), WORD, event(choices=[{"delta": {}, "error": {"code": 502}}]), DONE)),
    "a whole answer with an error in its choice": (WHOLE, (JSON_HEAD, whole(error={"code": 502, "message": "died"}))),
    "plain words": (STREAM, (head(200, "text/plain"), b"internal server error")),
    "nothing after the head": (STREAM, (head(),)),
    "a field name alone": (STREAM, (head(), WORD, STOP, b"dat")),
    "endless white space": (WHOLE, (JSON_HEAD, *[b" " * 20_000] * 5)),
    **{f"the reason {reason}": (STREAM, (head(), WORD, finish(reason), USAGE, DONE))
       for reason in ("error", "abort", "ABORTED", "cancelled", "network_error", "insufficient_system_resource", "timed_out",
                      "engine_overloaded", "FINISH_REASON_ERROR", "interrupted", "MALFORMED_FUNCTION_CALL", "load")},
}  # fmt: skip


@pytest.mark.parametrize("name", CUT_OFF)
async def test_a_failure_that_looks_like_success_is_a_failure(name: str) -> None:
    """It is never a whole answer, so that it is never charged."""
    request, parts = CUT_OFF[name]
    assert (await fault(answers_with(*parts), request)).code is Code.ENGINE_UNAVAILABLE


@pytest.mark.parametrize(
    "reason", ["stop", "eos_token", "tool_calls", "content_filter", "function_call", "stop_sequence", "refusal", "SAFETY", "STOP"]
)
async def test_an_answer_that_ended_is_whole(reason: str) -> None:
    """Whatever the engine calls the end."""
    events = await ask(answers_with(head(), WORD, finish(reason), USAGE, DONE), STREAM)
    assert isinstance(events[-1], ResponseEnd)
    assert events[-1].usage == ReportedUsage(5, 0, 2)


OWN_ERRORS: list[tuple[dict[str, Any], int]] = [
    ({"error": {"message": "too long", "code": 400}}, 400),
    ({"error": {"message": "x", "type": "invalid_request_error", "code": "context_length_exceeded"}}, 400),
    ({"error_type": "context_length_exceeded", "error_message": "the prompt is too long"}, 400),
    ({"detail": "messages: field is required"}, 400),
    ({"message": "image input is not supported", "code": 422}, 422),
    ({"object": "error", "message": "maximum context length is 4096 tokens", "type": "BadRequestError", "code": 400}, 400),
    ({"type": "error", "error": {"type": "invalid_request_error", "message": "x"}}, 400),
]


@pytest.mark.parametrize(("document", "status"), OWN_ERRORS)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_of_the_request_with_status_200_is_passed_on(
    document: dict[str, Any], status: int, *, streamed: bool
) -> None:
    """Before any output, the client gets the engine's own error with the status that it stands for, where OpenAI's SDKs look."""
    parts = (head(), ROLE, event(**document), DONE) if streamed else (JSON_HEAD, orjson.dumps(document))
    events = await ask(answers_with(*parts), STREAM if streamed else WHOLE)
    last_start = [event for event in events if isinstance(event, ResponseStart)][-1]
    assert last_start == ResponseStart(status, "application/json")
    assert isinstance(events[-1], ResponseEnd)
    passed_on = orjson.loads(events[-1].tail)
    assert document.items() <= passed_on.items()
    assert passed_on["error"]["message"] in orjson.dumps(document).decode()


@pytest.mark.parametrize(
    "document",
    [{"error": {"message": "Rate limit reached"}}, {"error": {"code": 503, "message": "x"}}, {"detail": "too many requests"}],
)
async def test_a_busy_engine_with_status_200_is_busy(document: dict[str, Any]) -> None:
    """Another provider may answer."""
    assert (await fault(answers_with(head(), event(**document)), STREAM)).code is Code.NODE_BUSY


async def test_a_stream_without_a_limit_ends_where_its_order_does() -> None:
    """The node delivers what is paid, and closes the stream as the engine does at a limit: with its finish reason."""
    word = event(choices=[{"index": 1, "delta": {"content": "word"}, "finish_reason": None}], id="c")
    for request, parts in ((STREAM, (word,) * 4), (RENAMED, (word * 4,))):
        events = await ask(answers_with(head(), ROLE, *parts, STOP, DONE), replace(request, cut_after=3))
        text = body(events)
        assert text.count(b'"word"') == 3
        last, done = text.split(b"\n\n")[-3:-1]
        choice = {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}
        assert orjson.loads(last[6:])["choices"] == [choice]
        assert orjson.loads(last[6:])["id"] == "c"
        assert done == b"data: [DONE]"
        assert isinstance(events[-1], ResponseEnd)
        assert (events[-1].truncated, events[-1].usage) == (True, ReportedUsage(None, 0, 3))
    whole_stream = await ask(answers_with(head(), ROLE, WORD * 3, STOP, USAGE, DONE), replace(STREAM, cut_after=3))
    assert isinstance(whole_stream[-1], ResponseEnd)
    assert (whole_stream[-1].truncated, whole_stream[-1].usage) == (False, ReportedUsage(5, 0, 2))
    text = event(choices=[{"text": "word"}])
    request = EngineRequest(COMPLETIONS, b"{}", stream=True, strip_usage=False, rename=None, cut_after=1)
    cut = body(await ask(answers_with(head(), text, text, DONE), request))
    assert orjson.loads(cut.split(b"\n\n")[1][6:])["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    ]


async def test_a_response_without_a_limit_ends_where_its_order_does() -> None:
    """Its last event is the one of an incomplete response, with the text that was delivered."""
    request = replace(RESPONSE_STREAM, cut_after=2, rename=("org/model", "model"))
    made = event(type="response.created", response={"id": "r", "status": "in_progress", "model": "org/model"})
    events = await ask(answers_with(head(), made, SAID * 5, COMPLETED), request)
    text = body(events)
    assert text.count(b'"delta":"four"') == 2
    name, data = text.split(b"\n\n")[-2].split(b"\n")
    assert name == b"event: response.incomplete"
    response = orjson.loads(data[6:])["response"]
    assert (response["id"], response["status"], response["model"]) == ("r", "incomplete", "model")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["content"] == [{"type": "output_text", "text": "fourfour"}]
    assert events[-1] == ResponseEnd(b"", usage=ReportedUsage(None, 0, 2), truncated=True)


SERVER_ERRORS = [
    (500, {"error": {"code": 500, "message": "image input is not supported", "type": "server_error"}}),
    (500, {"error": {"code": 500, "message": "tools param must be an array", "type": "server_error"}}),
    (501, {"error": {"code": 501, "message": "Start it with `--embeddings`", "type": "not_supported_error"}}),
]


@pytest.mark.parametrize(("status", "document"), SERVER_ERRORS)
async def test_the_engines_own_words_reach_the_client(status: int, document: dict[str, Any]) -> None:
    """A server's error that blames the request is the request's error: nobody needs to send it again."""
    events = await ask(answers_with(head(status, "application/json"), orjson.dumps(document)))
    assert events == [ResponseStart(400, "application/json"), ResponseEnd(orjson.dumps(document))]


@pytest.mark.parametrize(
    ("status", "kind", "words", "shown"),
    [
        (500, "text/plain", b"tools must be an array", "tools must be an array"),
        (500, "application/json", b'{"detail": "image input is not supported"}', "image input is not supported"),
        (500, "application/json", b'{"code": 500, "message": "image input is not supported"}', "image input is not supported"),
        (400, "application/json", b'{"error": "gemma does not support tools"}', "gemma does not support tools"),
        (422, "application/json", b'{"detail": [{"loc": ["body", "n"], "msg": "too large"}]}', "body.n: too large"),
        (400, "text/html", b"<html><head><title>x</title></head><body>Bad <b>Request</b></body></html>", "Bad Request"),
        (501, "text/plain", b"", "the engine refused the request with the status 400, without a reason"),
        (413, "application/json", b'{"error": {"message": "a\\u0000b\\u001b[31m"}}', "ab[31m"),
        (400, "application/json", b'{"error": {"message": "' + b"x" * 5_000 + b'"}}', "x" * 999 + "…"),
    ],
)
async def test_words_stand_where_openais_sdks_look(status: int, kind: str, words: bytes, shown: str) -> None:
    """Every form of an error gives the client a message: bounded, and without control characters."""
    events = await ask(answers_with(head(status, kind), words))
    assert events[0] == ResponseStart(400 if status >= 500 else status, "application/json")
    assert isinstance(events[-1], ResponseEnd)
    assert orjson.loads(events[-1].tail)["error"]["message"] == shown


async def test_a_crash_is_no_error_of_the_request() -> None:
    """A failure of the engine leaves the job to another provider. Its words are for the client alone."""
    words = orjson.dumps({"error": {"message": "CUDA out of memory: the batch is not supported", "type": "internal"}})
    error = await fault(answers_with(head(500, "application/json"), words))
    assert (error.code, str(error)) == (Code.ENGINE_UNAVAILABLE, "the engine answered with the status 500")
    assert error.private_reason == "CUDA out of memory: the batch is not supported"
    assert "CUDA" not in str(error.as_json())


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_failure_with_status_200_has_words_too(streamed: bool) -> None:
    """So has a failure that came instead of an answer."""
    document = {"error": {"message": "the worker died", "code": 500}}
    parts = (head(), ROLE, event(**document), DONE) if streamed else (JSON_HEAD, orjson.dumps(document))
    error = await fault(answers_with(*parts), STREAM if streamed else WHOLE)
    assert (error.code, error.private_reason) == (Code.ENGINE_UNAVAILABLE, "the worker died")
    busy = await fault(answers_with(head(429, "application/json"), orjson.dumps({"error": "3 jobs before yours"})))
    assert (busy.code, busy.private_reason) == (Code.NODE_BUSY, "3 jobs before yours")


ODD_JSON = [
    b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"},"logprobs":{"content":[{"logprob":-Infinity}]}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a"},"score":NaN}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"\xf0\x9f"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"a\tb"}}]}\n\n',
]


@pytest.mark.parametrize("odd", ODD_JSON)
async def test_json_that_others_parse_is_passed_on(odd: bytes) -> None:
    """The bytes pass unchanged and are counted; with another model's name they still are JSON that others parse."""
    events = await ask(answers_with(head(), odd, STOP, USAGE, DONE))
    assert body(events) == odd + STOP + DONE
    assert sum(event.text_bytes for event in events if isinstance(event, ResponsePart)) > 0
    assert b'"model":"model"' in body(await ask(answers_with(head(), odd, STOP, DONE), RENAMED))
    document = odd[6:-2].replace(b"delta", b"message")
    events = await ask(answers_with(JSON_HEAD, document), WHOLE)
    assert body(events) == document


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("30", 30),
        ("0.2", 1),
        ("99999999", 3_600),
        ("0", None),
        ("-5", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("", None),
    ],
)
async def test_the_engines_own_wait_is_kept(header: str, wait: int | None) -> None:
    """A busy engine's Retry-After travels with the error."""
    error = await fault(answers_with(head(429, "application/json", f"retry-after: {header}"), b"{}"))
    assert (error.code, error.retry_after) == (Code.NODE_BUSY, wait)


def test_a_date_to_wait_for() -> None:
    """Retry-After may be a date."""
    assert read_wait(format_datetime(datetime.now(UTC) + timedelta(seconds=40))) in (39, 40, 41)
    assert read_wait(format_datetime(datetime.now(UTC) - timedelta(seconds=40))) is None

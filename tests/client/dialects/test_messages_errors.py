"""Errors in the form of Anthropic's API: the gateway's own and those of engines."""

from __future__ import annotations

import json

import pytest

from tallystick.client.dialects.messages_errors import error_type, render, render_event, translate_engine_error, untranslatable
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BadMessage("x"), 400, "invalid_request_error"),
        (Refusal(Code.UNAUTHENTICATED, "x"), 401, "authentication_error"),
        (Refusal(Code.OVER_BUDGET, "x"), 402, "billing_error"),
        (Refusal(Code.UNKNOWN_MODEL, "x"), 404, "not_found_error"),
        (Refusal(Code.ORDER_REPLAYED, "x"), 409, "invalid_request_error"),
        (Refusal(Code.BODY_TOO_LARGE, "x"), 413, "request_too_large"),
        (Unavailable(Code.RATE_LIMITED, "x"), 429, "rate_limit_error"),
        (BadMessage("x", fault=Fault.ENGINE), 502, "api_error"),
        (Unavailable(Code.NO_PROVIDER, "x"), 503, "overloaded_error"),
        (Unavailable(Code.TIMED_OUT, "x"), 504, "timeout_error"),
    ],
)
def test_each_status_has_its_type(error: TallyError, status: int, kind: str) -> None:
    """Anthropic's members come first; the market's own stand beside them. The event of a stream says the same."""
    response = render(error, request_id="req_1")
    document = json.loads(response.body)
    assert (response.status, document["type"], document["request_id"]) == (status, "error", "req_1")
    shown = document["error"]
    assert (shown["type"], shown["message"], shown["code"], shown["fault"]) == (kind, "x", error.code.value, error.fault.value)
    assert response.headers["x-should-retry"] == ("true" if error.retry else "false")
    assert render_event(error, request_id="req_1") == b"event: error\ndata: " + response.body + b"\n\n"


def test_a_retry_may_be_advised_against() -> None:
    """A retry could be paid for twice."""
    response = render(Unavailable(Code.NODE_GONE, "x"), request_id="r", retry=False)
    assert (json.loads(response.body)["error"]["retry"], response.headers["x-should-retry"]) == (False, "false")


@pytest.mark.parametrize("status", [529, 500, 418, 403])
def test_other_statuses(status: int) -> None:
    """Engines answer with statuses that this client never sends."""
    expected = {529: "overloaded_error", 500: "api_error", 418: "invalid_request_error", 403: "permission_error"}
    assert error_type(status) == expected[status]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"error":{"message":"no such user","type":"server_error","code":7}}', "no such user"),
        (b'{"error":"no such user"}', "no such user"),
        (b'{"object":"error","message":"no such user","code":400}', "no such user"),
        (b'{"detail":"no such user"}', "no such user"),
        (b'{"detail":[{"msg":"no such user"}]}', "no such user"),
        (b"no such user", "no such user"),
        (b"\xff no such user", "no such user"),
        (b'{"why":"no such user"}', "no such user"),
    ],
)
def test_an_engines_error_keeps_its_words(body: bytes, words: str) -> None:
    """Whatever form the engine's error has, a client of Anthropic's API reads it."""
    document = json.loads(translate_engine_error(400, body, request_id="ab"))
    assert (document["type"], document["error"]["type"], document["request_id"]) == ("error", "invalid_request_error", "ab")
    assert words in document["error"]["message"]


@pytest.mark.parametrize(
    ("words", "status", "too_long"),
    [
        ("This model's maximum context length is 8192 tokens. However, you requested 9000", 400, True),
        ("the request exceeds the available context size, try increasing it", 400, True),
        ("Input is too long for the requested model", 422, True),
        ("context length", 500, False),
        ("tools must be an array", 400, False),
    ],
)
def test_a_request_that_is_too_long_is_told_in_anthropics_words(words: str, status: int, too_long: bool) -> None:
    """By these words Claude Code knows that it must shorten the conversation."""
    body = json.dumps({"error": {"message": words}}).encode()
    message = json.loads(translate_engine_error(status, body, request_id="ab"))["error"]["message"]
    assert message == ("prompt is too long: " if too_long else "") + words
    refused = render(Refusal(Code.CONTEXT_LENGTH_EXCEEDED, words), request_id="ab")
    assert json.loads(refused.body)["error"]["message"] == f"prompt is too long: {words}"


def test_an_engines_error_in_the_right_form_stays() -> None:
    """An engine that has the route has its errors too."""
    body = b'{"type": "error", "error": {"type": "invalid_request_error", "message": "x"}}'
    assert translate_engine_error(400, body, request_id="ab") == body


def test_what_cannot_be_translated_says_why() -> None:
    """The member comes first, then what it says, then what to do."""
    text = str(untranslatable("tools[0].type", "a server tool", "leave it out"))
    assert text.startswith("tools[0].type: a server tool cannot be translated")
    assert text.endswith("; leave it out")

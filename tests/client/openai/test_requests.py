from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick.client.openai.answers import TextDeltas, read_text
from tallystick.client.openai.errors import read_engine_error, render_error, render_error_event
from tallystick.client.openai.needs import NO_NEEDS
from tallystick.client.openai.requests import ApiRequest, RequestSummary, body_bytes, summarise
from tallystick.protocol.errors import (
    BadMessage,
    BadReceipt,
    BadSeal,
    Code,
    Fault,
    Refusal,
    TallyError,
    Unavailable,
    error_from_json,
)
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, FORM, MESSAGES, RESPONSES


def request_summary(path: str, **members: Any) -> RequestSummary:
    """The summary of a JSON request with these members."""
    return summarise(path, orjson.dumps({"model": "m"} | members))


@pytest.mark.parametrize(
    ("path", "members", "output"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (CHAT, {"max_tokens": None, "n": None}, None),
        (CHAT, {"max_completion_tokens": 7, "n": 3}, 21),
        (CHAT, {"max_tokens": 0}, 0),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5}, 5),
        (COMPLETIONS, {"prompt": ["x", "y"], "max_tokens": 5}, 10),
        (COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 5}, 5),
        (COMPLETIONS, {"prompt": [[1], [2]], "max_tokens": 5, "n": 2, "best_of": 3}, 30),
        (COMPLETIONS, {"prompt": [], "max_tokens": 5}, 5),
        (EMBEDDINGS, {"input": "x"}, 0),
        (CHAT, {"max_tokens": -1}, None),
        (CHAT, {"max_tokens": -2.0, "max_completion_tokens": None}, None),
        (CHAT, {"max_completion_tokens": -1, "max_tokens": 5}, 5),
        (CHAT, {"max_tokens": 20.0, "n": 2.0}, 40),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2e3, "best_of": 3.0}, 6_000),
        (CHAT, {"n_predict": 9}, 9),
        (CHAT, {"n_predict": 9, "max_tokens": 8}, 8),
        (RESPONSES, {"input": "x", "max_output_tokens": 20.0}, 20),
        (RESPONSES, {"input": "x", "max_output_tokens": -1}, None),
        (RESPONSES, {"input": "x", "max_tokens": 20}, None),
        (MESSAGES, {"max_tokens": 20.0}, 20),
        (MESSAGES, {"max_tokens": -1}, None),
    ],
)
def test_output_limit(path: str, members: dict[str, Any], output: int | None) -> None:
    """The most output that a request can ask for counts every choice of every prompt."""
    assert request_summary(path, **members).output_tokens == output


@pytest.mark.parametrize("value", [-3, 1.5, -1.5, 1e300, True, "20", [20], {}, 1 << 31])
@pytest.mark.parametrize("member", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_limits_that_are_none(member: str, value: object) -> None:
    """Any other value is refused, and its member named, also beside a valid limit."""
    with pytest.raises(BadMessage, match=f"^{member}: expected a whole number"):
        request_summary(CHAT, **({"max_completion_tokens": 5, "max_tokens": 5} | {member: value}))


def test_default_output() -> None:
    """If a request sets no limit, the default applies to each choice, up to what is sold."""
    assert request_summary(CHAT).tokens_to_order(100, 1_000) == 100
    assert request_summary(CHAT, n=3).tokens_to_order(100, 1_000) == 300
    assert request_summary(CHAT, n=30).tokens_to_order(100, 1_000) == 1_000
    assert request_summary(CHAT, max_tokens=7).tokens_to_order(100, 1_000) == 7


def test_less_output_than_the_limit() -> None:
    """A limit of Messages, which every request must set, may be more than anyone sells; other limits are needed in full."""
    for path, least in ((CHAT, 7), (COMPLETIONS, 7), (MESSAGES, 5)):
        summary = request_summary(path, max_tokens=7)
        assert (summary.least_output(5), summary.least_output(9), summary.tokens_to_order(1, 5)) == (least, 7, 5)
    for less, least in ((True, 5), (False, 7)):
        request = ApiRequest.of(CHAT, b'{"model":"m","max_tokens":7}', accepts_less=less)
        assert request.summary.least_output(5) == least
    assert request_summary(MESSAGES).least_output(5) == 0


def test_media_is_not_bounded_by_bytes() -> None:
    """Tokens of images, audio and files can't be bounded by the bytes that refer to them."""
    picture = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
    ]
    assert not request_summary(CHAT, messages=[{"role": "user", "content": picture}]).bounded
    texts: list[Any] = [{"role": "user", "content": "image_url"}, {"role": "assistant", "content": None, "tool_calls": []}]
    summary = request_summary(CHAT, messages=[*texts, {"role": "user", "content": picture[:1]}, 7, {}], stream=True)
    assert replace(summary, needs=NO_NEEDS) == RequestSummary("m", stream=True, output_tokens=None, choices=1, bounded=True)


def test_other_routes() -> None:
    """Requests to any valid path are read for their model. Only responses have an output limit and may be bounded by bytes."""
    assert request_summary("/v1/rerank", query="q", documents=["a"]) == RequestSummary(
        "m", stream=False, output_tokens=None, choices=1, bounded=False
    )
    words = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    summary = request_summary(RESPONSES, input=words, max_output_tokens=5, stream=True)
    assert replace(summary, needs=NO_NEEDS) == RequestSummary("m", stream=True, output_tokens=5, choices=1, bounded=True)
    assert request_summary(RESPONSES, input="hi").bounded
    picture = [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]
    assert not request_summary(RESPONSES, input=picture).bounded
    assert not request_summary(RESPONSES, input="hi", previous_response_id="r").bounded
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'
    transcription = summarise("/v1/audio/transcriptions", form, "multipart/form-data; boundary=b")
    assert transcription == RequestSummary("m", stream=False, output_tokens=None, choices=1, bounded=False)
    for content_type, message in (("text/plain", "content-type"), ("multipart/form-data", "boundary")):
        with pytest.raises(BadMessage, match=message):
            summarise("/v1/audio/transcriptions", form, content_type)
    for path in ("/v1", "/v1/", "/v1/../x", "/v1/x/../y", "/v1//x", "/health", "/v1/X", "/v1/x?y", "/v1/" + "x/" * 9 + "x"):
        with pytest.raises(Refusal, match="expected a path such as"):
            request_summary(path)


def test_json_as_clients_write_it() -> None:
    """Half an emoji, as JavaScript writes it, and a seed of any size are read; bytes that are no UTF-8 are named."""
    assert summarise(CHAT, rb'{"model":"m","messages":[{"role":"user","content":"\ud83d"}],"seed":1%020d}' % 0).model == "m"
    with pytest.raises(BadMessage, match="request body: expected UTF-8, got the byte 0xe9 at 13"):
        summarise(CHAT, b'{"model":"caf\xe9"}')


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, "/v1/rerank"])
def test_a_model_whose_name_is_no_text(path: str) -> None:
    """Half a character names no model: nothing that is sent on could carry it."""
    with pytest.raises(BadMessage, match="model: expected Unicode"):
        summarise(path, rb'{"model":"\ud800"}')


@pytest.mark.parametrize("body", [5, "text", None, [1]])
def test_a_body_is_bytes_or_a_mapping(body: object) -> None:
    """Anything else is the program's fault, and an error like others."""
    with pytest.raises(BadMessage, match="request body: expected bytes or a mapping"):
        body_bytes(body)


@given(st.binary() | st.text().map(str.encode))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Any bytes from a caller are read or refused, and never crash the reader."""
    for path in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, "/v1/rerank"):
        for content_type in ("application/json", f"{FORM}; boundary=b"):
            with contextlib.suppress(BadMessage):
                assert summarise(path, body, content_type).model


@pytest.mark.parametrize(
    ("error", "status", "error_type"),
    [
        (BadMessage("x"), 400, "invalid_request_error"),
        (BadMessage("x", fault=Fault.COORDINATOR), 502, "server_error"),
        (BadSeal("x", fault=Fault.PROVIDER), 502, "server_error"),
        (BadReceipt("x"), 502, "server_error"),
        (Refusal(Code.ORDER_MISDIRECTED, "x", fault=Fault.COORDINATOR), 502, "server_error"),
        (Refusal(Code.UNKNOWN_MODEL, "x"), 404, "not_found_error"),
        (Refusal(Code.INSUFFICIENT_FUNDS, "x"), 402, "insufficient_quota"),
        (Unavailable(Code.NO_PROVIDER, "x"), 503, "server_error"),
    ],
)
def test_error_status_shows_whose_fault_it_is(error: TallyError, status: int, error_type: str) -> None:
    """Status 400 and 401 are only for the caller's own faults; retryable errors say when to retry."""
    response = render_error(error)
    document = orjson.loads(response.body)["error"]
    assert (response.status, document["type"], document["code"]) == (status, error_type, error.code.value)
    assert response.headers.get("retry-after") == ("1" if error.retry else None)
    assert render_error_event(error) == b"data: " + response.body + b"\n\n"


def test_an_error_event_speaks_its_routes_dialect() -> None:
    """Clients of responses raise events that are called error."""
    error = Unavailable(Code.NODE_GONE, "gone", fault=Fault.PROVIDER)
    name, data = render_error_event(error, path=RESPONSES).split(b"\n")[:2]
    document = orjson.loads(data.removeprefix(b"data: "))
    assert (name, document["type"], document["error"]["type"]) == (b"event: error", "error", "server_error")
    assert document["error"]["message"] == "gone"


def test_halves_of_a_character_are_joined() -> None:
    """Two deltas may each have one half of a UTF-16 pair; a half without its other is replaced."""
    halves = [b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % half for half in (b"a\\ud83d", b"\\ude00", b"\\ude00")]
    deltas = TextDeltas()
    assert [text for half in halves for text in deltas.feed(half)] == ["a", "\U0001f600", "\ufffd"]
    assert read_text(b'{"choices":[{"message":{"content":"\\ud83d\\ude00"},"score":NaN}]}') == "\U0001f600"


def test_the_engines_own_wait_is_told() -> None:
    """A wait that the engine named reaches the client; otherwise it is a second."""
    busy = Unavailable(Code.NODE_BUSY, "busy")
    assert render_error(busy).headers["retry-after"] == "1"
    busy.retry_after = 30
    told = error_from_json(busy.as_json(), 503)
    assert render_error(told).headers["retry-after"] == "30"
    for odd, wait in ((True, None), ("30", None), (0, None), (10**9, 3_600)):
        told = error_from_json({"error": {"code": "node_busy", "retry": True, "retry_after": odd}}, 503)
        assert told.retry_after == wait


def test_engine_errors() -> None:
    """An engine's error message is kept, in whatever format the engine sends it."""
    summary = {
        b'{"error": {"message": "too hot"}}': "too hot",
        b'{"error": "cold"}': "cold",
        b"<html>": "<html>",
        b"\xff": "\ufffd",
    }
    for body, words in summary.items():
        assert words in str(read_engine_error(418, body))
    assert read_engine_error(418, b"").retry is False
    assert (read_engine_error(503, b"").retry, read_engine_error(503, b"").fault) == (True, Fault.ENGINE)


def test_text_of_an_answer() -> None:
    """The text of chats and plain completions is read; other documents are refused."""
    assert read_text(b'{"choices": [{"message": {"content": "a"}}]}') == "a"
    assert read_text(b'{"choices": [{"message": {"content": null}}]}') == ""
    assert read_text(b'{"choices": [{"text": "b"}]}') == "b"
    for body in (b"{}", b"[]", b'{"choices": []}', b'{"choices": [1]}'):
        with pytest.raises(BadMessage):
            read_text(body)

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.domain.requests import prepare
from tallystick.client.openai.requests import summarise
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.messages import Spec
from tallystick.protocol.openai_wire import OUTPUT_LIMITS
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tallystick.protocol.wire import dumps, loads
from tests.node.harness import OFFER


def sent(fields: dict[str, Any], path: str = CHAT, limit: int = 100, **offer: Any) -> dict[str, Any]:
    """The body that the engine gets for a request."""
    body: dict[str, Any] = loads(prepare(RequestHead(path), dumps(fields), replace(OFFER, **offer), limit).body, "body")
    return body


def test_unknown_fields_pass_through() -> None:
    """Members that the order does not bound reach the engine unchanged."""
    fields = {"model": "model", "messages": [{"role": "user", "content": "héllo"}], "temperature": 0.3, "x": {"y": [None, 1]}}
    assert sent(fields) == fields | {"max_tokens": 100}


def test_the_model_is_the_one_that_was_ordered() -> None:
    """The engine gets its own name of the ordered model, whichever name the body has; the answer is mapped back."""
    engine_request = prepare(RequestHead(CHAT), dumps({"model": "dearer"}), replace(OFFER, upstream="org/model"), 10)
    assert loads(engine_request.body, "body")["model"] == "org/model"
    assert engine_request.rename == ("org/model", "model")
    assert prepare(RequestHead(CHAT), b"{}", OFFER, 10).rename is None


@pytest.mark.parametrize(
    ("given_fields", "path", "expected"),
    [
        ({}, CHAT, {"max_tokens": 100}),
        ({"max_tokens": 7}, CHAT, {"max_tokens": 7}),
        ({"max_tokens": 700}, CHAT, {"max_tokens": 100}),
        ({"max_completion_tokens": 700}, CHAT, {"max_completion_tokens": 100}),
        ({"max_completion_tokens": 700, "max_tokens": 5}, CHAT, {"max_completion_tokens": 100, "max_tokens": 5}),
        ({"max_tokens": None}, CHAT, {"max_tokens": 100}),
        ({"n": 3}, CHAT, {"n": 3, "max_tokens": 33}),
        ({"best_of": 4, "n": 2}, COMPLETIONS, {"best_of": 4, "n": 2, "max_tokens": 25}),
        ({"prompt": ["a", "b"]}, COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 50}),
        ({"prompt": [1, 2, 3]}, COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 100}),
        ({"max_tokens": -1}, CHAT, {"max_tokens": 100}),
        ({"max_tokens": -2.0, "max_completion_tokens": None}, CHAT, {"max_tokens": 100, "max_completion_tokens": None}),
        ({"max_completion_tokens": -1}, CHAT, {"max_tokens": 100}),
        ({"max_completion_tokens": -1, "max_tokens": 7}, CHAT, {"max_tokens": 7}),
        ({"max_tokens": -1, "n": 2.0}, CHAT, {"max_tokens": 50, "n": 2}),
        ({"max_tokens": 20.0}, CHAT, {"max_tokens": 20}),
        ({"max_tokens": 2e3}, CHAT, {"max_tokens": 100}),
        ({"max_tokens": -1}, COMPLETIONS, {"max_tokens": 100}),
        ({"max_tokens": 8.0, "best_of": 3.0}, COMPLETIONS, {"max_tokens": 8, "best_of": 3}),
        ({"n_predict": 7}, CHAT, {"n_predict": 7, "max_tokens": 7}),
        ({"n_predict": 700.0}, COMPLETIONS, {"n_predict": 100, "max_tokens": 100}),
        ({"n_predict": -1}, CHAT, {"max_tokens": 100}),
        ({"n_predict": 700, "max_tokens": 1}, CHAT, {"n_predict": 100, "max_tokens": 1}),
        ({"max_tokens": 0, "echo": True}, COMPLETIONS, {"max_tokens": 0, "echo": True}),
        ({"input": "text"}, EMBEDDINGS, {"input": "text"}),
    ],
)
def test_output_is_capped_over_all_choices(given_fields: dict[str, Any], path: str, expected: dict[str, Any]) -> None:
    """No request gets more output than was ordered, whatever limits, choices or prompts it names."""
    assert sent(given_fields, path) == expected | {"model": "model"}


@pytest.mark.parametrize("written", ["{}", "20", "20.0", "2e1", "-1", "-1.0", "-2", "null", "700.0"])
@pytest.mark.parametrize(("path", "member"), [(RESPONSES, "max_output_tokens"), (MESSAGES, "max_tokens")])
def test_limits_of_other_routes(path: str, member: str, written: str) -> None:
    """Responses and messages read the same numbers: the engine gets a whole number within the order."""
    body = b"{}" if written == "{}" else b'{"%b": %b}' % (member.encode(), written.encode())
    offer = replace(OFFER, spec=Spec(features=(RESPONSES, MESSAGES)))
    out = loads(prepare(RequestHead(path), body, offer, 100).body, "body")[member]
    assert out == (20 if written.startswith("2") else 100)
    assert isinstance(out, int)


def test_an_unlimited_completion_is_limited_by_its_context_alone() -> None:
    """Who sends -1 does not want the engine's short default, and gets the order where the prompt leaves room for it."""
    offer: dict[str, Any] = {"max_output_tokens": 100}
    assert "max_tokens" not in sent({}, COMPLETIONS, 100, **offer)
    assert sent({"max_tokens": -1}, COMPLETIONS, 100, **offer)["max_tokens"] == 100
    long = {"prompt": "x" * 2_000, "max_tokens": -1}
    assert "max_tokens" not in sent(long, COMPLETIONS, 100, context_tokens=850, **offer)


@pytest.mark.parametrize(("engine", "adapted"), [("llama.cpp", {"type": "json_object"}), ("vllm", None)])
def test_an_engine_gets_what_it_reads(engine: str, adapted: dict[str, str] | None) -> None:
    """The format of Responses also stands where llama.cpp reads it; other engines get the request as it is."""
    offer = replace(OFFER, spec=Spec(engine=engine, features=(RESPONSES,)))
    body = dumps({"model": "m", "input": "x", "text": {"format": {"type": "json_object"}}})
    assert loads(prepare(RequestHead(RESPONSES), body, offer, 100).body, "body").get("response_format") == adapted


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_no_limit_is_invented_that_the_context_cannot_hold(path: str) -> None:
    """A long prompt leaves what it leaves; a limit that the client set is still bounded by the order."""
    member = "max_tokens" if path == CHAT else "max_output_tokens"
    prompt: dict[str, Any] = {"messages" if path == CHAT else "input": "x" * 2_000}
    offer: dict[str, Any] = {"max_output_tokens": 100, "spec": Spec(features=(RESPONSES,))}
    assert sent(prompt, path, 100, context_tokens=2_000, **offer)[member] == 100
    assert member not in sent(prompt, path, 100, context_tokens=850, **offer)
    assert sent(prompt | {member: 700}, path, 100, context_tokens=850, **offer)[member] == 100


def test_an_order_of_less_than_usual_is_a_limit() -> None:
    """A client cannot order one token, pad its request, and get all that the context leaves."""
    prompt, offer = {"messages": "x" * 40_000}, {"context_tokens": 8_192, "max_output_tokens": 8_192}
    assert sent(prompt, CHAT, 4_095, **offer)["max_tokens"] == 4_095
    assert "max_tokens" not in sent(prompt, CHAT, 4_096, **offer)
    assert sent(prompt, COMPLETIONS, 4_095, **offer)["max_tokens"] == 4_095


def test_room_for_an_order_of_less_than_is_sold() -> None:
    """It is what a usual text leaves, and each choice has a context of its own."""
    offer = {"context_tokens": 16_384, "max_output_tokens": 8_192}
    empty = len(dumps({"messages": ""}))
    assert sent({"messages": "x" * (4 * 12_288 - empty)}, CHAT, 4_096, **offer)["max_tokens"] == 4_096
    assert "max_tokens" not in sent({"messages": "x" * (4 * 12_288 - empty + 1)}, CHAT, 4_096, **offer)
    assert sent({"messages": "x" * (4 * 12_288), "n": 2}, CHAT, 4_096, **offer)["max_tokens"] == 2_048


@pytest.mark.parametrize("engine", ["unknown", "vllm", "llama.cpp", "ollama", "lm-studio"])
def test_a_completion_keeps_its_engines_default(engine: str) -> None:
    """An engine with a short default keeps it; one that would go on to the end of its context gets the ordered limit."""
    out = sent({"prompt": "Once"}, COMPLETIONS, 1_024, spec=Spec(engine=engine))
    assert out.get("max_tokens") == (None if engine in ("unknown", "vllm") else 1_024)


def test_a_request_without_a_limit_is_cut_at_the_order() -> None:
    """Only an engine that got no limit can go beyond what the order pays for."""

    def cut_after(fields: dict[str, Any]) -> int | None:
        return prepare(RequestHead(COMPLETIONS), dumps(fields), OFFER, 1_024).cut_after

    assert cut_after({"prompt": "Once"}) == 1_024
    assert cut_after({"prompt": "Once", "max_tokens": 3}) is None
    assert cut_after({"prompt": "Once", "max_tokens": 0}) is None
    assert prepare(RequestHead(CHAT), b"{}", OFFER, 100).cut_after is None
    offer = replace(OFFER, spec=Spec(features=(RESPONSES,)), max_output_tokens=100, context_tokens=850)
    long = dumps({"input": "x" * 2_000})
    assert prepare(RequestHead(RESPONSES), long, offer, 100).cut_after == 100
    assert prepare(RequestHead(RESPONSES), b"{}", offer, 100).cut_after is None


def test_a_large_seed_is_unchanged() -> None:
    """Integers beyond 64 bits reach the engine as they are."""
    assert b'"seed":36893488147419103232' in prepare(RequestHead(CHAT), b'{"seed": 36893488147419103232}', OFFER, 10).body


def test_media_is_not_bounded_by_bytes() -> None:
    """An image by its URL has more tokens than bytes; text has not."""
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]
    assert not prepare(RequestHead(CHAT), dumps({"messages": image}), OFFER, 10).bounded
    assert prepare(RequestHead(CHAT), dumps({"messages": [{"role": "user", "content": "hi"}]}), OFFER, 10).bounded


def test_an_engine_may_use_another_limit_member() -> None:
    """A request without a limit gets the engine's own limit member; completions have only one."""
    assert sent({}, output_limit_field="max_completion_tokens")["max_completion_tokens"] == 100
    for fields, limit in (
        ({"max_tokens": 7}, 7),
        ({"max_tokens": 700, "max_completion_tokens": None}, 100),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_tokens": None}, 100),
    ):
        newer = sent(fields, output_limit_field="max_completion_tokens")
        assert newer == {"max_completion_tokens": limit, "model": "model"}, "an engine with the newer field refuses the older"
    assert sent({}, COMPLETIONS, output_limit_field="max_completion_tokens")["max_tokens"] == 100


@pytest.mark.parametrize(
    ("fields", "strip"),
    [
        ({"stream": True}, True),
        ({"stream": True, "stream_options": {"include_usage": True}}, False),
        ({"stream": True, "stream_options": {"include_usage": False, "other": 1}}, True),
        ({"stream": True, "stream_options": None}, True),
        ({"stream": False}, False),
    ],
)
def test_usage_is_asked_for_on_streams(fields: dict[str, Any], strip: bool) -> None:
    """Streams are asked for usage, and its event is removed again unless the client asked for it."""
    engine_request = prepare(RequestHead(CHAT), dumps(fields), OFFER, 10)
    assert engine_request.strip_usage is strip
    assert engine_request.stream is bool(fields["stream"])
    options = loads(engine_request.body, "body").get("stream_options")
    assert (options or {}).get("include_usage", False) is engine_request.stream


def test_usage_is_not_requested_without_support() -> None:
    """An engine without the usage option gets the request without it, also if the client sent it."""
    asked = {"stream_options": {"include_usage": True}}
    for path in (CHAT, COMPLETIONS):
        assert "stream_options" not in sent({"stream": True}, path, supports_stream_usage=False)
        assert "stream_options" not in sent({"stream": True} | asked, path, supports_stream_usage=False)
        assert sent({"stream": True} | asked, path)["stream_options"] == {"include_usage": True}


def test_routes_that_the_ask_declares() -> None:
    """Declared routes are served with every member unchanged except the model and a response's output limit."""
    offer = replace(OFFER, upstream="org/model", spec=Spec(features=(RESPONSES, "/v1/rerank", "/v1/audio/transcriptions")))
    request = {"input": "hi", "max_output_tokens": 500, "stream": True}
    engine_request = prepare(RequestHead(RESPONSES), dumps(request), offer, 100)
    assert loads(engine_request.body, "body") == request | {"model": "org/model", "max_output_tokens": 100}
    assert (engine_request.stream, engine_request.strip_usage, engine_request.is_completion) == (True, False, False)
    bare = loads(prepare(RequestHead(RESPONSES), b"{}", offer, 100).body, "body")
    assert (bare["max_output_tokens"], bare["stream"]) == (100, False)
    ranks = prepare(RequestHead("/v1/rerank"), dumps({"query": "q", "max_tokens": 7}), offer, 100)
    assert loads(ranks.body, "body") == {"query": "q", "max_tokens": 7, "model": "org/model"}
    kind = "multipart/form-data; boundary=b"
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel\r\n--b--\r\n'
    heard = prepare(RequestHead("/v1/audio/transcriptions", kind), form, offer, 100)
    assert (heard.body, heard.content_type) == (form.replace(b"model\r\n--b--", b"org/model\r\n--b--"), kind)
    with pytest.raises(BadMessage, match="missing"):
        prepare(RequestHead("/v1/audio/transcriptions", kind), b"--b--\r\n", offer, 100)
    with pytest.raises(Refusal, match=r"serves .*, /v1/rerank"):
        prepare(RequestHead("/v1/moderations"), b"{}", offer, 10)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions/../models", "http://elsewhere/v1/embeddings", ""])
def test_only_known_routes_are_reached(path: str) -> None:
    """A request cannot reach any other address of the engine."""
    with pytest.raises(Refusal) as caught:
        prepare(RequestHead(path), b"{}", OFFER, 10)
    assert caught.value.code is Code.UNKNOWN_ROUTE


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"stream": "yes"}',
        b'{"stream": 1}',
        b'{"max_tokens": -3}',
        b'{"max_tokens": 1.5}',
        b'{"max_tokens": -1.5}',
        b'{"max_tokens": 1e300}',
        b'{"max_tokens": NaN}',
        b'{"max_tokens": Infinity}',
        b'{"max_tokens": "20"}',
        b'{"max_tokens": false}',
        b'{"max_completion_tokens": 5, "max_tokens": "x"}',
        b'{"n_predict": {}}',
        b'{"n": 1.5}',
        b'{"n": -1}',
        b'{"n": true}',
        b'{"n": 101}',
        b'{"n": 100000}',
        b'{"stream": true, "stream_options": 3}',
    ],
)
def test_bad_bodies_are_refused(body: bytes) -> None:
    """A body that no engine could serve within the order is the client's error, and the error quotes nothing from the body."""
    with pytest.raises(BadMessage):
        prepare(RequestHead(CHAT), body, OFFER, 100)


def test_other_content_types_are_refused() -> None:
    """These routes accept only JSON."""
    with pytest.raises(BadMessage):
        prepare(RequestHead(CHAT, "multipart/form-data"), b"{}", OFFER, 100)
    prepare(RequestHead(CHAT, "Application/JSON; charset=utf-8"), b"{}", OFFER, 100)
    with pytest.raises(BadMessage):
        prepare(RequestHead(EMBEDDINGS), b'{"stream": true}', OFFER, 0)


limits = st.none() | st.integers(-2, 2_000) | st.integers(-2, 2_000).map(float)


@given(
    limit=st.integers(1, 1_000),
    fields=st.fixed_dictionaries(
        {}, optional={"n": st.integers(1, 20), "max_tokens": limits, "max_completion_tokens": limits, "n_predict": limits}
    ),
)
def test_no_request_gets_more_than_was_ordered(limit: int, fields: dict[str, Any]) -> None:
    """For any limits of a request, choices times tokens stay within the order, or the request is refused."""
    try:
        out = sent(fields, limit=limit)
    except BadMessage:
        assert fields.get("n", 1) > limit
        return
    named = [out[name] for name in ("max_tokens", "max_completion_tokens", "n_predict") if out.get(name) is not None]
    assert named != [out.get("n_predict")], "engines other than llama.cpp have a limit"
    assert named
    assert all(value * out.get("n", 1) <= limit for value in named)


@given(
    path=st.sampled_from([CHAT, COMPLETIONS, RESPONSES, MESSAGES]),
    fields=st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "n_predict"), limits)
    ),
)
def test_client_and_node_read_the_same_limit(path: str, fields: dict[str, Any]) -> None:
    """What the client orders for a request is what the engine may generate, however the limit is written."""
    ordered = summarise(path, dumps({"model": "model"} | fields)).output_tokens
    offer = {"spec": Spec(features=(RESPONSES, MESSAGES)), "max_output_tokens": 5_000}
    try:
        out = sent(fields, path, 5_000 if ordered is None else ordered, **offer)
    except BadMessage:
        assert ordered == 0, "one member asks for output, and the one that decides for none"
        return
    got = [out[name] for name in OUTPUT_LIMITS[path] if out.get(name) is not None]
    if ordered is not None:
        assert got[0] == ordered
    assert all(isinstance(value, int) and 0 <= value <= 5_000 for value in got)

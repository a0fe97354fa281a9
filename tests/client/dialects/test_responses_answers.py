"""Chat completions as Responses, whole and streamed: what official clients read, in the order in which OpenAI sends it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tallystick.client.dialects.responses import ResponsesDialect, ResponsesTranslation
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.pricing import Usage

JOB = "ab" * 16
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
COUNTED = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 14,
}


def translation(**members: Any) -> ResponsesTranslation:
    """A translated request with these members."""
    return ResponsesDialect().translate(json.dumps({"model": "m", "input": "hi"} | members).encode())


def whole(message: dict[str, Any], finish: str = "stop", usage: Any = USAGE, **members: Any) -> dict[str, Any]:
    """The Response of a chat completion with this message."""
    choice = {"index": 0, "message": {"role": "assistant"} | message, "finish_reason": finish}
    document = {"id": "c", "object": "chat.completion", "created": 7, "model": "served", "choices": [choice], "usage": usage}
    body = translation(**members).answer(json.dumps(document).encode(), job=JOB, billed=Usage(1, 0, 2))
    response: dict[str, Any] = json.loads(body)
    Response.model_validate(response, strict=False)
    return response


def sse(*documents: Any, done: bool = True) -> bytes:
    """An event stream of these documents."""
    events = [b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents]
    return b"".join(events) + (b"data: [DONE]\n\n" if done else b"")


def chunk(delta: dict[str, Any], finish: str | None = None, **members: Any) -> dict[str, Any]:
    """One event of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish} | members
    return {"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "served", "choices": [choice]}


def streamed(data: bytes, *, step: int = 1 << 20, billed: Usage | None = None, **members: Any) -> list[dict[str, Any]]:
    """The events of a translated stream, each of which an official client understands."""
    stream = translation(stream=True, **members).open_stream(job=JOB)
    out = b"".join(stream.feed(data[at : at + step]) for at in range(0, len(data), step)) + stream.finish(billed)
    events = []
    for event in out.decode().split("\n\n"):
        if event.startswith(":") or not event:
            continue
        name, data_line = event.split("\n")
        document = json.loads(data_line.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        EVENTS.validate_python(document)
        events.append(document)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def names(events: list[dict[str, Any]]) -> list[str]:
    """The names of events, without what all have."""
    return [event["type"].removeprefix("response.") for event in events]


TEXT_EVENTS = ["output_item.added", "content_part.added", "output_text.delta"]
TEXT_ENDS = ["output_text.done", "content_part.done", "output_item.done"]
CALL_EVENTS = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def test_a_text() -> None:
    """Every member of a Response is there; those of the request are repeated."""
    response = whole({"content": "Hello."}, instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=9)
    assert response["output"] == [
        {
            "id": f"msg_{JOB}_0",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}],
        }
    ]
    assert response["usage"] == COUNTED
    expected = {"id": f"resp_{JOB}", "object": "response", "created_at": 7, "status": "completed", "model": "served"}
    expected |= {"instructions": "Be kind.", "metadata": {"a": "b"}, "max_output_tokens": 9, "error": None, "store": True}
    expected |= {"incomplete_details": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True}
    assert expected.items() <= response.items()
    assert response["text"]["format"] == {"type": "text"}


def test_reasoning_text_and_calls() -> None:
    """Reasoning comes first, as content or as the summary that was asked for; calls follow the text."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"type": "function", "function": {"name": "g", "arguments": {"a": 1}}},
    ]
    message = {"reasoning_content": "hm", "content": "Let me see.", "tool_calls": calls}
    response = whole(message, "tool_calls")
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert response["output"][0]["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in response["output"][2:]] == [
        ("c1", "f", "{}"),
        (f"call_{JOB}_1", "g", '{"a":1}'),
    ]
    assert len({item["id"] for item in response["output"]}) == 4
    summary = whole(message, reasoning={"summary": "auto"})["output"][0]
    assert (summary["summary"], "content" in summary) == ([{"type": "summary_text", "text": "hm"}], False)


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("length", "incomplete", "max_output_tokens"),
        ("max_tokens", "incomplete", "max_output_tokens"),
        ("content_filter", "incomplete", "content_filter"),
    ],
)
def test_status(finish: str, status: str, reason: str | None) -> None:
    """An answer that was cut off is incomplete, whole and streamed, and so is its last item."""
    events = streamed(sse(chunk({"content": "Hel"}), chunk({}, finish)))
    for response in (whole({"content": "Hel"}, finish), events[-1]["response"]):
        assert response["status"] == response["output"][-1]["status"] == status
        assert response["incomplete_details"] == (None if reason is None else {"reason": reason})
    assert events[-1]["type"] == f"response.{status}"
    assert events[-2]["item"] == events[-1]["response"]["output"][-1]


def test_a_refusal_and_an_empty_answer() -> None:
    """A refusal is a part of its own kind; an empty answer is a message without text."""
    assert whole({"content": None, "refusal": "No."})["output"][0]["content"] == [{"type": "refusal", "refusal": "No."}]
    assert whole({"content": ""})["output"][0]["content"][0]["text"] == ""
    events = streamed(sse(chunk({"refusal": "No"}), chunk({"refusal": "."}), chunk({}, "stop")))
    assert "refusal.delta" in names(events)
    assert events[-1]["response"]["output"][0]["content"] == [{"type": "refusal", "refusal": "No."}]
    assert streamed(sse(chunk({}, "stop")))[-1]["response"]["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}])
def test_an_engine_that_counts_nothing(usage: Any) -> None:
    """What was billed is reported instead."""
    counted = whole({"content": "a"}, usage=usage)["usage"]
    assert (counted["input_tokens"], counted["output_tokens"], counted["total_tokens"]) == (1, 2, 3)
    counted = streamed(sse(chunk({"content": "a"}, "stop")), billed=Usage(1, 0, 2))[-1]["response"]["usage"]
    assert (counted["input_tokens"], counted["output_tokens"], counted["total_tokens"]) == (1, 2, 3)


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"text":"x"}]}'])
def test_what_is_no_completion(body: bytes) -> None:
    """Anything but a chat completion is the engine's fault."""
    with pytest.raises(BadMessage, match="answer"):
        translation().answer(body, job=JOB, billed=None)


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_a_streamed_text(step: int) -> None:
    """Events come in OpenAI's order and add up to the whole response, however the bytes are split."""
    data = sse(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Grüß "}),
        chunk({"content": "Gott"}, logprobs={"content": [{"token": "Gott", "logprob": -0.5, "top_logprobs": []}]}),
        chunk({}, "stop"),
        {"choices": [], "usage": USAGE},
    )
    events = streamed(data, step=step)
    assert names(events) == ["created", "in_progress", *TEXT_EVENTS, "output_text.delta", *TEXT_ENDS, "completed"]
    assert events[0]["response"]["status"] == "in_progress"
    assert [event["delta"] for event in events if event["type"].endswith("delta")] == ["Grüß ", "Gott"]
    response = events[-1]["response"]
    assert response["usage"] == COUNTED
    part = response["output"][0]["content"][0]
    assert (part["text"], part["logprobs"][0]["logprob"]) == ("Grüß Gott", -0.5)
    assert events[-2]["item"] == response["output"][0]


def test_streamed_reasoning_and_parallel_calls() -> None:
    """Items follow one another, although the engine mixes the calls."""
    data = sse(
        chunk({"reasoning_content": "h"}),
        chunk({"reasoning_content": "m"}),
        chunk({"content": "Look:"}),
        chunk({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "g", "arguments": '{"b":'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}),
        chunk({"tool_calls": [{"index": 1, "function": {"arguments": "2}"}}]}),
        chunk({}, "tool_calls"),
    )
    events = streamed(data)
    reasoning = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta"]
    reasoning += ["reasoning_text.done", "content_part.done", "output_item.done"]
    assert names(events) == [
        *("created", "in_progress"),
        *reasoning,
        *TEXT_EVENTS,
        *TEXT_ENDS,
        *CALL_EVENTS,
        *(*CALL_EVENTS[:2], "function_call_arguments.delta", *CALL_EVENTS[2:]),
        "completed",
    ]
    output = events[-1]["response"]["output"]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output[2:]] == [
        ("c1", "f", '{"a":1}'),
        ("c2", "g", '{"b":2}'),
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == output
    assert [event["output_index"] for event in events if "output_index" in event] == sorted(
        event["output_index"] for event in events if "output_index" in event
    )


def test_a_streamed_summary_of_reasoning() -> None:
    """A caller that asked for a summary gets the reasoning in the events of one."""
    events = streamed(sse(chunk({"reasoning": "hm"}), chunk({"content": "a"}, "stop")), reasoning={"summary": "detailed"})
    assert names(events)[2:8] == [
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
    ]
    assert events[-1]["response"]["output"][0]["summary"] == [{"type": "summary_text", "text": "hm"}]


def test_calls_without_an_index_or_an_id() -> None:
    """Engines that send whole calls, or all with the same index, are understood."""
    calls = [{"index": 0, "id": f"c{at}", "function": {"name": "f", "arguments": "{}"}} for at in range(2)]
    events = streamed(sse(*(chunk({"tool_calls": [call]}) for call in calls), chunk({}, "tool_calls")))
    assert [item["call_id"] for item in events[-1]["response"]["output"]] == ["c0", "c1"]
    events = streamed(sse(chunk({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}), chunk({}, "stop")))
    assert [item["call_id"] for item in events[-1]["response"]["output"]] == [f"call_{JOB}_0"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (b'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (b"data: {\n\n", "not a JSON object"),
        (b"data: 7\n\n", "not a JSON object"),
    ],
)
def test_a_stream_that_fails(broken: bytes, words: str) -> None:
    """The response fails with the engine's words, after what was sent; nothing follows."""
    stream = translation(stream=True).open_stream(job=JOB)
    out = stream.feed(sse(chunk({"content": "a"}), done=False) + broken + sse(chunk({"content": "b"}))) + stream.finish(None)
    last = json.loads(out.decode().strip().split("\n")[-1].removeprefix("data: "))
    assert (last["type"], last["response"]["status"], stream.failed) == ("response.failed", "failed", True)
    assert words in last["response"]["error"]["message"]
    EVENTS.validate_python(last)


def test_a_stream_without_done_and_with_comments() -> None:
    """Comments keep the connection alive; the clean end of the stream ends the response."""
    events = streamed(b": ping\n\n" + sse(chunk({"content": "a"}, "stop"), done=False))
    assert names(events)[-1] == "completed"

"""Responses of engines, completed: ids of the gateway's own, and what clients need."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tallystick.client.dialects.responses_events import ResponseEvents, ResponseRewriter

JOB = "cd" * 16
CALL = {"type": "function_call", "id": "fc_engine", "call_id": "c", "name": "f", "arguments": "{}"}


def rewriter(**fixed: Any) -> ResponseRewriter:
    """A rewriter whose request says that the temperature is 1."""
    return ResponseRewriter(JOB, {"temperature": 1.0, "model": "m"}, fixed, 7)


def events(*documents: Any, step: int = 1 << 20) -> list[dict[str, Any]]:
    """The documents as events that went through the rewriter."""
    stream, out = ResponseEvents(rewriter()), b""
    data = b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents)
    for at in range(0, len(data), step):
        out += b"".join(event for event, _ in stream.feed(data[at : at + step]))
    out += b"".join(event for event, _ in stream.finish())
    return [json.loads(line[6:]) for line in out.decode().splitlines() if line.startswith("data: ")]


def test_a_document() -> None:
    """The engine's members win over those of the request, and what the gateway knows over both."""
    response = rewriter(store=True).document(
        {"id": "x", "store": False, "temperature": 0.5, "output": [CALL, 7, CALL], "usage": {}}
    )
    assert (response["id"], response["object"], response["created_at"]) == (f"resp_{JOB}", "response", 7)
    assert (response["store"], response["temperature"], response["model"]) == (True, 0.5, "m")
    assert [item["id"] for item in response["output"]] == [f"fc_{JOB}_0", f"fc_{JOB}_2"]
    assert all(item["status"] == "completed" and item["call_id"] == "c" for item in response["output"])
    assert response["usage"]["total_tokens"] == 0
    assert rewriter().document({"created_at": 9.0})["created_at"] == 9.0
    assert rewriter().document({"output": None})["usage"] is None


@pytest.mark.parametrize(
    "usage", [{"input_tokens": 2, "output_tokens": 3}, {"input_tokens": 2, "output_tokens": 3, "total_tokens": 5}]
)
def test_usage(usage: dict[str, int]) -> None:
    """Missing details are zero, and stated ones stay."""
    completed = rewriter().document({"usage": usage | {"input_tokens_details": {"cached_tokens": 1}}})["usage"]
    assert completed == {
        "input_tokens": 2,
        "output_tokens": 3,
        "total_tokens": 5,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


@pytest.mark.parametrize("step", [1, 1 << 20])
def test_events_without_indexes(step: int) -> None:
    """Items are numbered as they begin; further events are of the item that they name, or else of the last one."""
    message = {"type": "message", "id": "msg_engine", "content": []}
    rewritten = events(
        {"type": "response.output_item.added", "item": {"type": "reasoning", "id": "rs", "summary": []}},
        {"type": "response.reasoning_summary_text.delta", "item_id": "rs", "delta": "h"},
        {"type": "response.output_item.added", "item": message},
        {"type": "response.output_text.delta", "item_id": "msg_engine", "delta": "a"},
        {"type": "response.output_item.added", "item": CALL},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_engine", "delta": "{}"},
        {"type": "response.output_item.done", "item": message},
        {"type": "response.output_text.done", "item_id": "unknown", "text": "a"},
        {"type": "response.completed", "response": {"output": [CALL, message]}},
        step=step,
    )
    assert [event["sequence_number"] for event in rewritten] == list(range(9))
    assert [event.get("output_index") for event in rewritten] == [0, 0, 1, 1, 2, 2, 1, 2, None]
    assert (rewritten[1]["summary_index"], rewritten[1]["item_id"]) == (0, f"rs_{JOB}_0")
    assert (rewritten[3]["content_index"], rewritten[3]["logprobs"], rewritten[3]["item_id"]) == (0, [], f"msg_{JOB}_1")
    assert (rewritten[5]["item_id"], rewritten[5].get("content_index")) == (f"fc_{JOB}_2", None)
    assert [item["id"] for item in rewritten[8]["response"]["output"]] == [f"fc_{JOB}_2", f"msg_{JOB}_1"]


def test_given_indexes_stay() -> None:
    """What an engine numbers itself keeps its numbers."""
    rewritten = events(
        {"type": "response.output_item.added", "output_index": 4, "item": CALL},
        {"type": "response.content_part.added", "output_index": 4, "item_id": "fc_engine", "content_index": 2, "part": {}},
    )
    assert [event["output_index"] for event in rewritten] == [4, 4]
    assert rewritten[1]["content_index"] == 2


def test_what_is_no_event_of_a_response() -> None:
    """Comments, errors and anything else pass as they are; the last events say which response they end."""
    stream = ResponseEvents(rewriter())
    data = b': ping\n\nevent: error\ndata: {"type":"error","message":"m"}\n\ndata: [DONE]\n\ndata: {nope\n\n'
    passed = stream.feed(data)
    assert (b"".join(event for event, _ in passed), {response is None for _, response in passed}) == (data, {True})
    ended = stream.feed(b'data: {"type":"response.incomplete","response":{"output":[]}}\n\n')
    assert ended[0][1] is not None
    assert ended[0][1]["id"] == f"resp_{JOB}"
    failed = stream.feed(b'data: {"type":"response.failed","response":{"output":[]}}\n\n')
    assert failed[0][1] is None

"""Anthropic's SDK, synchronous and asynchronous, with only its base URL set by the environment."""

import asyncio
import json
from typing import Any

import anthropic  # type: ignore[import-not-found]

TOOLS = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
SYSTEM = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
HI = [{"role": "user", "content": "hi"}]
PLAIN: dict[str, Any] = {"model": "bench", "max_tokens": 64, "messages": HI, "extra_body": {"seed": 7}}
client = anthropic.Anthropic(max_retries=0)


def main() -> None:
    """Asks in each way."""
    whole = client.messages.create(**PLAIN, system=SYSTEM, metadata={"user_id": "ann"}, stop_sequences=["###"])
    assert (whole.type, whole.role, whole.stop_reason) == ("message", "assistant", "end_turn")
    assert whole._request_id == whole.id.removeprefix("msg_")
    with client.messages.stream(**PLAIN) as streamed:
        stream = "".join(streamed.text_stream)
        last = streamed.get_final_message()
    assert (last.stop_reason, last.usage.output_tokens) == ("end_turn", whole.usage.output_tokens)
    tools, after = use_tools()
    assert after == whole.content[0].text
    counted = client.messages.count_tokens(model="bench", messages=PLAIN["messages"], tools=TOOLS)
    assert counted.input_tokens > 10
    names = [model.id for model in client.models.list(limit=1)]
    assert "bench" in names
    assert client.models.retrieve("bench").type == "model"
    output = {
        "text": whole.content[0].text,
        "stream": stream,
        "tools": tools,
        "streamed_tools": streamed_tools(),
        "tokens": whole.usage.input_tokens + whole.usage.output_tokens,
        "fault": faults(),
    }
    assert asyncio.run(ask_async()) == output["text"]
    print(json.dumps(output))  # noqa: T201


def use_tools() -> tuple[list[Any], str]:
    """A round of tools and the answer after it, through the SDK's beta route, which adds ?beta=true."""
    asked: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    called = client.beta.messages.create(
        model="bench",
        max_tokens=64,
        messages=asked,
        tools=TOOLS,
        tool_choice={"type": "any", "disable_parallel_tool_use": False},
        betas=["interleaved-thinking-2025-05-14"],
    )
    assert called.stop_reason == "tool_use"
    calls = [block for block in called.content if block.type == "tool_use"]
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}], "is_error": False}
        for call in calls
    ]
    asked += [{"role": "assistant", "content": called.content}, {"role": "user", "content": results}]
    answer = client.beta.messages.create(model="bench", max_tokens=64, messages=asked, tools=TOOLS)
    return [[call.name, call.input] for call in calls], answer.content[0].text


def streamed_tools() -> list[Any]:
    """Calls of tools, put together by the SDK from their fragments."""
    with client.messages.stream(**PLAIN, tools=TOOLS) as streamed:
        message = streamed.get_final_message()
    assert message.stop_reason == "tool_use"
    return [[block.name, block.input] for block in message.content if block.type == "tool_use"]


def faults() -> str:
    """Each error as the SDK's class for it; the words of the engine's own."""
    server_tool = {"type": "web_search_20250305", "name": "web_search"}
    for members, kind in (
        ({"model": "absent"}, anthropic.NotFoundError),
        ({"tools": [server_tool]}, anthropic.BadRequestError),
        ({"messages": []}, anthropic.BadRequestError),
    ):
        error = fault_of(kind, **members)
        assert error.body["type"] == "error"
        assert error.request_id.startswith("req_")
    return str(fault_of(anthropic.BadRequestError, extra_body={"user": "wrong"}))


def fault_of(kind: type[Exception], **members: Any) -> Any:
    """The exception that a request with these members raises."""
    try:
        client.messages.create(**(PLAIN | members))
    except kind as error:
        return error
    raise AssertionError(members)


async def ask_async() -> str:
    """One streamed answer by the asynchronous client, event by event."""
    kinds, text = [], ""
    async with anthropic.AsyncAnthropic(max_retries=0) as asynchronous:
        async for event in await asynchronous.messages.create(**PLAIN, stream=True):
            kinds.append(event.type)
            text += event.delta.text if event.type == "content_block_delta" else ""
    expected = ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    assert [kind for kind in kinds if kind not in ("content_block_delta", "ping")] == expected
    return text


main()

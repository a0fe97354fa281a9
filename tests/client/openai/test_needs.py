"""What requests need of a provider, in each of the dialects."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.openai.needs import derive_needs, round_down, round_up
from tallystick.client.openai.requests import summarise
from tallystick.client.selection.options import demand_for
from tallystick.protocol.criteria import Demand
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tallystick.protocol.wire import dumps

URL = "data:image/png;base64," + "A" * 200_000
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}


def user(*parts: Any) -> dict[str, Any]:
    """A user's message of these parts."""
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("path", "request_members", "features"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "hello"}]}, ()),
        (CHAT, {"tools": [{"type": "function", "function": FUNCTION}]}, ("tools",)),
        (CHAT, {"tools": [], "functions": [FUNCTION]}, ("tools",)),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, ("tools",)),
        (CHAT, {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}]}, ("tools",)),
        (CHAT, {"tools": [], "tool_choice": "none", "functions": None}, ()),
        (CHAT, {"response_format": SCHEMA}, ("json_schema",)),
        (CHAT, {"response_format": {"type": "json_object"}}, ()),
        (CHAT, {"guided_json": {"type": "object"}}, ("json_schema",)),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, ("logprobs",)),
        (CHAT, {"logprobs": False, "top_logprobs": 0}, ()),
        (COMPLETIONS, {"prompt": "x", "logprobs": 0}, ("logprobs",)),
        (COMPLETIONS, {"prompt": "x", "logprobs": None}, ()),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": {"url": URL}})]}, ("vision",)),
        (CHAT, {"messages": [user({"image_url": {"url": URL}})]}, ("vision",)),
        (CHAT, {"messages": [user({"type": "input_audio", "input_audio": {"data": "A", "format": "wav"}})]}, ("audio_input",)),
        (CHAT, {"messages": [user({"type": "video_url", "video_url": {"url": "https://example.org/v"}})]}, ("video",)),
        (CHAT, {"messages": [user({"type": "file", "file": {"file_data": "A"}})]}, ("files",)),
        (CHAT, {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, ("audio_output",)),
        (CHAT, {"modalities": ["text"]}, ()),
        (RESPONSES, {"input": "hello"}, ()),
        (RESPONSES, {"input": "x", "text": {"format": SCHEMA}}, ("json_schema",)),
        (RESPONSES, {"input": "x", "text": {"format": {"type": "text"}}}, ()),
        (RESPONSES, {"input": "x", "tools": [{"type": "function"} | FUNCTION]}, ("tools",)),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, ("tools",)),
        (RESPONSES, {"input": [user({"type": "input_image", "image_url": URL})]}, ("vision",)),
        (RESPONSES, {"input": [user({"type": "input_file", "file_id": "f"})]}, ("files",)),
        (RESPONSES, {"input": "x", "include": ["message.output_text.logprobs"]}, ("logprobs",)),
        (MESSAGES, {"messages": [user({"type": "image", "source": {"type": "base64", "data": URL}})]}, ("vision",)),
        (MESSAGES, {"messages": [user({"type": "document", "source": {"type": "url"}})]}, ("files",)),
        (
            MESSAGES,
            {"messages": [user({"type": "tool_result", "content": [{"type": "image", "source": {}}]})]},
            ("tools", "vision"),
        ),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}]}, ("tools",)),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": {}}}}, ("json_schema",)),
        (EMBEDDINGS, {"input": ["a", "b"]}, ("embeddings",)),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, ()),
        (CHAT, {"messages": "x", "tools": "y", "modalities": 7, "text": 8, "response_format": [], "include": {}}, ()),
    ],
)
def test_features(path: str, request_members: dict[str, Any], features: tuple[str, ...]) -> None:
    """What a body asks for is read from it, wherever its dialect says so; members of other types need nothing."""
    assert derive_needs(path, request_members).features == features


@pytest.mark.parametrize(
    ("path", "members", "least", "most_likely"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "word " * 1_000}]}, 500, 1_250),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 1_600}]}, 100, 400),
        (CHAT, {"messages": [user({"type": "text", "text": "word " * 1_000})] * 2}, 1_000, 2_500),
        (CHAT, {"messages": [{"role": "user", "content": " " * 10_000}]}, 0, 2_500),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": {"url": URL}})]}, 0, 800),
        (CHAT, {"messages": [{"role": "system", "content": "字" * 1_600}]}, 300, 1_200),
        (COMPLETIONS, {"prompt": [7] * 300}, 300, 300),
        (COMPLETIONS, {"prompt": [[7] * 300, [7] * 100]}, 300, 300),
        (COMPLETIONS, {"prompt": ["word " * 100, "word " * 200]}, 100, 250),
        (RESPONSES, {"instructions": "word " * 100, "input": "word " * 100}, 100, 250),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "word " * 100}]}]}, 50, 125),
        (RESPONSES, {"input": "word " * 100, "truncation": "auto"}, 0, 0),
        (RESPONSES, {"input": "word " * 100, "truncation": "disabled"}, 50, 125),
        (MESSAGES, {"system": [{"type": "text", "text": "word " * 100}], "messages": []}, 50, 125),
        (EMBEDDINGS, {"input": ["word " * 100, "word " * 200]}, 100, 250),
        (EMBEDDINGS, {"input": "word " * 100, "truncate_prompt_tokens": 10}, 0, 0),
        ("/v1/audio/speech", {"input": "word " * 100_000}, 0, 0),
        ("/v1/rerank", {"query": "a", "documents": ["word " * 100_000]}, 0, 0),
    ],
)
def test_length(path: str, members: dict[str, Any], least: int, most_likely: int) -> None:
    """Text is measured by its words and bytes, media by their number; each prompt of a list has a context of its own."""
    needs = derive_needs(path, members)
    assert (needs.least_tokens, needs.likely_tokens) == (least, most_likely)


@pytest.mark.parametrize("space", [*(chr(code) for code in range(128) if chr(code).isspace()), "\u3000", "\u00a0", "\u2028"])
def test_words_end_at_every_white_space(space: str) -> None:
    """Where Python ends them, in ASCII and beyond, however many spaces there are and wherever they stand."""
    for text in ("word" + space, space + "word", space + "word" + space * 3 + "word", "word" + space + "\t" + "word" + space):
        prompt = text * 600
        words, size = prompt.split(), len(prompt.encode())
        least = max(len("".join(words)) // 16, len(words) // 2)
        needs = derive_needs(COMPLETIONS, {"prompt": prompt})
        assert (needs.least_tokens, needs.likely_tokens) == (least, max(size // 4, least))


@pytest.mark.parametrize(
    ("tokens", "down", "up"),
    [(0, 0, 0), (1, 0, 256), (256, 256, 256), (257, 256, 320), (8_192, 8_192, 8_192), (9_000, 8_192, 10_240)],
)
def test_sizes_are_rounded(tokens: int, down: int, up: int) -> None:
    """Four steps an octave, so that the requests of one kind share a shortlist."""
    assert (round_down(tokens), round_up(tokens)) == (down, up)


def test_the_demand_of_a_request() -> None:
    """It has what the request needs, and the output that it asks for counts towards the context."""
    body = {"model": "m", "n": 2, "max_tokens": 5_000, "messages": [{"role": "user", "content": "word " * 2_000}], "tools": [{}]}
    demand = demand_for(Demand("m"), summarise(CHAT, dumps(body)))
    assert demand.needs == Requirements(features=("tools",), context_tokens=round_up(2_500 + 5_000))
    assert demand.input_tokens == round_down(1_000)


AUTO = {"tools": [{"type": "function", "function": FUNCTION}]}


@pytest.mark.parametrize(
    ("path", "members", "soft"),
    [
        (CHAT, AUTO, ()),
        (CHAT, AUTO | {"tool_choice": "auto"}, ()),
        (MESSAGES, {"tools": [{"name": "f"}], "tool_choice": {"type": "auto"}}, ()),
        (CHAT, AUTO | {"tool_choice": "required"}, ("tools",)),
        (CHAT, AUTO | {"tool_choice": {"type": "function", "function": {"name": "f"}}}, ("tools",)),
        (MESSAGES, {"tools": [{"name": "f"}], "tool_choice": {"type": "any"}}, ("tools",)),
        (CHAT, AUTO | {"tool_choice": "none"}, ("tools",)),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, ("tools",)),
        (CHAT, {"response_format": SCHEMA}, ()),
        (CHAT, {"guided_json": {}, "json_schema": {"type": "object"}}, ("json_schema",)),
        (CHAT, {"logprobs": True}, ()),
        (COMPLETIONS, {"prompt": "x", "logprobs": 1}, ("logprobs",)),
        (CHAT, {"messages": [user({"type": "image_url", "image_url": {"url": URL}})]}, ()),
    ],
)
def test_what_is_essential(path: str, members: dict[str, Any], soft: tuple[str, ...]) -> None:
    """A declaration speaks for the form of request by which it was found out. For other forms it is only a preference."""
    needs = derive_needs(path, members)
    assert needs.features
    assert set(needs.features) - set(needs.essential) == set(soft)

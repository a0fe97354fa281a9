"""Estimates the input tokens of a request to Anthropic's Messages, for its route that counts them. Pure.

No provider is asked, because that would be a paid job: the count is an estimate from the length of the texts.
"""

from __future__ import annotations

from typing import Any, Final

from tallystick.client.dialects.messages_content import blocks_of
from tallystick.client.openai.needs import LIKELY_BYTES_PER_TOKEN, derive_needs
from tallystick.client.openai.requests import load_body
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.routes import MESSAGES
from tallystick.protocol.wire import dumps

COUNT_TOKENS: Final = f"{MESSAGES}/count_tokens"
"""The route that counts tokens."""
_PER_MESSAGE: Final = 4
"""Tokens that a chat template is likely to add to a message."""


def count_tokens(body: bytes) -> bytes:
    """The answer to a request for a count. Raises BadMessage for a body without a model or messages."""
    request = load_body(body)
    if not isinstance(request, dict):
        raise BadMessage("request body: expected a JSON object")
    if not isinstance(request.get("model"), str):
        raise BadMessage("model: expected the name of a model")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadMessage("messages: expected at least one message")
    likely = derive_needs(MESSAGES, request).likely_tokens + _PER_MESSAGE * len(messages) + _tool_inputs(messages)
    return dumps({"input_tokens": likely})


def _tool_inputs(messages: list[Any]) -> int:
    """Tokens that the inputs of earlier calls of tools are likely to be."""
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    blocks = (block for content in contents for _, block in blocks_of(content, "messages"))
    size = sum(len(dump_lenient(block.get("input"))) for block in blocks if block.get("type") == "tool_use")
    return size // LIKELY_BYTES_PER_TOKEN

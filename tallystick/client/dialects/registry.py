"""The dialects that the gateway translates, by route, and the form of errors in each API. Pure."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Final

from tallystick.client.dialects.dialect import Dialect, ErrorFormat, OpenAiErrors
from tallystick.client.dialects.messages import MessagesDialect
from tallystick.client.dialects.responses import ResponsesDialect
from tallystick.protocol.routes import MESSAGES, RESPONSES

DIALECTS: Final[Mapping[str, Dialect]] = {MESSAGES: MessagesDialect(), RESPONSES: ResponsesDialect()}
"""Each translated route and its dialect."""
VERSION_HEADER: Final = "anthropic-version"
"""A header that every client of Anthropic's API sends, and no other."""


def errors_of(path: str, headers: Container[str]) -> ErrorFormat:
    """The form in which a client reads errors: by the route, else by the headers that it sent."""
    if path == MESSAGES or path.startswith(f"{MESSAGES}/") or VERSION_HEADER in headers:
        return DIALECTS[MESSAGES]
    return DIALECTS.get(path) or OpenAiErrors(path)

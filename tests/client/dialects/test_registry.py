"""The form of errors is that of the caller's API."""

from __future__ import annotations

import json

import pytest

from tallystick.client.dialects.registry import errors_of
from tallystick.protocol.errors import BadMessage


@pytest.mark.parametrize(
    ("path", "headers", "anthropic"),
    [
        ("/v1/messages", {}, True),
        ("/v1/messages/count_tokens", {}, True),
        ("/v1/messages/batches", {}, True),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, True),
        ("/v1/models", {}, False),
        ("/v1/messagesx", {}, False),
        ("/v1/chat/completions", {}, False),
        ("/v1/responses", {}, False),
    ],
)
def test_the_form_of_errors(path: str, headers: dict[str, str], anthropic: bool) -> None:
    """By route, else by the header that only Anthropic's clients send."""
    form = errors_of(path, headers)
    document = json.loads(form.render_error(BadMessage("x"), request_id="r").body)
    assert (document.get("type") == "error", form.id_header) == (anthropic, "request-id" if anthropic else "x-request-id")

"""Errors for people: an ASGI middleware that answers a browser's navigation with a page where programs get JSON or plain text.

The status stays, and so do the headers that say when to come again. Whoever does not ask for text/html gets the answer unchanged.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.web.rendering import Pages

MAX_SHOWN = 2_000
"""Characters of an error that a page shows."""
_MAX_BODY = 1 << 16
_OF_FORMS = frozenset({"GET", "POST"})
"""Methods of a browser's navigation."""
_REPLACED = frozenset({"application/json", "text/plain"})
_OF_BODY = frozenset({b"content-type", b"content-length", b"content-encoding"})
TITLES = {
    401: "Log in first",
    403: "Not allowed",
    404: "Not found",
    405: "Not a page",
    429: "Too many requests",
    503: "Not available now",
}
_ADVICE = {
    401: "The pages below ask for what is needed. Programs send a key with each request.",
    404: "The address may be mistyped, or for programs that send more than an address.",
    405: "Programs send another kind of request to this address.",
    429: "Wait a moment, then load the page again.",
    503: "Load the page again in a moment. If it stays so, the first page below says what is wrong.",
}


class ErrorPages:
    """Wraps the app of a daemon whose pages are `pages`."""

    def __init__(self, app: ASGIApp, pages: Pages) -> None:
        self._app, self._pages = app, pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "http" and scope["method"] in _OF_FORMS and _is_navigation(Headers(scope=scope)):
            send = _PageSend(send, self._pages)
        await self._app(scope, receive, send)


def _is_navigation(headers: Headers) -> bool:
    """Whether a request may be a browser's navigation. No form sends JSON, but Java's programs accept text/html by default."""
    return "text/html" in headers.get("accept", "") and "json" not in headers.get("content-type", "").lower()


class _PageSend:
    """An ASGI `send` that holds an error back until it is whole, and sends a page instead."""

    def __init__(self, send: Send, pages: Pages) -> None:
        self._send, self._pages = send, pages
        self._held: Message | None = None
        self._body = b""

    async def __call__(self, event: Message) -> None:
        if event["type"] == "http.response.start" and _is_replaced(event):
            self._held = event
        elif self._held is None:
            await self._send(event)
        else:
            self._body = (self._body + event.get("body", b""))[:_MAX_BODY]
            if not event.get("more_body"):
                await self._send_page(self._held)

    async def _send_page(self, start: Message) -> None:
        status = start["status"]
        page = self._pages.render(
            "error.html",
            status,
            section="",
            title=TITLES.get(status, "That did not work"),
            problem=_message(self._body)[:MAX_SHOWN],
            advice=_ADVICE.get(status, ""),
        )
        headers = MutableHeaders(raw=[pair for pair in start["headers"] if pair[0].lower() not in _OF_BODY])
        headers.update(page.headers)
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": page.body})


def _is_replaced(start: Message) -> bool:
    kind = MutableHeaders(raw=list(start.get("headers", ()))).get("content-type", "").partition(";")[0].strip().lower()
    return start["status"] >= 400 and kind in _REPLACED


def _message(body: bytes) -> str:
    """What an error says: the message in OpenAI's, Anthropic's or this project's form, or plain text."""
    text = body.decode(errors="replace")
    try:
        document: Any = json.loads(text)
    except ValueError:
        return text
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else text

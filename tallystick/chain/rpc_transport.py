"""One HTTP exchange with a JSON-RPC endpoint: bounded in time and size, and with messages that never show the URL's API key."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from html import unescape
from typing import Any

import orjson
from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout

from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.proxies import uses_proxy
from tallystick.protocol.public_url import public_url, without_secrets

MAX_RESPONSE_BYTES = 64 * 1024 * 1024

_JSON = {"content-type": "application/json"}
_BUSY = (408, 425, 429)
_EXCERPT = 120
_TITLE = re.compile(r"<title[^>]*>([^<]{1,200})", re.IGNORECASE)
_HTML = re.compile(r"\s*(?:<!doctype html|<html|<head|<body)", re.IGNORECASE)


class RequestFailed(Unavailable):
    """One HTTP exchange failed. `pause` is the endpoint's Retry-After in seconds; `http_status` is None if nothing came."""

    def __init__(self, message: str, *, http_status: int | None = None, pause: float = 0.0) -> None:
        super().__init__(Code.CHAIN_UNAVAILABLE, message)
        self.http_status, self.pause = http_status, pause


@dataclass(frozen=True, slots=True)
class RpcResponse:
    """A response that may be passed to a caller. `document` is its JSON. `pause` is its Retry-After in seconds."""

    document: Any
    status: int = 200
    pause: float = 0.0


class RpcTransport:
    """Posts JSON to one URL. `timeout` is seconds for one exchange. `shown_url` has no API key."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.shown_url = url, public_url(url)
        self._timeout = ClientTimeout(timeout)
        self._session: ClientSession | None = None

    async def post(self, body: Any, name: str) -> RpcResponse:
        """Posts a request. A JSON-RPC error in the body takes precedence over the HTTP status, which becomes one without it.

        `name` is the request in messages. Raises RequestFailed if there is no usable response and a retry may help.
        """
        if self._session is None:
            self._session = ClientSession(timeout=self._timeout, trust_env=uses_proxy(self.url))
        try:
            async with self._session.post(self.url, data=orjson.dumps(body), headers=_JSON) as response:
                raw = await _read(response)
        except (ClientError, TimeoutError, OSError, ValueError) as error:
            reason = without_secrets(str(error), self.url) or type(error).__name__
            raise RequestFailed(
                f"the chain at {self.shown_url} does not answer {name}: {reason}; "
                "start its node, or correct the JSON-RPC URL (rpc)"
            ) from None
        return self._response(response, raw, name)

    def _response(self, response: ClientResponse, raw: bytes, name: str) -> RpcResponse:
        status, pause = response.status, retry_after(response.headers.get("retry-after"), response.headers.get("date"))
        document = _decode(raw)
        if isinstance(document, list) and document and status < 500:
            return RpcResponse(document, status, pause)
        if isinstance(document, dict) and isinstance(document.get("error"), dict):
            return RpcResponse(document, status, pause)
        if document is not None and status == 200:
            return RpcResponse(document, status, pause)
        excerpt = without_secrets(_excerpt(raw), self.url)
        if status >= 300 and status not in _BUSY and status < 500:
            text = f"HTTP {status} {response.reason}" + (f": {excerpt}" if excerpt else "")
            return RpcResponse({"error": {"code": status, "message": text}}, status, pause)
        reason = f"HTTP {status} {response.reason}" if status >= 300 else "something that is not JSON"
        remedy = "" if status >= 300 else "; check the JSON-RPC URL (rpc) and its API key"
        details = f" ({excerpt})" if excerpt else ""
        raise RequestFailed(
            f"the chain at {self.shown_url} answered {name} with {reason}{details}{remedy}", http_status=status, pause=pause
        )

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()


async def _read(response: ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > MAX_RESPONSE_BYTES:
            raise ValueError(f"more than {MAX_RESPONSE_BYTES} bytes")
    return bytes(raw)


def _decode(raw: bytes) -> Any:
    try:
        return orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:
        return None


def _excerpt(raw: bytes) -> str:
    """What a body that is not JSON says, in a few words: the title of a web page, or the beginning of a text."""
    text = raw[:4_000].decode(errors="replace")
    title = _TITLE.search(text)
    if title:
        return f"a web page titled {' '.join(unescape(title[1]).split())[:_EXCERPT]!r}"
    if _HTML.match(text):
        return "a web page"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_EXCERPT]


def retry_after(raw: str | None, date: str | None = None) -> float:
    """Seconds that a Retry-After header asks to wait: a number or an HTTP date (RFC 9110, 10.2.3). 0 if absent or malformed.

    `date` is the Date header of the same response, whose clock counts; without it this machine's clock does.
    """
    if raw is None:
        return 0.0
    if re.fullmatch(r"\s*\d{1,9}(?:\.\d{1,9})?\s*", raw, re.ASCII):
        return float(raw)
    until = _moment(raw)
    if until is None:
        return 0.0
    now = _moment(date) if date else None
    return max(0.0, until - (time.time() if now is None else now))


def _moment(raw: str) -> float | None:
    try:
        at: datetime = parsedate_to_datetime(raw)
    except (ValueError, TypeError):
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()

"""The engine's own words about a failure, made fit for the client: bounded, printable, and without what is the provider's secret.

They may quote the request, so they travel sealed only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from node.engines.api_key import ApiKey, Key
from tallystick.protocol.lenient_json import dump_lenient, load_lenient

MAX_WORDS: Final = 1_000
"""Characters of an engine's words that reach the client."""
REDACTED: Final = "[redacted]"
_MAX_DEPTH = 8
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_TAGS = re.compile(r"<(script|style|head)\b.*?</\1\s*>|<[^<>]{0,500}>", re.IGNORECASE | re.DOTALL)
_BLANKS = re.compile(r"\s+")
_SECRETS = re.compile(
    r"\b(sk|pk|rk|hf|gsk|xai|nvapi|r8|fw|key)[-_][A-Za-z0-9_*.-]{8,}|\bAIza[A-Za-z0-9_-]{20,}|\beyJ[A-Za-z0-9_-]{20,}[A-Za-z0-9_.-]*|"
    r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=*-]{8,}|(?<=api[_-]key[=:])\S+|"
    r"https?://(localhost|[^\s/:@]+@|\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\]|[a-z0-9-]+(?=[:/\s]|$)|[a-z0-9.-]+\.(internal|local|lan))\S*|"
    r"\b\d{1,3}(\.\d{1,3}){3}(:\d{1,5})?\b|\blocalhost:\d{1,5}\b|"
    r"(?<![\w/])/(home|root|users|mnt|var|opt|srv|usr|tmp|data|workspace|app|models?|etc)/[^\s'\"`,;:)\]]+|\b[a-z]:\\[^\s'\"]+",
    re.IGNORECASE,
)
"""Keys, private addresses and paths of the provider's machine."""
_TYPES = frozenset(
    f"{kind}/{name}"
    for kind, names in {
        "text": ("html", "plain", "event-stream", "xml", "csv", "markdown"),
        "application": ("json", "xml", "octet-stream", "x-ndjson", "jsonl", "problem+json", "x-www-form-urlencoded", "pdf"),
        "audio": ("mpeg", "wav", "ogg", "flac"),
        "image": ("png", "jpeg", "webp"),
    }.items()
    for name in names
)
"""Content types that are named in logs and errors. Others are the engine's own text, which may quote the request."""
_MESSAGES = ("message", "detail", "error_message", "msg", "error_msg", "errorMessage", "title", "errors", "error", "reason")


def describe_type(content_type: str) -> str:
    """A content type for a message that anybody may read: its name if it is a common one."""
    kind = content_type.partition(";")[0].strip().lower()
    return f"the content type {kind!r}" if kind in _TYPES else "an unknown content type" if kind else "no content type"


@dataclass(frozen=True, slots=True)
class Censor:
    """Removes control characters and the provider's secrets from texts. `secrets`: texts that never leave."""

    secrets: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: str, api_key: Key) -> Censor:
        """For an engine at a base URL, whose host and API key are secrets."""
        parts = urlsplit(url)
        secret = api_key.value if isinstance(api_key, ApiKey) else api_key
        named = (url, parts.netloc, parts.hostname or "", secret or "")
        return cls(tuple(sorted({text for text in named if len(text) > 2}, key=len, reverse=True)))

    def clean(self, text: str, limit: int = MAX_WORDS) -> str:
        """The text without secrets and control characters, and at most `limit` characters of it."""
        cleaned = _CONTROL.sub("", text[: 8 * limit])
        for secret in self.secrets:
            cleaned = re.sub(re.escape(secret), REDACTED, cleaned, flags=re.IGNORECASE)
        cleaned = _SECRETS.sub(REDACTED, cleaned)
        return cleaned if len(cleaned) <= limit else cleaned[: limit - 1] + "…"

    def clean_document(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        """A JSON value with all of its texts cleaned."""
        if isinstance(value, str):
            return self.clean(value)
        if depth and isinstance(value, dict):
            return {self.clean(name): self.clean_document(inner, depth - 1) for name, inner in value.items()}
        if depth and isinstance(value, list):
            return [self.clean_document(inner, depth - 1) for inner in value]
        return None if isinstance(value, list | dict) else value


def read_document(body: bytes) -> dict[str, Any]:
    """An error's body as a JSON object. Other bodies (plain text, a web page) become one with their text as its message."""
    try:
        document = load_lenient(body)
    except ValueError:
        document = body.decode(errors="replace")
    if isinstance(document, dict):
        return document
    if isinstance(document, list) and document and isinstance(document[0], dict):
        return dict(document[0])  # Gemini's API
    text = document if isinstance(document, str) else ""
    return {"message": _BLANKS.sub(" ", _TAGS.sub(" ", text)).strip()}


def words_of(document: Mapping[str, Any], censor: Censor) -> str:
    """What an error says to a person; empty if it says nothing."""
    return _BLANKS.sub(" ", censor.clean(_message_in(document, _MAX_DEPTH))).strip()


def _message_in(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return value
    if depth and isinstance(value, list):
        return "; ".join(filter(None, (_message_in(entry, depth - 1) for entry in value[:5])))
    if not depth or not isinstance(value, Mapping):
        return ""
    inner = value.get("error")
    if isinstance(inner, Mapping):
        return _message_in(inner, depth - 1) or _message_in({**value, "error": None}, depth - 1)
    message = next((text for name in _MESSAGES if (text := _message_in(value.get(name), depth - 1))), "")
    place = value.get("loc")  # FastAPI's
    return ".".join(map(str, place)) + ": " + message if message and isinstance(place, list) else message


def error_body(document: Mapping[str, Any], status: int, censor: Censor, original: bytes) -> bytes:
    """The body of an engine's own error for the client: the engine's members, and OpenAI's `error` object if it has none.

    The original bytes are kept if nothing has to be changed. Source: OpenAI's API reference, "Error codes".
    """
    cleaned = censor.clean_document(dict(document))
    error = cleaned.get("error")
    if isinstance(error, dict) and isinstance(error.get("message"), str) and error["message"]:
        return original if cleaned == document and original else dump_lenient(cleaned)
    message = words_of(document, censor) or f"the engine refused the request with the status {status}, without a reason"
    code = next((cleaned[name] for name in ("code", "error_code", "error_type") if isinstance(cleaned.get(name), str)), None)
    shown = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return dump_lenient({**cleaned, "error": shown})

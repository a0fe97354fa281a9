"""A client's request as the engine gets it. Pure.

Every field passes through untouched, except those that the order bounds: the model's name, the output limit, and on streams
`stream_options.include_usage`, which is asked for so that the receipt can rest on the engine's own count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from node.offers import Offer
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.wire import RequestHead, dumps, loads

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
EMBEDDINGS: Final = "/v1/embeddings"
ROUTES = frozenset({CHAT, COMPLETIONS, EMBEDDINGS})
_MAX_CHOICES = 1_024


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an engine. `rename` maps the engine's name of the model, in the answer, back to the one sold."""

    path: str
    body: bytes
    stream: bool
    strip_usage: bool
    rename: tuple[str, str] | None


def prepare(head: RequestHead, body: bytes, offer: Offer, max_output_tokens: int) -> Call:
    """The call for a request on this offer. Raises Refusal (unknown_route) or BadMessage.

    Error texts say nothing of the body, since they travel unsealed.
    """
    if head.path not in ROUTES:
        raise Refusal(Code.UNKNOWN_ROUTE, f"this provider serves {', '.join(sorted(ROUTES))}")
    if head.content_type.partition(";")[0].strip().lower() != "application/json":
        raise BadMessage("request.contentType: expected application/json")
    fields = loads(body, "request body")
    if not isinstance(fields, dict):
        raise BadMessage("request body: expected a JSON object")
    stream = fields.get("stream", False)
    if not isinstance(stream, bool | None) or (stream and head.path == EMBEDDINGS):
        raise BadMessage("request body: stream: expected true or false, and never true for embeddings")
    fields["model"] = offer.upstream
    if head.path != EMBEDDINGS:
        _limit_output(fields, head.path, offer, max_output_tokens)
    strip = _ask_usage(fields) if stream and offer.usage_option else False
    rename = None if offer.upstream == offer.model else (offer.upstream, offer.model)
    return Call(head.path, dumps(fields), bool(stream), strip, rename)


def _limit_output(fields: dict[str, Any], path: str, offer: Offer, limit: int) -> None:
    """Bounds the output of all choices together to `limit` tokens."""
    choices = max(_count(fields, "n") or 1, _count(fields, "best_of") or 1) * _prompts(fields, path)
    if choices > _MAX_CHOICES or limit < choices:
        raise BadMessage(f"request body: {choices} choices do not fit the ordered {limit} output tokens")
    each = limit // choices
    names = ("max_tokens", "max_completion_tokens") if path == CHAT else ("max_tokens",)
    given = [name for name in names if _count(fields, name) is not None]
    for name in given:
        fields[name] = min(fields[name], each)
    if not given:
        fields[offer.limit_field if path == CHAT else "max_tokens"] = each


def _prompts(fields: dict[str, Any], path: str) -> int:
    """How many prompts a completion request holds: a list of texts or of token lists is several."""
    prompt = fields.get("prompt")
    several = path == COMPLETIONS and isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    return len(prompt) if several and isinstance(prompt, list) else 1


def _count(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadMessage(f"request body: {name}: expected a whole number")
    return value


def _ask_usage(fields: dict[str, Any]) -> bool:
    """Asks for usage on a stream. True if the client did not, so that the extra event is to be stripped."""
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadMessage("request body: stream_options: expected an object")
    asked = bool((options or {}).get("include_usage"))
    fields["stream_options"] = {**(options or {}), "include_usage": True}
    return not asked

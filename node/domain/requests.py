"""A client's request as the engine gets it. Pure.

Every field passes through untouched, except those that the order bounds: the model's name, the output limit where the route has
one, and on streams `stream_options.include_usage`, which is asked for so that the receipt can rest on the engine's own count.
Of a form (audio, image edits) only the model's name is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from node.domain.offers import Offer
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.routes import ALWAYS, CHAT, COMPLETIONS, EMBEDDINGS, FORM, JSON, RESPONSES, declared, media_type, serves
from tallystick.protocol.wire import RequestHead, dumps, loads
from tallystick.runtime.multipart import replace_field

_MAX_CHOICES = 1_024


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an engine. `rename` maps the engine's name of the model, in the answer, back to the one sold.

    `heard` is called as soon as the engine has the whole request, which may be long before it says anything.
    """

    path: str
    body: bytes
    stream: bool
    strip_usage: bool
    rename: tuple[str, str] | None
    content_type: str = JSON
    heard: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def completes(self) -> bool:
        """Whether the answer is a completion: choices of generated text, and a known end of a stream."""
        return self.path in (CHAT, COMPLETIONS)


def prepare(head: RequestHead, body: bytes, offer: Offer, max_output_tokens: int) -> Call:
    """The call for a request on this offer. Raises Refusal (unknown_route) or BadMessage.

    Error texts say nothing of the body, since they travel unsealed.
    """
    if not serves(offer.spec.features, head.path):
        served = ", ".join((*ALWAYS, *declared(offer.spec.features)))
        raise Refusal(Code.UNKNOWN_ROUTE, f"this provider's {offer.model!r} serves {served}")
    rename = None if offer.upstream == offer.model else (offer.upstream, offer.model)
    kind = media_type(head.content_type)
    if kind == FORM and head.path not in ALWAYS:
        form = replace_field(head.content_type, body, "model", offer.upstream)
        return Call(head.path, form, stream=False, strip_usage=False, rename=rename, content_type=head.content_type)
    if kind != JSON:
        raise BadMessage(f"request.contentType: expected {JSON}")
    fields = loads(body, "request body")
    if not isinstance(fields, dict):
        raise BadMessage("request body: expected a JSON object")
    stream = fields.get("stream", False)
    if not isinstance(stream, bool | None) or (stream and head.path == EMBEDDINGS):
        raise BadMessage("request body: stream: expected true or false, and never true for embeddings")
    fields["model"] = offer.upstream
    if head.path in (CHAT, COMPLETIONS):
        _limit_output(fields, head.path, offer, max_output_tokens)
    elif head.path == RESPONSES:
        given = _count(fields, "max_output_tokens")
        fields["max_output_tokens"] = max_output_tokens if given is None else min(given, max_output_tokens)
        fields.setdefault("stream", False)  # some engines stream unless told not to
    asks_usage = stream and offer.usage_option and head.path in (CHAT, COMPLETIONS)
    strip = _ask_usage(fields) if asks_usage else False
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

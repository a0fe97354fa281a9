"""Turns a client's request into the request that the engine gets. Pure.

Every member passes through untouched, except those that the order bounds: the model's name and, on routes that have one, the
output limit. Streams also get `stream_options.include_usage`, because the receipt should rest on the engine's own token count.
Engines that can are also asked for log-probabilities (`node.domain.logprob_request`).
In a form (audio, image edits) only the model's name changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from node.domain.answer_rows import AnswerRows
from node.domain.engine_quirks import adapt
from node.domain.logprob_request import LogprobRequest, add_logprobs
from node.domain.published_asks import Offer
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.openai_wire import OUTPUT_LIMITS, bounds_input, count_choices, read_count, read_output_limit
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import (
    ALWAYS,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    FORM,
    JSON,
    MESSAGES,
    RESPONSES,
    SCORES,
    media_type,
    serves,
    sold_routes,
)
from tallystick.protocol.token_scores import ScoreRequest
from tallystick.runtime.multipart import replace_field

MIN_BYTES_PER_TOKEN = 2.5
"""Bytes of a request's JSON for each of its input tokens, at least: text in most languages has three or more."""
USUAL_BYTES_PER_TOKEN = 4
USUAL_OUTPUT_TOKENS = 4_096
"""Output tokens that clients order for a request that sets no limit. An order of less is a limit that its client chose."""
ENDLESS_ENGINES = frozenset({"llama.cpp", "ollama", "lm-studio"})
"""Engines that complete a prompt up to the end of their context if no limit is set. OpenAI and vLLM then stop after 16 tokens."""
_SHAPING = ("tools", "functions", "response_format", "grammar", "json_schema", "structured_outputs")
"""Members with which an engine may refuse log-probabilities that it gives otherwise."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One request to an engine.

    `bounded`: whether the bytes of the request bound its input tokens. `strip_usage`: the client did not ask for the usage event,
    so the answer loses it. `rename`: the engine's name of the model and the name that the client bought, which replaces it in the
    answer. `cut_after`: output tokens after which the node ends the stream of an engine that got no limit, since the order pays
    for no more. `on_sent` is called once the engine has the whole request, which may be long before its first byte of the answer.
    `logprobs`: the request for log-probabilities, whose answers are added to `rows`; None if there is none. `shape`: requests of
    the same shape are refused alike.
    """

    path: str
    body: bytes
    stream: bool
    strip_usage: bool
    rename: tuple[str, str] | None
    content_type: str = JSON
    bounded: bool = True
    cut_after: int | None = None
    on_sent: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    logprobs: LogprobRequest | None = None
    rows: AnswerRows = field(default_factory=AnswerRows, repr=False, compare=False)
    shape: tuple[object, ...] = ()
    traceparent: str = ""

    def without_logprobs(self) -> EngineRequest:
        """The same request without what was added for log-probabilities, which gives no rows."""
        if self.logprobs is None:
            return self
        plain = self.body[: self.logprobs.shared] + self.logprobs.plain_end if self.logprobs.adds else self.body
        return replace(self, body=plain, logprobs=None)

    @property
    def is_completion(self) -> bool:
        """Whether the answer is a completion: choices of generated text, and a known end of a stream."""
        return self.path in (CHAT, COMPLETIONS)


def prepare(head: RequestHead, body: bytes, offer: Offer, max_output_tokens: int) -> EngineRequest:
    """Builds the engine's request for a client's request on this offer, within `max_output_tokens` for all choices together.

    Raises Refusal (unknown_route) or BadMessage. Their texts quote nothing of the body, because they travel unsealed.
    """
    if not serves(offer.spec.features, head.path):
        served = ", ".join(sold_routes(offer.spec.features))
        raise Refusal(Code.UNKNOWN_ROUTE, f"path: expected a route that this provider serves for {offer.model!r}: {served}")
    rename = _rename(offer)
    kind = media_type(head.content_type)
    if kind == FORM and head.path not in ALWAYS:
        form = replace_field(head.content_type, body, "model", offer.upstream)
        return EngineRequest(
            head.path, form, stream=False, strip_usage=False, rename=rename, content_type=head.content_type, bounded=False
        )
    if kind != JSON:
        raise BadMessage(f"request.contentType: expected {JSON} for this route")
    members = _load(body)
    stream = members.get("stream", False)
    if not isinstance(stream, bool | None) or (stream and head.path == EMBEDDINGS):
        raise BadMessage("request body: stream: expected true or false, and never true for embeddings")
    members["model"] = offer.upstream
    if head.path in (CHAT, COMPLETIONS):
        return _prepare_completion(head.path, members, offer, max_output_tokens, len(body))
    cut_after = None
    if head.path == RESPONSES:
        requested = _take_limit(members, "max_output_tokens")
        if requested is not None or _needs_limit(head.path, len(body), max_output_tokens, 1, offer):
            members["max_output_tokens"] = max_output_tokens if requested is None else min(requested, max_output_tokens)
        else:
            cut_after = max_output_tokens
        members.setdefault("stream", False)  # some engines stream by default
        adapt(head.path, members, offer.spec.engine)
    elif head.path == MESSAGES:
        requested = _take_limit(members, "max_tokens")
        members["max_tokens"] = max_output_tokens if requested is None else min(requested, max_output_tokens)
    elif head.path == SCORES:
        members = ScoreRequest.from_json(members).to_json()
    bounded = bounds_input(head.path, members)
    return EngineRequest(
        head.path, dump_lenient(members), bool(stream), strip_usage=False, rename=rename, bounded=bounded, cut_after=cut_after
    )


def _rename(offer: Offer) -> tuple[str, str] | None:
    return None if offer.upstream == offer.model else (offer.upstream, offer.model)


def _prepare_completion(path: str, members: dict[str, Any], offer: Offer, limit: int, body_bytes: int) -> EngineRequest:
    """The request for a chat or a completion. Raises BadMessage."""
    stream = bool(members.get("stream"))
    is_limited = _limit_choices(members, path, offer, limit, body_bytes)
    strip_usage = _ask_usage(members, offer) if stream else False
    bounded = bounds_input(path, members)
    shape = (path, stream, offer.upstream, *(bool(members.get(name)) for name in _SHAPING))
    body, logprobs = add_logprobs(path, members, offer.evidence, stream=stream)
    return EngineRequest(
        path,
        body,
        stream,
        strip_usage,
        _rename(offer),
        bounded=bounded,
        cut_after=None if is_limited else limit,
        logprobs=logprobs,
        shape=shape,
    )


def _load(body: bytes) -> dict[str, Any]:
    """The request's JSON, with integers of any size (a seed) unchanged. Raises BadMessage, which quotes nothing of it."""
    try:
        members = load_lenient(body)
    except ValueError:
        raise BadMessage("request body: not JSON") from None
    if not isinstance(members, dict):
        raise BadMessage("request body: expected a JSON object")
    return members


def _limit_choices(members: dict[str, Any], path: str, offer: Offer, limit: int, body_bytes: int) -> bool:
    """Bounds the output of all choices together to `limit` tokens. Returns whether the engine gets a limit.

    A request may ask for no output at all (`max_tokens` 0, to score a prompt with `echo`).
    """
    choices = count_choices(path, members)
    limit_per_choice = limit // choices
    named = [name for name in OUTPUT_LIMITS[path] if members.get(name) is not None]
    limits = {name: value for name in named if (value := _take_limit(members, name)) is not None}
    if not limit_per_choice and (not limits or any(limits.values())):
        raise BadMessage(f"request body: {choices} choices do not fit the ordered {limit} output tokens")
    members |= {name: min(value, limit_per_choice) for name, value in limits.items()}
    members |= {name: read_count(members, name) for name in ("n", "best_of") if name in members}
    usual_field = offer.output_limit_field if path == CHAT else "max_tokens"
    is_limited = bool(limits)
    if not limits and _needs_limit(path, body_bytes, limit, choices, offer, is_unlimited=bool(named)):
        members[usual_field], is_limited = limit_per_choice, True
    if limits.keys() == {"n_predict"}:  # only llama.cpp reads it
        members[usual_field] = members["n_predict"]
    if usual_field != "max_tokens" and path == CHAT:  # an engine with the newer field refuses the older
        older = members.pop("max_tokens", None)
        if members.get(usual_field) is None and older is not None:
            members[usual_field] = older
    return is_limited


def _take_limit(members: dict[str, Any], name: str) -> int | None:
    """The value of a limit of output tokens. A member that sets none is removed, because many engines refuse -1."""
    limit = read_output_limit(members, name)
    if limit is None:
        members.pop(name, None)
    return limit


def _needs_limit(path: str, body_bytes: int, limit: int, choices: int, offer: Offer, *, is_unlimited: bool = False) -> bool:
    """Whether the engine gets the ordered limit for a request that sets none. `is_unlimited`: whether it says so itself.

    Not if the prompt may leave less room: engines refuse a limit beyond their context, and stop at its end by themselves. Nor for
    a completion that says nothing, whose short default is the engine's own. An order of less than usual is always a limit.
    """
    if limit < min(offer.max_output_tokens, USUAL_OUTPUT_TOKENS):
        return True
    if path == COMPLETIONS and not is_unlimited:
        return offer.spec.engine in ENDLESS_ENGINES
    bytes_per_token = MIN_BYTES_PER_TOKEN if limit >= offer.max_output_tokens else USUAL_BYTES_PER_TOKEN
    return body_bytes / bytes_per_token + limit // choices <= offer.context_tokens


def _ask_usage(members: dict[str, Any], offer: Offer) -> bool:
    """Asks for the usage event on a stream. Returns whether the client did not ask for it, so that it must be stripped.

    An engine without the option refuses it, so that it is removed if the client sent it.
    """
    if not offer.supports_stream_usage:
        members.pop("stream_options", None)
        return False
    options = members.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadMessage("request body: stream_options: expected an object")
    client_asked = bool((options or {}).get("include_usage"))
    members["stream_options"] = {**(options or {}), "include_usage": True}
    return not client_asked

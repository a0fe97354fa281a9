"""A request as an upstream gets it: the caller's JSON with the upstream's name of the model. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tallystick.client.openai.requests import RequestSummary, summarise
from tallystick.client.upstream_settings import Upstream, UpstreamModel, UpstreamTarget
from tallystick.client.upstreams.metering import most_cost
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.lenient_json import dump_lenient, load_lenient
from tallystick.protocol.routes import CHAT, COMPLETIONS
from tallystick.protocol.types import Amount, format_amount

_VERSION = "/v1"


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """One request to an upstream. `strip_usage`: its stream reports usage that the caller did not ask for.

    `most`: base units that it may cost; None if its model has no prices.
    """

    upstream: Upstream
    target: UpstreamTarget
    path: str
    body: bytes = field(repr=False)
    summary: RequestSummary
    strip_usage: bool
    most: Amount | None

    @property
    def model(self) -> UpstreamModel:
        """What the config says of its model."""
        return self.upstream.model(self.target.model)

    @classmethod
    def of(cls, upstream: Upstream, target: UpstreamTarget, path: str, body: bytes, max_cost: Amount | None) -> UpstreamRequest:
        """Prepares a JSON request to a route. Raises BadMessage, and Refusal if it may cost more than `max_cost` base units."""
        members = _load(body)
        summary = summarise(path, dump_lenient(members | {"model": target.model}))
        members["model"] = target.model
        strip_usage = summary.stream and upstream.supports_stream_usage and path in (CHAT, COMPLETIONS) and _ask_usage(members)
        rewritten = dump_lenient(members)
        most = most_cost(upstream.model(target.model), summary, len(rewritten))
        if max_cost is not None and (most is None or most > max_cost):
            price = (
                "an unknown amount (its model has no prices in [[upstreams.models]])"
                if most is None
                else f"{format_amount(most)} dollars"
            )
            text = f"max_cost: expected at least what the request may cost at {target}, {price}, got {format_amount(max_cost)}"
            raise Refusal(Code.COST_ABOVE_CAP, text)
        return cls(upstream, target, path, rewritten, summary, strip_usage, most)

    @property
    def url(self) -> str:
        """The address of the route. A base URL without a path stands for one that ends in /v1, as with OpenAI's SDKs' own."""
        base = self.upstream.url.rstrip("/")
        return base + (self.path if not urlsplit(base).path else self.path.removeprefix(_VERSION))


def _load(body: bytes) -> dict[str, Any]:
    try:
        members = load_lenient(body)
    except ValueError:
        raise BadMessage("request body: not JSON") from None
    if not isinstance(members, dict):
        raise BadMessage("request body: expected a JSON object")
    return members


def _ask_usage(members: dict[str, Any]) -> bool:
    """Asks for the usage event of a stream. Returns whether the caller had not."""
    options = members.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        return False
    members["stream_options"] = (options if isinstance(options, dict) else {}) | {"include_usage": True}
    return True

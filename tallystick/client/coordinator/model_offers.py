"""The models on offer, as a coordinator lists them. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_items, read_text

MAX_NUMBER = (1 << 64) - 1
MAX_NAMES = 64
"""Routes, and features, of one model."""


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """A model on offer: number of providers and of free ones, and the lowest prices (base units per 1,000,000 tokens)."""

    id: str
    providers: int
    live: int
    input_price: int
    cached_input_price: int
    output_price: int
    context_tokens: int
    max_output_tokens: int
    tokens_per_second: int = 0
    first_token_ms: int = 0
    """The best value that its providers measured; 0 if none has measured one."""
    routes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    """What at least one of its providers sells and declares."""
    waiting: int = 0
    """Jobs that wait for a free slot of any of its providers."""
    integrity: float | None = None
    """The highest integrity of its providers, in percent; None from a coordinator that counts no audits."""
    audits: int = 0
    availability: int | None = None
    """The share of good jobs of its most available provider, in percent; None if the coordinator does not tell."""

    @classmethod
    def from_json(cls, raw: object) -> ModelOffer:
        """Reads an entry of GET /v1/models. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage("models: expected an object with an id")
        providers, live, input_price, cached_price, output_price, context, output = (
            _number(raw.get(name), f"models.{name}") for name in _MODEL_NUMBERS
        )
        speed, first_token = (_number(raw.get(name, 0), f"models.{name}") for name in _MODEL_SPEEDS)
        routes, features = (_names(raw.get(name, []), f"models.{name}") for name in _MODEL_NAMES)
        model = read_text(raw.get("id"), "models.id")
        prices = (input_price, cached_price, output_price)
        waiting = _number(raw.get("waiting", 0), "models.waiting")
        audits = _number(raw.get("audits", 0), "models.audits")
        integrity, availability = (_percent(raw.get(name), f"models.{name}") for name in ("integrity", "availability"))
        ratings = integrity, audits, None if availability is None else round(availability)
        return cls(model, providers, live, *prices, context, output, speed, first_token, routes, features, waiting, *ratings)

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        values = (self.providers, self.live, self.input_price, self.cached_input_price, self.output_price)
        members = zip(_MODEL_NUMBERS, (*values, self.context_tokens, self.max_output_tokens), strict=True)
        speeds = dict(zip(_MODEL_SPEEDS, (self.tokens_per_second, self.first_token_ms), strict=True))
        names: dict[str, Any] = {"routes": list(self.routes), "features": list(self.features), "waiting": self.waiting}
        names |= {"integrity": self.integrity, "audits": self.audits, "availability": self.availability}
        return (
            {"id": self.id} | {name: str(value) if name.endswith("Price") else value for name, value in members} | speeds | names
        )


_MODEL_NUMBERS = ("providers", "live", "inputPrice", "cachedInputPrice", "outputPrice", "contextTokens", "maxOutputTokens")
_MODEL_SPEEDS = ("tokensPerSecond", "firstTokenMs")
_MODEL_NAMES = ("routes", "features")


def _names(raw: object, member: str) -> tuple[str, ...]:
    return tuple(read_text(name, member) for name in read_items(raw, member, MAX_NAMES))


def _percent(value: object, member: str) -> float | None:
    """Reads a percentage, or nothing. Raises BadMessage."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise BadMessage(f"{member}: expected a number from 0 to 100")
    return float(value)


def _number(value: object, member: str) -> int:
    """Reads a count, or a price as decimal digits. Raises BadMessage."""
    if isinstance(value, str) and len(value) <= 20 and value.isascii() and value.isdigit():
        return read_count(int(value), member, high=MAX_NUMBER)
    return read_count(value, member, high=MAX_NUMBER)

"""What a client requires of an ask's spec: the same predicates on both sides, since the coordinator proposes and the client
checks. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.messages import Ask

MAX_NAMES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """Which asks will do. Names are compared without case; empty tuples and zero do not restrict. What a provider does not know
    of its model ("unknown") meets no requirement.

    `precision`, `region`, `tier`, `engine`: one of these; `features`: all of these; `context_tokens`: at least so many.
    """

    precision: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    tier: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    context_tokens: int = 0

    def lacks(self, ask: Ask) -> str | None:
        """The first requirement that an ask does not meet, by name."""
        spec = ask.spec
        for name in ("region", "tier", "precision", "engine"):
            wanted = _low(getattr(self, name))
            if wanted and str(getattr(spec, name)).lower() not in wanted:
                return name
        if not _low(self.features) <= _low(spec.features):
            return "features"
        return "context_tokens" if ask.context_tokens < self.context_tokens else None

    def narrowed(self, other: Requirements) -> Requirements:
        """What meets both. Raises Refusal where nothing can: what one side restricts the other never widens."""
        made: dict[str, Any] = {"context_tokens": max(self.context_tokens, other.context_tokens)}
        made["features"] = tuple(dict.fromkeys((*self.features, *other.features)))
        for name in ("precision", "region", "tier", "engine"):
            mine, theirs = getattr(self, name), getattr(other, name)
            both = tuple(one for one in theirs if one.lower() in _low(mine)) if mine and theirs else mine or theirs
            if (mine or theirs) and not both:
                text = f"require.{name}: {', '.join(theirs)} was asked for, but only {', '.join(mine)} is allowed here"
                raise Refusal(Code.NO_PROVIDER, text)
            made[name] = both
        return Requirements(**made)

    def to_json(self) -> dict[str, Any]:
        """The wire form: only what restricts."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        told["contextTokens"] = told.pop("context_tokens")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items() if value}

    @classmethod
    def from_json(cls, raw: object, where: str = "require") -> Requirements:
        """Reads the wire form; a single name may stand for a list of one. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected a JSON object")
        known = {field.name for field in fields(cls)} - {"context_tokens"}
        unknown = sorted(map(str, raw.keys() - known - {"contextTokens"}))
        if unknown:
            raise BadMessage(f"{where}: unknown members: {', '.join(unknown)[:200]}")
        names = {name: _names(raw[name], f"{where}.{name}") for name in known & raw.keys()}
        return cls(**names, context_tokens=read_count(raw.get("contextTokens", 0), f"{where}.contextTokens"))


def _names(raw: object, where: str) -> tuple[str, ...]:
    listed = [raw] if isinstance(raw, str) else read_items(raw, where, MAX_NAMES)
    return tuple(read_text(one, where) for one in listed)


def _low(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


NOTHING = Requirements()

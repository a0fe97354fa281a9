"""The requirements that a client has of an ask's spec. Coordinator and client check them with the same predicates. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.messages import UNKNOWN, Ask
from tallystick.protocol.precisions import precision_class

MAX_NAMES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """Conditions on an ask's spec. Names are compared without case; empty tuples and zero do not restrict.

    `region`, `tier` and `engine` must be one of the names given, and `precision` of the class of one, however either is spelled;
    `features` must contain all of them; `context_tokens` is a minimum. A member that is "unknown" meets no other name.
    """

    precision: tuple[str, ...] = ()
    region: tuple[str, ...] = ()
    tier: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    context_tokens: int = 0

    def first_unmet(self, ask: Ask) -> str | None:
        """The name of the first requirement that an ask does not meet; None if it meets all."""
        spec = ask.spec
        for name in ("region", "tier", "precision", "engine"):
            wanted = getattr(self, name)
            if wanted and compared_name(name, getattr(spec, name)) not in _compared(name, wanted):
                return name
        if not _lower(self.features) <= _lower(spec.features):
            return "features"
        return "context_tokens" if ask.context_tokens < self.context_tokens else None

    def intersection(self, other: Requirements) -> Requirements:
        """The requirements that hold only if both hold. Raises Refusal (no_provider) if no ask can meet both."""
        merged: dict[str, Any] = {"context_tokens": max(self.context_tokens, other.context_tokens)}
        merged["features"] = tuple(dict.fromkeys((*self.features, *other.features)))
        for name in ("precision", "region", "tier", "engine"):
            allowed, requested = getattr(self, name), getattr(other, name)
            both = allowed or requested
            if allowed and requested:
                both = tuple(value for value in requested if _compared(name, (value,)) & _compared(name, allowed))
            if (allowed or requested) and not both:
                text = f"require.{name}: expected one of {', '.join(allowed)}, got {', '.join(requested)}"
                raise Refusal(Code.NO_PROVIDER, text)
            merged[name] = both
        return Requirements(**merged)

    def to_json(self) -> dict[str, Any]:
        """The wire form, without the members that do not restrict."""
        members = {field.name: getattr(self, field.name) for field in fields(self)}
        members["contextTokens"] = members.pop("context_tokens")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in members.items() if value}

    @classmethod
    def from_json(cls, raw: object, where: str = "require") -> Requirements:
        """Reads the wire form. A single name is read as a list of one. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected a JSON object")
        known = MEMBERS - {"contextTokens"}
        unknown = sorted(map(str, raw.keys() - MEMBERS))
        if unknown:
            raise BadMessage(f"{where}: unknown members: {', '.join(unknown)[:200]}")
        names = {name: _names(raw[name], f"{where}.{name}") for name in known & raw.keys()}
        return cls(**names, context_tokens=read_count(raw.get("contextTokens", 0), f"{where}.contextTokens"))


MEMBERS = frozenset(field.name for field in fields(Requirements)) - {"context_tokens"} | {"contextTokens"}
"""The members of the wire form."""


def _names(raw: object, where: str) -> tuple[str, ...]:
    listed = [raw] if isinstance(raw, str) else read_items(raw, where, MAX_NAMES)
    return tuple(read_text(name, where) for name in listed)


def compared_name(member: str, name: str) -> str:
    """What is compared of a name that a spec has in this member: precisions by their class, other names without case."""
    return precision_class(name) if member == "precision" else name.lower()


def _compared(member: str, names: Iterable[str]) -> frozenset[str]:
    """What is compared of required names. A precision that is no class, such as an overlong one, is not the unknown one."""
    compared = ((name, compared_name(member, name)) for name in names)
    return frozenset(value for name, value in compared if member != "precision" or value != UNKNOWN or name.lower() == UNKNOWN)


def _lower(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


NO_REQUIREMENTS = Requirements()

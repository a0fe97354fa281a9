"""By what a client has providers ranked: the order that it asks for, and what its time and a failed job are worth. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count
from tallystick.protocol.types import Amount, format_amount, parse_amount

MAX_WEIGHT = 10**12
"""Base units: a million dollars."""
_NAMES = {"first_token": "firstToken", "speed": "speed", "loss": "loss"}


@dataclass(frozen=True, slots=True)
class Weights:
    """Base units per second until the first token, per second of the rest of the answer, and per failed job.

    A failed job costs its client `loss` on top of the price and the time of doing it again.
    """

    first_token: Amount = Amount(0)
    speed: Amount = Amount(0)
    loss: Amount = Amount(0)

    def __post_init__(self) -> None:
        """Raises BadMessage for a weight that is negative or above MAX_WEIGHT."""
        for field in fields(self):
            if not 0 <= getattr(self, field.name) <= MAX_WEIGHT:
                most = format_amount(MAX_WEIGHT)
                text = f"expected 0 to {most} dollars, got {format_amount(getattr(self, field.name))}"
                raise BadMessage(f"weights.{field.name}: {text}")

    def to_json(self) -> dict[str, int]:
        """The wire form, without the members that are zero."""
        return {_NAMES[field.name]: int(getattr(self, field.name)) for field in fields(self) if getattr(self, field.name)}

    @classmethod
    def from_json(cls, raw: object, where: str = "weights") -> Weights:
        """Reads the wire form. Raises BadMessage."""
        members = _members(raw, where, tuple(_NAMES.values()))
        return cls(*(Amount(read_count(members.get(name, 0), f"{where}.{name}", high=MAX_WEIGHT)) for name in _NAMES.values()))

    @classmethod
    def of(cls, weights: object) -> Weights:
        """Returns weights as they are, or reads them with `from_dollars`. Raises BadMessage."""
        return weights if isinstance(weights, cls) else cls.from_dollars(weights)

    @classmethod
    def from_dollars(cls, raw: object, where: str = "weights") -> Weights:
        """Reads the weights as people write them: an object of dollars as text. Raises BadMessage."""
        return cls(**{name: _dollars(value, f"{where}.{name}") for name, value in _members(raw, where, tuple(_NAMES)).items()})


NO_WEIGHTS = Weights()


def _members(raw: object, where: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise BadMessage(f"{where}: expected a JSON object with {', '.join(known)}")
    unknown = sorted(map(str, raw.keys() - set(known)))
    if unknown:
        raise BadMessage(f"{where}: unknown weights: {', '.join(unknown)[:200]}; known weights: {', '.join(known)}")
    return raw


def _dollars(value: object, member: str) -> Amount:
    if not isinstance(value, str):
        raise BadMessage(f'{member}: expected dollars as text, such as "0.001", got {value!r:.60}')
    return parse_amount(value, field=member)

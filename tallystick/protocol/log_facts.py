"""What a leaf of the match log says of a request, and of each ask that was considered for it. Pure."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address

MAX_TIME = MAX_COUNT = 0xFFFFFFFF
INTEGRITY_STEPS = 1_000
"""Integrity in a leaf is a whole number of these parts."""
_MAX_SLOTS = 0xFFFF
_REQUEST = struct.Struct(">IIQQQI20s")
REQUEST_SIZE = _REQUEST.size
_FACTS = struct.Struct(">QQQIIHHHIIBd?")
_FACTS_MEMBERS = 13
_TRUST = struct.Struct(">HIB")


class AskFacts(NamedTuple):
    """What the matcher knew of a listed ask and its node. Prices are base units per 1,000,000 tokens, times are Unix seconds.

    `slots`: jobs that its engine runs at once; `queue`: further jobs that may wait in the engine's queue; `free`: jobs that both
    take now. The speed is as the coordinator measured it, or as the node says; 0 if it is unknown. `reliability`: the class by
    which the index found it; `score`: its reputation, from 0 to 1. `integrity`: of what `precision` it sells, in INTEGRITY_STEPS;
    `audits`: those behind it.
    """

    input_price: int
    cached_input_price: int
    output_price: int
    valid_from: int
    valid_until: int
    free: int
    slots: int
    queue: int
    first_token_ms: int
    tokens_per_second: int
    reliability: int
    score: float
    newcomer: bool
    integrity: int = INTEGRITY_STEPS
    audits: int = 0
    precision: str = ""

    def dumps(self, *, audited: bool = True) -> bytes:
        """Its part of a leaf; without what audits say for a leaf that has it not."""
        try:
            packed = _FACTS.pack(*self[:_FACTS_MEMBERS])
        except struct.error:
            packed = self._pack_large()
        if not audited:
            return packed
        precision = self.precision.encode()
        return packed + _TRUST.pack(self.integrity, min(self.audits, MAX_COUNT), len(precision)) + precision

    def _pack_large(self) -> bytes:
        """Packs facts of which one does not fit its field: it counts as the largest value of the field."""
        return _FACTS.pack(
            self.input_price,
            self.cached_input_price,
            self.output_price,
            min(self.valid_from, MAX_TIME),
            min(self.valid_until, MAX_TIME),
            min(self.free, _MAX_SLOTS),
            min(self.slots, _MAX_SLOTS),
            min(self.queue, _MAX_SLOTS),
            min(self.first_token_ms, MAX_COUNT),
            min(self.tokens_per_second, MAX_COUNT),
            self.reliability,
            self.score,
            self.newcomer,
        )

    @classmethod
    def loads(cls, data: bytes, place: int, *, audited: bool = True) -> tuple[AskFacts, int]:
        """Reads its part of a leaf. Returns it and the place after it. Raises BadMessage, struct.error, UnicodeDecodeError."""
        facts = cls(*_FACTS.unpack_from(data, place))
        place += _FACTS.size
        if audited:
            integrity, audits, length = _TRUST.unpack_from(data, place)
            place += _TRUST.size
            facts = facts._replace(integrity=integrity, audits=audits, precision=data[place : place + length].decode())
            place += length
        if not 0 <= facts.score <= 1:
            raise BadMessage("leaf.score: expected a number from 0 to 1")
        if facts.integrity > INTEGRITY_STEPS:
            raise BadMessage(f"leaf.integrity: expected at most {INTEGRITY_STEPS}, got {facts.integrity}")
        return facts, place

    def to_json(self) -> dict[str, Any]:
        """The facts as people read them. Prices are base units; integrity is a share."""
        return {
            "inputPrice": self.input_price,
            "cachedInputPrice": self.cached_input_price,
            "outputPrice": self.output_price,
            "free": self.free,
            "slots": self.slots,
            "queue": self.queue,
            "firstTokenMs": self.first_token_ms,
            "tokensPerSecond": self.tokens_per_second,
            "reliability": self.reliability,
            "score": round(self.score, 4),
            "newcomer": self.newcomer,
            "precision": self.precision,
            "integrity": self.integrity / INTEGRITY_STEPS,
            "audits": self.audits,
        }


class RequestFacts(NamedTuple):
    """What the matcher knew of the request: tokens in buckets, and the weights of the client in base units.

    `holder`: the provider that has `cached_tokens` of the input in its cache; None if none is known.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    first_token_weight: int = 0
    speed_weight: int = 0
    loss_weight: int = 0
    cached_tokens: int = 0
    holder: Address | None = None

    def dumps(self) -> bytes:
        """Its part of a leaf."""
        holder = bytes(20) if self.holder is None else bytes.fromhex(self.holder[2:])
        counts = (min(self.input_tokens, MAX_COUNT), min(self.output_tokens, MAX_COUNT))
        weights = (self.first_token_weight, self.speed_weight, self.loss_weight)
        return _REQUEST.pack(*counts, *weights, min(self.cached_tokens, MAX_COUNT), holder)

    def to_json(self) -> dict[str, Any]:
        """What is known of the request, as people read it. Weights are base units."""
        return {
            "inputTokens": self.input_tokens,
            "outputTokens": self.output_tokens,
            "weights": {"firstToken": self.first_token_weight, "speed": self.speed_weight, "loss": self.loss_weight},
            "cachedTokens": self.cached_tokens,
            "holder": self.holder,
        }

    @classmethod
    def loads(cls, data: bytes, place: int) -> RequestFacts:
        """Reads its part of a leaf."""
        likely, expected, first_token, speed, loss, cached, holder = _REQUEST.unpack_from(data, place)
        known = Address("0x" + holder.hex()) if any(holder) else None
        return cls(likely, expected, first_token, speed, loss, cached, known)

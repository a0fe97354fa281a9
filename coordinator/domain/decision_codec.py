"""Decisions as bytes, so that they survive a restart: compressed JSON, a batch at a time. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from coordinator.domain.decision_log import Decision
from coordinator.domain.scoring import RequestShape, ScoreTerms
from tallystick.protocol.criteria import Demand
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount
from tallystick.protocol.weights import Weights
from tallystick.protocol.wire import dumps, loads


def dump_decisions(decisions: Sequence[Decision]) -> bytes:
    """Returns a batch of decisions as bytes."""
    return zlib.compress(dumps([_dump(decision) for decision in decisions]), 6)


def load_decisions(data: bytes) -> list[Decision]:
    """Reads a batch that `dump_decisions` wrote; the numbers of the decisions are 0. Raises ValueError for other bytes."""
    try:
        return [_load(raw) for raw in loads(zlib.decompress(data), "decisions")]
    except Exception as error:  # whatever the bytes are, nothing but the explanations of old decisions is lost
        raise ValueError(f"decisions: written by another version ({type(error).__name__})") from error


def _dump(decision: Decision) -> dict[str, Any]:
    shape, weights = decision.shape, decision.shape.weights
    return {
        "at": decision.at,
        "model": decision.model,
        "match": decision.match,
        "chosen": decision.chosen,
        "rejected": dict(decision.rejected),
        "demand": None if decision.demand is None else decision.demand.to_json(ZERO_ADDRESS),
        "declared": decision.declared,
        "highest": None if decision.highest_price is None else str(decision.highest_price),
        "waits": decision.waits,
        "shape": [shape.input_tokens, shape.output_tokens, shape.cached_tokens, shape.holder],
        "weights": [weights.first_token, weights.speed, weights.loss],
        "scores": {provider: [str(term) for term in terms] for provider, terms in decision.scores.items()},
    }


def _load(raw: dict[str, Any]) -> Decision:
    input_tokens, output_tokens, cached_tokens, holder = raw["shape"]
    weights = Weights(*map(Amount, raw["weights"]))
    return Decision(
        number=0,
        at=raw["at"],
        model=raw["model"],
        match=raw["match"],
        chosen=tuple(map(Address, raw["chosen"])),
        rejected={Address(provider): reason for provider, reason in raw["rejected"].items()},
        demand=None if raw["demand"] is None else Demand.from_json(raw["demand"]),
        declared=raw["declared"],
        highest_price=None if raw["highest"] is None else int(raw["highest"]),
        waits=raw["waits"],
        shape=RequestShape(input_tokens, output_tokens, weights, None if holder is None else Address(holder), cached_tokens),
        scores={Address(provider): ScoreTerms(*map(int, terms)) for provider, terms in raw["scores"].items()},
    )

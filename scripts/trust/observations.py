"""What an audit of an answer sees: the evidence that its provider sold, and a referee's numbers for all of its positions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick.protocol.token_evidence import EvidenceRow, pack_evidence, unpack_evidence
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse


@dataclass(frozen=True, slots=True)
class Observation:
    """One answer of a provider. `request`: the chat that it answers. `billed`: tokens, input and output. `ended`: whether its
    provider says that the model ended it.
    """

    provider: str
    request: Mapping[str, Any]
    rows: tuple[EvidenceRow, ...]
    response: ScoreResponse
    billed: int
    ended: bool

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return tuple(row.token for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "provider": self.provider,
            "request": dict(self.request),
            "evidence": pack_evidence(self.rows).hex(),
            "scores": self.response.to_json(),
            "billed": self.billed,
            "ended": self.ended,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Observation:
        """Reads the form of `to_json`. Raises BadMessage."""
        rows = unpack_evidence(bytes.fromhex(raw["evidence"]))
        tokens = [row.token for row in rows]
        positions = [row["position"] for row in raw["scores"]["rows"]]
        response = ScoreResponse.from_json(raw["scores"], ScoreRequest.of(raw["request"], tokens, positions))
        return cls(raw["provider"], raw["request"], rows, response, raw["billed"], raw["ended"])


def read_observations(path: Path) -> list[Observation]:
    """Reads a file of one JSON object a line."""
    return [Observation.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def write_observations(path: Path, observations: Iterable[Observation]) -> None:
    """Writes such a file."""
    path.write_text("".join(json.dumps(observation.to_json()) + "\n" for observation in observations))

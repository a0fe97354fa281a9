"""Ranking hints: what a coordinator gets to know of a sealed request to rank its candidates by. Pure.

The hints are the client's word and bind nobody: a wrong one makes the client's own request dearer or slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.protocol.criteria import read_sort
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_text
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.weights import NO_WEIGHTS, Weights

MAX_HINTS = 255
"""Bytes of the hints as compact JSON, at most."""


@dataclass(frozen=True, slots=True)
class RankingHints:
    """`likely_tokens`: the input that the request is likely to have, rounded; 0 if unknown. `sort`, `weights`: as in a demand.

    `holder`: the provider that has `cached_tokens` of the input in its cache and keeps the conversation; None if there is none.
    """

    likely_tokens: int = 0
    sort: str = "price"
    weights: Weights = NO_WEIGHTS
    holder: Address | None = None
    cached_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The wire form, without the members that say nothing."""
        members: dict[str, Any] = {"likelyTokens": self.likely_tokens, "cachedTokens": self.cached_tokens}
        members |= {"holder": self.holder, "weights": self.weights.to_json()}
        members["sort"] = None if self.sort == "price" else self.sort
        return {name: value for name, value in members.items() if value}

    @classmethod
    def from_json(cls, raw: object, where: str = "submission.hints") -> RankingHints:
        """Reads the wire form. Members that this release does not know are ignored. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected a JSON object")
        holder = raw.get("holder")
        return cls(
            read_count(raw.get("likelyTokens", 0), f"{where}.likelyTokens"),
            read_sort(read_text(raw.get("sort", "price"), f"{where}.sort", 32), f"{where}.sort"),
            Weights.from_json(raw.get("weights", {}), f"{where}.weights"),
            None if holder is None else parse_address(read_text(holder, f"{where}.holder"), f"{where}.holder"),
            read_count(raw.get("cachedTokens", 0), f"{where}.cachedTokens"),
        )


NO_HINTS = RankingHints()

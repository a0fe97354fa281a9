"""Ranking hints: what a coordinator gets to know of a sealed request to rank its candidates by, and to find further ones. Pure.

The hints are the client's word and bind nobody: a wrong one makes the client's own request dearer or slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.protocol.criteria import read_sort
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_items, read_text
from tallystick.protocol.requirements import MAX_NAMES, Requirements
from tallystick.protocol.requirements import MEMBERS as REQUIREMENTS
from tallystick.protocol.types import Address, parse_address
from tallystick.protocol.weights import NO_WEIGHTS, Weights

MAX_HINTS = 255
"""Bytes of the hints as compact JSON, at most."""


@dataclass(frozen=True, slots=True)
class RankingHints:
    """`likely_tokens`: the input that the request is likely to have, rounded; 0 if unknown. `sort`, `weights`: as in a demand.

    `holder`: the provider that has `cached_tokens` of the input in its cache and keeps the conversation; None if there is none.
    `require`: what the client requires of an ask; None if it did not say. `needs`: features that it prefers an ask to declare.
    While the job waits, its client is invited to asks that meet them.
    """

    likely_tokens: int = 0
    sort: str = "price"
    weights: Weights = NO_WEIGHTS
    holder: Address | None = None
    cached_tokens: int = 0
    require: Requirements | None = None
    needs: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The wire form, without the members that say nothing."""
        members: dict[str, Any] = {"likelyTokens": self.likely_tokens, "cachedTokens": self.cached_tokens}
        members |= {"holder": self.holder, "weights": self.weights.to_json()}
        members["sort"] = None if self.sort == "price" else self.sort
        members["needs"] = list(self.needs)
        said = {name: value for name, value in members.items() if value}
        return said if self.require is None else said | {"require": self.require.to_json()}

    @classmethod
    def from_json(cls, raw: object, where: str = "submission.hints") -> RankingHints:
        """Reads the wire form. Members that this release does not know are ignored. Raises BadMessage."""
        if not isinstance(raw, dict):
            raise BadMessage(f"{where}: expected a JSON object")
        holder, require = raw.get("holder"), raw.get("require")
        return cls(
            read_count(raw.get("likelyTokens", 0), f"{where}.likelyTokens"),
            read_sort(read_text(raw.get("sort", "price"), f"{where}.sort", 32), f"{where}.sort"),
            Weights.from_json(raw.get("weights", {}), f"{where}.weights"),
            None if holder is None else parse_address(read_text(holder, f"{where}.holder"), f"{where}.holder"),
            read_count(raw.get("cachedTokens", 0), f"{where}.cachedTokens"),
            None if require is None else _read_require(require, f"{where}.require"),
            tuple(read_text(name, f"{where}.needs") for name in read_items(raw.get("needs", []), f"{where}.needs", MAX_NAMES)),
        )

    @property
    def likely(self) -> Requirements | None:
        """What an ask meets that the client accepts and prefers; None if the client did not say what it requires."""
        return None if self.require is None else self.require.intersection(Requirements(features=self.needs))


def _read_require(raw: object, where: str) -> Requirements:
    """Reads requirements without the members that this release does not know. Raises BadMessage."""
    known = {name: raw[name] for name in REQUIREMENTS if name in raw} if isinstance(raw, dict) else raw
    return Requirements.from_json(known, where)


NO_HINTS = RankingHints()

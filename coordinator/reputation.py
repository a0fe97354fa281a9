"""Reputation of providers, from how their jobs ended. Only what was the provider's doing counts. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address

_MEMORY = 0.98
"""Each new outcome weighs 2 % of the score; some fifty jobs tell most of the story."""

_BLAMED = {Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT}
_IGNORED = {Outcome.UPSTREAM_ERROR, Outcome.CLIENT_CANCELLED}


@dataclass(slots=True)
class Reputation:
    """A score from 0 (fails always) to 1 (never), a moving average that starts at 1."""

    _scores: dict[Address, float] = field(default_factory=dict)

    def score(self, provider: Address) -> float:
        """The provider's score; 1 for a newcomer."""
        return self._scores.get(provider, 1.0)

    def record(self, provider: Address, outcome: Outcome) -> None:
        """Counts the end of a job."""
        if outcome not in _IGNORED:
            good = 0.0 if outcome in _BLAMED else 1.0
            self._scores[provider] = _MEMORY * self.score(provider) + (1 - _MEMORY) * good

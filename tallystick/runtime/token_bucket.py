"""Token buckets: rate limits per key, such as an address or an account. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class TokenBucket:
    """One token bucket per key: `burst` tokens at first, refilled by `rate` tokens per second.

    Only the `max_keys` keys that were used last are remembered. `now` is a clock in seconds; setting it back takes no tokens.
    """

    rate: float
    burst: float
    max_keys: int = 10_000
    _levels: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    """Tokens left, and when they were counted."""

    def delay(self, key: str, now: float) -> float:
        """Returns the seconds until this key has a whole token; 0 if it has one. Takes nothing."""
        if key not in self._levels:  # as nearly all
            return max(0.0, (1 - self.burst) / self.rate)
        return max(0.0, (1 - self._level(key, now)) / self.rate)

    def try_spend(self, key: str, now: float, tokens: float = 1) -> bool:
        """Takes the tokens if at least one is left, into debt if need be. Otherwise returns False and takes nothing."""
        if self._level(key, now) < 1:
            return False
        self.overdraw(key, now, tokens)
        return True

    def overdraw(self, key: str, now: float, tokens: float = 1) -> float:
        """Takes the tokens even if too few are left. Returns the seconds until the debt is refilled."""
        level = self._level(key, now) - tokens
        self._levels[key] = (level, now)
        self._levels.move_to_end(key)
        if len(self._levels) > self.max_keys:
            self._levels.popitem(last=False)
        return max(0.0, -level / self.rate)

    def refund(self, key: str, now: float, tokens: float = 1) -> None:
        """Puts tokens back that were taken for nothing. No key has more than `burst` thereby."""
        if key in self._levels:  # any other key has all of them
            self._levels[key] = (min(self.burst, self._level(key, now) + tokens), now)

    def _level(self, key: str, now: float) -> float:
        level, counted_at = self._levels.get(key, (self.burst, now))
        return min(self.burst, level + max(0.0, now - counted_at) * self.rate)

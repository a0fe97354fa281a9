"""Manners: how much nonsense one party may send before it is no longer listened to, for a while. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

_KEPT = 10_000


@dataclass(slots=True)
class Budget:
    """Token buckets by name: `burst` at once, `rate` a second after that. Only the last parties are remembered."""

    rate: float
    burst: float
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, name: str, now: float) -> float:
        """Seconds until this party has something left; 0 if it has. Spends nothing."""
        return max(0.0, (1 - self._now(name, now)) / self.rate)

    def spend(self, name: str, now: float, amount: float = 1) -> bool:
        """Takes that much; False where less than 1 was left, and then nothing is taken."""
        left = self._now(name, now)
        if left < 1:
            return False
        self._left[name] = (left - amount, now)
        self._left.move_to_end(name)
        if len(self._left) > _KEPT:
            self._left.popitem(last=False)
        return True

    def _now(self, name: str, now: float) -> float:
        left, at = self._left.get(name, (self.burst, now))
        return min(self.burst, left + (now - at) * self.rate)

"""Models that a batch asks nobody for now, and the lines that wait for them. Pure.

A line that waits is not read again before its model's pause is over: a batch that waits for days costs next to nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

from tallystick.client.batches.line_policy import wait_seconds
from tallystick.client.batches.records import InputLine


@dataclass(slots=True)
class _Pause:
    until: float = 0.0
    tries: int = 0


class PausedModels:
    """Times are seconds of a clock that never goes back. True if lines wait."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}
        self._parked: dict[str, deque[InputLine]] = {}
        self._wakes: list[tuple[float, str]] = []
        """A heap with a moment for each model with lines, at or before the end of its pause."""

    def __bool__(self) -> bool:
        return bool(self._parked)

    @property
    def due(self) -> float:
        """When the next lines may begin; infinity if none wait."""
        return self._wakes[0][0] if self._wakes else math.inf

    def until(self, model: str) -> float:
        """The end of a model's pause; 0 without one."""
        pause = self._pauses.get(model)
        return 0.0 if pause is None else pause.until

    def pause(self, model: str, now: float) -> bool:
        """Begins a pause, longer than the one before. Returns False during a pause, which no further line lengthens."""
        pause = self._pauses.setdefault(model, _Pause())
        if pause.until > now:
            return False
        pause.until = now + wait_seconds(pause.tries)
        pause.tries += 1
        return True

    def end(self, model: str) -> None:
        """Ends a model's pause, since it was sold."""
        if self._pauses.pop(model, None) is not None and model in self._parked:
            heapq.heappush(self._wakes, (0.0, model))

    def park(self, model: str, line: InputLine) -> None:
        """Lets a line wait behind the others of its model: what one line needs may be had when another's is not."""
        parked = self._parked.get(model)
        if parked is None:
            parked = self._parked[model] = deque()
            heapq.heappush(self._wakes, (self.until(model), model))
        parked.append(line)

    def next(self, now: float) -> InputLine | None:
        """The next line whose model's pause is over; None if there is none."""
        while self._wakes and self._wakes[0][0] <= now:
            model = self._wakes[0][1]
            parked, until = self._parked.get(model), self.until(model)
            if parked is None:  # an older moment of a model whose lines have all begun
                heapq.heappop(self._wakes)
            elif until > now:
                heapq.heapreplace(self._wakes, (until, model))
            else:
                line = parked.popleft()
                if not parked:
                    del self._parked[model]
                    heapq.heappop(self._wakes)
                return line
        return None

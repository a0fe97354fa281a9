"""Hashes of the match log in memory: those of the newest leaves, and those of older leaves that proofs read again and again.

What is appended is never changed, so a copy is never stale. Clients and nodes ask for proofs of leaves that are seconds old, and
the paths of these proofs end in the same few old subtrees. So nearly all proofs are made without the database.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

NEWEST = 8_192
"""Leaves of which the hashes are in memory, about 150 bytes each: those of half a minute at 250 matches a second."""
OLDER = 1_024
"""Older leaves of which the hashes are kept since they were read."""


class RecentHashes:
    """See the module's docstring. `newest`, `older`: how many leaves are kept."""

    def __init__(self, newest: int = NEWEST, older: int = OLDER) -> None:
        self._newest: deque[bytes] = deque(maxlen=newest)
        self._end = 0
        """The number of the leaf after the newest one."""
        self._older: dict[int, bytes] = {}
        self._most_older = older

    def append(self, number: int, hashes: bytes) -> None:
        """Takes the stored hashes of the leaf that follows the last one. Another number begins anew."""
        if number != self._end:
            self._newest.clear()
        self._newest.append(hashes)
        self._end = number + 1

    def add_older(self, rows: Mapping[int, bytes]) -> None:
        """Keeps hashes that were read from the database."""
        if len(self._older) + len(rows) > self._most_older:
            self._older.clear()
        if len(rows) <= self._most_older:
            self._older.update(rows)

    def known(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """Returns the hashes of those of these leaves that are in memory."""
        first, newest, older = self._end - len(self._newest), self._newest, self._older
        found = {number: newest[number - first] for number in numbers if first <= number < self._end}
        return found | {number: older[number] for number in numbers if number in older}

    def span(self, start: int, end: int) -> list[bytes] | None:
        """Returns the hashes of the leaves from `start` to before `end`; None if they are not all in memory."""
        first = self._end - len(self._newest)
        if not first <= start <= end <= self._end:
            return None
        newest = self._newest
        return [newest[number - first] for number in range(start, end)]

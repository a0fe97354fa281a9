"""The ids of jobs that were placed lately, which detect replays. At some hundred jobs a second, there are a million of them."""

from __future__ import annotations

from collections.abc import Iterable

from tallystick.protocol.types import JobId

_PERIODS = 8


class SeenJobs:
    """Ids are kept for `seconds`, and for an eighth of that longer at most: they are forgotten together with their period's.

    Times are Unix seconds. An id takes about 85 bytes, half of what a dict of ids and times would take.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds, self._period = seconds, max(1, seconds // _PERIODS)
        self._ids: dict[int, set[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._ids.values()))

    def __contains__(self, job: JobId) -> bool:
        number = int.from_bytes(job)
        for ids in self._ids.values():  # noqa: SIM110 - `any` takes three times as long, for every job
            if number in ids:
                return True
        return False

    def add(self, job: JobId, now: int) -> None:
        """Notes a job that is placed now."""
        self._ids.setdefault(now // self._period, set()).add(int.from_bytes(job))

    def restore(self, jobs: Iterable[JobId], now: int) -> None:
        """Notes jobs that a former process placed, as if they were placed now."""
        for job in jobs:
            self.add(job, now)

    def discard(self, job: JobId) -> None:
        """Forgets a job that was not placed after all."""
        number = int.from_bytes(job)
        for ids in self._ids.values():
            ids.discard(number)

    def sweep(self, now: int) -> None:
        """Forgets the jobs that were placed more than `seconds` ago, as far as their period is over."""
        for period in list(self._ids):
            if (period + 1) * self._period - 1 + self._seconds <= now:
                del self._ids[period]

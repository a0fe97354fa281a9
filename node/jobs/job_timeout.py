"""The timeout of one job: a total, and a shorter wait within it that is renewed often, such as that for the next token.

Both share one timer of the event loop, and renewing the wait sets none.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class JobTimeout:
    """Cancels its block like `asyncio.timeout`, and raises TimeoutError at its end, when `total` seconds have passed.

    After `renew`, it also does so when that time has passed, unless it is renewed again before.
    """

    def __init__(self, total: float) -> None:
        self._total = total
        self._timeout = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._end: float | None = None
        self._wait_end: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self.reschedule(self._loop.time() + self._total)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def renew(self, seconds: float) -> None:
        """Lets the wait end `seconds` from now."""
        when = self._wait_end = self._loop.time() + seconds
        self._set_timer(when)

    def pause(self) -> None:
        """Lets the wait not end before it is renewed."""
        self._wait_end = None

    def when(self) -> float | None:
        """When the total has passed, in seconds of the loop's clock; None if it is suspended."""
        return self._end

    def reschedule(self, when: float | None) -> None:
        """Changes when the total has passed; None suspends it."""
        self._end = when
        if when is not None:
            self._set_timer(when)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            if self._timer.when() <= when:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._check)

    def _check(self) -> None:
        self._timer = None
        ends = [end for end in (self._end, self._wait_end) if end is not None]
        if not ends:
            return
        if self._loop.time() < min(ends):
            self._set_timer(min(ends))
        else:
            self._timeout.reschedule(min(ends))

"""A timeout for a wait that is renewed often, such as that for the next token: renewing it sets no timer."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self


class IdleTimeout:
    """Cancels its block like `asyncio.timeout`, and raises TimeoutError at its end, unless it is renewed in time.

    `seconds`: until it ends, counted from the beginning of the block.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._when: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self.renew(self._seconds)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def renew(self, seconds: float) -> None:
        """Lets it end `seconds` from now."""
        when = self._when = self._loop.time() + seconds
        if self._timer is not None and self._timer.when() > when:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._check)

    def pause(self) -> None:
        """Lets it not end before it is renewed."""
        self._when = None

    def _check(self) -> None:
        self._timer = None
        if self._when is None:
            return
        if self._loop.time() < self._when:
            self._timer = self._loop.call_at(self._when, self._check)
        else:
            self._timeout.reschedule(self._when)

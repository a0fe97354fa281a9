"""An event of which thousands may exist at once: asyncio.Event takes 0.8 KB for the queue of those that wait, even if none do."""

from __future__ import annotations

import asyncio
from typing import Literal


class LeanEvent:
    """An asyncio.Event that takes memory for those that wait only while they wait."""

    __slots__ = ("_futures", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._futures: tuple[asyncio.Future[None], ...] = ()

    def is_set(self) -> bool:
        """See asyncio.Event."""
        return self._is_set

    def set(self) -> None:
        """See asyncio.Event."""
        self._is_set = True
        futures, self._futures = self._futures, ()
        for future in futures:
            if not future.done():
                future.set_result(None)

    def clear(self) -> None:
        """See asyncio.Event."""
        self._is_set = False

    async def wait(self) -> Literal[True]:
        """See asyncio.Event."""
        if self._is_set:
            return True
        future = asyncio.get_running_loop().create_future()
        self._futures = (*self._futures, future)
        try:
            await future
        finally:
            self._futures = tuple(other for other in self._futures if other is not future)
        return True

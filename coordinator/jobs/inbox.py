"""The inbox of a job: a queue for one reader, which costs a future only while the reader waits."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """See the module's docstring. Whoever puts items in bounds their number."""

    __slots__ = ("_items", "_waiting")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def awaited(self) -> bool:
        """Whether the reader waits and no item was put since, so that it has handled all former ones."""
        return self._waiting is not None and not self._waiting.done()

    def put(self, item: T) -> None:
        """Appends an item, and wakes the reader."""
        self._items.append(item)
        waiting = self._waiting
        if waiting is not None:
            self._waiting = None
            if not waiting.done():
                waiting.set_result(None)

    def take(self) -> T:
        """Removes the first item. Raises IndexError if there is none."""
        return self._items.popleft()

    async def get(self) -> T:
        """Waits for an item and removes it. Raises RuntimeError if another reader waits."""
        while not self._items:
            if self._waiting is not None:
                raise RuntimeError("an inbox has one reader")
            waiting = self._waiting = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                if self._waiting is waiting:
                    self._waiting = None
        return self._items.popleft()

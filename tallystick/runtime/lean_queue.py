"""A queue of which thousands may exist at once: asyncio.Queue takes 2 KB even if it is empty and nobody waits."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class LeanQueue(Generic[T]):
    """An asyncio.Queue for one reader. It takes memory for items only while there are any, and for the reader while it waits.

    Whoever puts items in bounds their number.
    """

    __slots__ = ("_items", "_waiting", "awaited")

    def __init__(self) -> None:
        self._items: deque[T] | None = None
        self._waiting: asyncio.Future[None] | None = None
        self.awaited = False
        """Whether the reader waits and no item was put since, so that it has handled all former ones."""

    def __len__(self) -> int:
        return 0 if self._items is None else len(self._items)

    def empty(self) -> bool:
        """See asyncio.Queue."""
        return self._items is None

    def put_nowait(self, item: T) -> None:
        """Appends an item, and wakes the reader."""
        if self._items is None:
            self._items = deque()
        self._items.append(item)
        waiting = self._waiting
        if waiting is not None:
            self._waiting, self.awaited = None, False
            if not waiting.done():
                waiting.set_result(None)

    def get_nowait(self) -> T:
        """Removes the first item. Raises asyncio.QueueEmpty if there is none."""
        items = self._items
        if items is None:
            raise asyncio.QueueEmpty
        item = items.popleft()
        if not items:
            self._items = None
        return item

    async def get(self) -> T:
        """Waits for an item and removes it. Raises RuntimeError if another reader waits."""
        while self._items is None:
            if self._waiting is not None:
                raise RuntimeError("a LeanQueue has one reader")
            waiting = self._waiting = asyncio.get_running_loop().create_future()
            self.awaited = True
            try:
                await waiting
            finally:
                if self._waiting is waiting:
                    self._waiting, self.awaited = None, False
        return self.get_nowait()

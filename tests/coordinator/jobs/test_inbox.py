"""The inbox: items in order, one reader, and nothing lost by a reader that leaves."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.jobs.inbox import Inbox


async def test_items_come_in_order() -> None:
    """Those that were there before the reader, and those that come while it waits."""
    inbox = Inbox[int]()
    inbox.put(1)
    inbox.put(2)
    assert len(inbox) == 2
    assert [await inbox.get(), await inbox.get()] == [1, 2]
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(3)
    inbox.put(4)
    assert await reader == 3
    assert await inbox.get() == 4
    assert not len(inbox)


async def test_a_reader_that_is_cancelled_takes_nothing() -> None:
    """Also if an item woke it just before."""
    inbox = Inbox[int]()
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.put(1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await inbox.get() == 1
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    inbox.put(2)
    assert await inbox.get() == 2


async def test_there_is_one_reader() -> None:
    """A second one is a bug, and is told so."""
    inbox = Inbox[int]()
    reader = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await inbox.get()
    inbox.put(1)
    assert await reader == 1

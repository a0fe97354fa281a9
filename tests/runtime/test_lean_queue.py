"""LeanQueue: items in order, one reader, nothing lost by a reader that leaves, and no memory for what is not there."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest

from tallystick.runtime.lean_queue import LeanQueue


async def test_items_come_in_order() -> None:
    """Those that were there before the reader, and those that come while it waits."""
    queue = LeanQueue[int]()
    queue.put_nowait(1)
    queue.put_nowait(2)
    assert len(queue) == 2
    assert [await queue.get(), await queue.get()] == [1, 2]
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put_nowait(3)
    queue.put_nowait(4)
    assert await reader == 3
    assert await queue.get() == 4
    assert not len(queue)


async def test_a_reader_that_is_cancelled_takes_nothing() -> None:
    """Also if an item woke it just before."""
    queue = LeanQueue[int]()
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put_nowait(1)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await queue.get() == 1
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.wait({reader})
    queue.put_nowait(2)
    assert await queue.get() == 2


async def test_there_is_one_reader() -> None:
    """A second one is a bug, and is told so."""
    queue = LeanQueue[int]()
    reader = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await queue.get()
    queue.put_nowait(1)
    assert await reader == 1


async def test_it_behaves_as_a_queue_that_is_emptied() -> None:
    """It says whether there are items, and raises without any."""
    queue = LeanQueue[int]()
    assert queue.empty()
    with pytest.raises(asyncio.QueueEmpty):
        queue.get_nowait()
    queue.put_nowait(1)
    assert not queue.empty()
    assert queue.get_nowait() == 1
    assert queue.empty()


async def test_an_empty_queue_is_small() -> None:
    """Also after it had items."""
    queue = LeanQueue[int]()
    queue.put_nowait(1)
    await queue.get()
    assert sys.getsizeof(queue) < 100
    assert [held for held in gc.get_referents(queue) if held not in (None, False, LeanQueue)] == []

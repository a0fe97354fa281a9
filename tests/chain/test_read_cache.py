"""The cache of chain reads: ages, shared reads, failures, capacity."""

from __future__ import annotations

import asyncio

import pytest

from tallystick.chain import read_cache as module
from tallystick.chain.read_cache import MAX_READS, ReadCache
from tallystick.protocol.errors import Code, Unavailable


class _Chain:
    """A value that can be read, slowly or not at all, and a clock."""

    def __init__(self, capacity: int = 10) -> None:
        self.seconds, self.value, self.reads, self.down = 0.0, 1, 0, False
        self.answers = asyncio.Event()
        self.answers.set()
        self.cache: ReadCache[str, int] = ReadCache("value of", self.read, capacity=capacity, clock=lambda: self.seconds)

    async def read(self, _key: str) -> int:
        self.reads += 1
        await self.answers.wait()
        if self.down:
            raise Unavailable(Code.CHAIN_UNAVAILABLE, "down")
        return self.value


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_young_value_is_not_read_again() -> None:
    """Up to and including max_age, the cached value is returned; afterwards a new one is read."""
    chain = _Chain()
    assert await chain.cache.get("a", max_age=5) == 1
    chain.seconds, chain.value = 5.0, 2
    assert await chain.cache.get("a", max_age=5) == 1
    chain.seconds = 5.1
    assert await chain.cache.get("a", max_age=5) == 2
    assert chain.reads == 2


async def test_a_stale_value_is_returned_while_a_new_one_is_read() -> None:
    """Between max_age and max_stale, callers get the cached value at once, and the next caller gets the new value."""
    chain = _Chain()
    await chain.cache.get("a", max_age=5, max_stale=50)
    chain.seconds, chain.value = 50.0, 2
    assert await chain.cache.get("a", max_age=5, max_stale=50) == 1
    await _settle()
    assert await chain.cache.get("a", max_age=5, max_stale=50) == 2
    chain.seconds, chain.value = 100.1, 3
    assert await chain.cache.get("a", max_age=5, max_stale=50) == 3


async def test_concurrent_callers_share_a_read() -> None:
    """Concurrent callers of one key share one read, which goes on if one of them is cancelled."""
    chain = _Chain()
    chain.answers.clear()
    callers = [asyncio.create_task(chain.cache.get("a", max_age=5)) for _ in range(3)]
    await _settle()
    callers[0].cancel()
    chain.answers.set()
    assert await asyncio.gather(*callers[1:]) == [1, 1]
    assert chain.reads == 1


async def test_a_refresh_ignores_the_cache() -> None:
    """A refresh reads the value again regardless of its age."""
    chain = _Chain()
    await chain.cache.get("a", max_age=5)
    chain.value = 2
    assert await chain.cache.refresh("a") == 2


async def test_the_age_counts_from_the_start_of_the_read() -> None:
    """A value's age counts from the start of its read."""
    chain = _Chain()
    chain.answers.clear()
    caller = asyncio.create_task(chain.cache.get("a", max_age=5))
    await _settle()
    chain.seconds = 6.0
    chain.answers.set()
    await caller
    await chain.cache.get("a", max_age=5)
    assert chain.reads == 2


async def test_a_failed_read_raises_and_keeps_the_last_value() -> None:
    """Waiting callers get the error; the last value stays available, and `renew` postpones the next read."""
    chain = _Chain()
    await chain.cache.get("a", max_age=5)
    chain.down, chain.seconds = True, 6.0
    with pytest.raises(Unavailable):
        await chain.cache.get("a", max_age=5)
    last = chain.cache.last("a")
    assert last is not None
    assert (last.value, last.read_at) == (1, 0.0)
    chain.cache.renew("a")
    assert await chain.cache.get("a", max_age=5) == 1
    assert chain.reads == 2
    chain.cache.renew("b")
    assert chain.cache.last("b") is None


async def test_a_failed_background_read_is_silent() -> None:
    """A failed background read leaves no unretrieved exception, and the stale value is still returned."""
    chain = _Chain()
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    await chain.cache.get("a", max_age=5, max_stale=50)
    chain.down, chain.seconds = True, 6.0
    assert await chain.cache.get("a", max_age=5, max_stale=50) == 1
    await _settle()
    assert await chain.cache.get("a", max_age=5, max_stale=50) == 1
    await _settle()
    assert (chain.reads, unhandled) == (3, [])


async def test_the_oldest_values_are_dropped() -> None:
    """At most `capacity` values are kept; the one that was read longest ago is dropped first."""
    chain = _Chain(capacity=2)
    for key in ("a", "b", "a", "c"):
        await chain.cache.refresh(key)
    assert len(chain.cache) == 2
    assert chain.cache.last("b") is None


async def test_reads_of_many_keys_take_turns() -> None:
    """Readers of many keys share MAX_READS requests at a time, and all get their values."""
    chain = _Chain(capacity=3 * MAX_READS)
    chain.answers.clear()
    readers = [asyncio.create_task(chain.cache.get(f"key {number}", max_age=5)) for number in range(3 * MAX_READS)]
    await _settle()
    assert chain.reads == MAX_READS
    chain.answers.set()
    assert await asyncio.gather(*readers) == [1] * (3 * MAX_READS)


async def test_a_read_waits_for_others_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that others keep waiting learn that the chain is slow, and have what they knew; those under way go on."""
    monkeypatch.setattr(module, "ROOM_SECONDS", 0.01)
    chain = _Chain(capacity=3 * MAX_READS)
    await chain.cache.get("known", max_age=5)
    chain.answers.clear()
    readers = [asyncio.create_task(chain.cache.get(f"key {number}", max_age=5)) for number in range(MAX_READS)]
    await _settle()
    chain.seconds = 60
    with pytest.raises(Unavailable, match=r"the chain is slow: 64 reads are under way, for which this one waited 0\.01 s"):
        await chain.cache.get("known", max_age=5)
    known = chain.cache.last("known")
    assert known is not None
    assert known.value == 1
    chain.answers.set()
    assert await asyncio.gather(*readers) == [1] * MAX_READS
    assert await chain.cache.get("known", max_age=5) == 1


async def test_close_cancels_reads() -> None:
    """After close, no read is running."""
    chain = _Chain()
    chain.answers.clear()
    caller = asyncio.create_task(chain.cache.get("a", max_age=5))
    await _settle()
    await chain.cache.close()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("value of")] == []

"""Hashes of the match log in memory: what is kept, what is not, and that proofs are the same with and without them."""

from __future__ import annotations

import pytest

from coordinator.jobs.match_log import MatchLog
from coordinator.jobs.recent_hashes import RecentHashes
from tests.coordinator.harness import COORDINATOR, DOMAIN, START, World


def _filled(count: int, newest: int, first: int = 0) -> RecentHashes:
    recent = RecentHashes(newest, older=4)
    for number in range(first, first + count):
        recent.append(number, b"%d" % number)
    return recent


def test_the_newest_are_kept() -> None:
    """Older ones than the last few are not known, nor are those that do not exist yet."""
    recent = _filled(10, newest=4)
    assert recent.known(range(20)) == {number: b"%d" % number for number in (6, 7, 8, 9)}
    assert recent.span(6, 10) == [b"6", b"7", b"8", b"9"]
    assert recent.span(7, 9) == [b"7", b"8"]
    assert recent.span(8, 8) == []
    for start, end in ((5, 7), (9, 11), (8, 7), (10, 11)):
        assert recent.span(start, end) is None
    assert _filled(0, newest=4).span(0, 1) is None


def test_a_log_that_was_loaded_begins_where_it_ends() -> None:
    """The numbers of the leaves count, not how many were appended here; a gap begins anew."""
    recent = _filled(3, newest=8, first=100)
    assert recent.known([0, 99, 100, 102, 103]) == {100: b"100", 102: b"102"}
    recent.append(200, b"200")
    assert (recent.known([100, 102, 200]), recent.span(100, 102)) == ({200: b"200"}, None)


def test_older_ones_are_kept_within_their_bound() -> None:
    """At most so many: beyond that, those that were kept make room. Too many at once are not kept at all."""
    recent = _filled(1, newest=1, first=50)
    recent.add_older({1: b"1", 2: b"2", 3: b"3"})
    assert recent.known([1, 2, 3, 50]) == {1: b"1", 2: b"2", 3: b"3", 50: b"50"}
    recent.add_older({4: b"4", 5: b"5"})
    assert recent.known([1, 2, 3, 4, 5]) == {4: b"4", 5: b"5"}
    recent.add_older(dict.fromkeys(range(10, 15), b""))
    assert recent.known(range(20)) == {}


@pytest.mark.parametrize(("newest", "older"), [(1, 1), (3, 2), (100, 100)])
async def test_proofs_do_not_depend_on_what_is_in_memory(newest: int, older: int) -> None:
    """A process with little memory, one with much, and one that was started anew prove the same."""
    world = World()
    await world.market.start()
    node = world.node("ann", slots=64)
    world.market.match_log._recent = RecentHashes(newest, older)
    for _ in range(23):
        await world.started(node)
    own = world.market.match_log
    await own.sign_head()
    other = MatchLog(world.log_store, COORDINATOR, DOMAIN, lambda: START)
    other._edge, other.head, other.epoch = own._edge, own.head, own.epoch
    for first in range(24):
        question = {"since": [first, 7], "indexes": [first], "span": (first, 24)}
        for _ in range(2):
            assert await own.proof(**question) == await other.proof(**question)  # type: ignore[arg-type]  # by name
    assert (await own.proof([], [], 24, (0, 24)))["span"] is not None


async def test_proofs_of_new_leaves_read_no_database() -> None:
    """Clients and nodes ask for these every few seconds."""
    world = World()
    await world.market.start()
    node = world.node("ann", slots=64)
    for _ in range(20):
        await world.started(node)
    await world.market.match_log.sign_head()
    rows = world.market.match_log.store.rows  # type: ignore[attr-defined]  # the store in memory
    kept, rows[:] = list(rows), []
    answer = await world.market.match_log.proof([3, 20], [], span=(5, 20))
    rows[:] = kept
    assert (len(bytes.fromhex(answer["span"]["hashes"])), set(answer["consistency"])) == (15 * 32, {"3", "20"})

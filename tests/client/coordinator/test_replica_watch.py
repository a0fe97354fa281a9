from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from tallystick.client.coordinator import replica_watch
from tallystick.client.coordinator.replica_watch import ReplicaWatch
from tests.client.fake_coordinator import eventually

ONE, TWO = "http://one", "http://two"


@dataclass
class World:
    """Replicas, of which some have left, and links that have been quiet since some time."""

    left: set[str] = field(default_factory=set)
    quiet: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)

    def watch(self) -> ReplicaWatch:
        """A watch over them."""

        async def has_left(url: str) -> bool:
            self.asked.append(url)
            return url in self.left

        def give_up(url: str) -> None:
            self.given_up.append(url)
            self.quiet.pop(url, None)

        return ReplicaWatch(has_left=has_left, quiet_since=self.quiet.get, give_up=give_up)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short times."""
    monkeypatch.setattr(replica_watch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(replica_watch, "QUIET_SECONDS", 0.05)


def _now() -> float:
    return asyncio.get_running_loop().time()


async def test_requests_at_a_replica_that_left_are_given_up() -> None:
    """Those at another one go on, and so does one that was answered before."""
    world = World(left={ONE})
    watch = world.watch()
    goes_on = asyncio.Event()

    async def request(url: str) -> str:
        async with watch.waiting(url):
            await goes_on.wait()
            return url

    async with watch.waiting(ONE):
        pass
    first, second, third = (asyncio.create_task(request(url)) for url in (ONE, ONE, TWO))
    for lost in (first, second):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(lost, 60)
    assert world.given_up == [ONE]
    goes_on.set()
    assert await third == TWO
    await watch.close()


async def test_links_are_watched_while_jobs_wait_there() -> None:
    """One from which something came lately is left alone, and asked for nothing. Without jobs, nobody looks."""
    world = World(left={ONE, TWO}, quiet={ONE: _now() - 60, TWO: _now() + 3_600})
    watch = world.watch()
    watch.watch(ONE)
    watch.watch(TWO)
    await eventually(lambda: bool(world.given_up))
    assert (world.given_up, set(world.asked)) == ([ONE], {ONE})
    world.quiet.clear()
    assert watch._looking is not None
    async with asyncio.timeout(60):
        await watch._looking
    watch.watch(TWO)
    world.quiet[TWO] = _now() - 60
    await eventually(lambda: TWO in world.given_up)
    await watch.close()


async def test_a_replica_that_is_there_is_asked_again() -> None:
    """It may leave later."""
    world = World(quiet={ONE: _now() - 60})
    watch = world.watch()
    watch.watch(ONE)
    await eventually(lambda: len(world.asked) >= 2)
    assert world.given_up == []
    world.left.add(ONE)
    await eventually(lambda: bool(world.given_up))
    await watch.close()


async def test_an_unused_watch_closes() -> None:
    """It never looked."""
    await World().watch().close()

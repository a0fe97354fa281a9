"""The jobs of all replicas, as people see them."""

from __future__ import annotations

import pytest

from coordinator.domain.job_queue import JobQueue
from coordinator.jobs.market_load import MAX_MODELS, MAX_NAME, REPEAT_SECONDS, STALE_SECONDS, Load, MarketLoad


class Own:
    """The market of this process."""

    live, waiting = 5, 3


class Queue(JobQueue):
    """A queue of which only the numbers are known."""

    def __init__(self, counts: dict[str, int]) -> None:
        super().__init__()
        self.counts = counts

    @property
    def models(self) -> list[str]:
        return list(self.counts)

    def count_waiting(self, model: str) -> int:
        return self.counts.get(model, 0)


class World:
    """Two other replicas, and a clock."""

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self.now, self.members = 1_000.0, {"a", "b"}
        self.queue = Queue({} if counts is None else counts)
        self.load = MarketLoad(Own(), self.queue, lambda: self.now)
        self.load.members = lambda: self.members


def test_own_and_other_jobs_are_added() -> None:
    """Of each replica the last word counts, for each model by itself."""
    world = World({"m": 2})
    assert (world.load.jobs, world.load.waiting, world.load.waiting_for("m")) == (5, 3, 2)
    for replica, load in (("a", Load("", 9, 9)), ("a", Load("", 4, 1)), ("b", Load("", 1, 1)), ("a", Load("m", 0, 1))):
        world.load.note(replica, load)
    assert (world.load.jobs, world.load.waiting, world.load.waiting_for("m"), world.load.waiting_for("n")) == (10, 5, 3, 0)
    world.load.note("a", Load("", 0, 0))
    assert (world.load.jobs, world.load.waiting) == (6, 4)


def test_words_become_stale() -> None:
    """A replica that says nothing more has perhaps no connection; one that left the list has no jobs."""
    world = World()
    world.load.note("a", Load("m", 0, 1))
    world.now += STALE_SECONDS
    assert world.load.waiting_for("m") == 1
    world.members.discard("a")
    assert world.load.waiting_for("m") == 0
    world.members.add("a")
    world.now += 0.1
    assert world.load.waiting_for("m") == 0


def test_others_cannot_fill_the_memory() -> None:
    """A replica tells of some models, and nothing is kept of one that is not on the list."""
    world = World()
    for number in range(3 * MAX_MODELS):
        world.load.note("a", Load(f"m{number}", 0, 1))
        world.load.note(f"stranger {number}", Load("", 1, 1))
    assert {replica: len(told) for replica, told in world.load._others.items()} == {"a": MAX_MODELS + 1}
    world.now += STALE_SECONDS + 1
    world.load.note("a", Load("new", 0, 1))
    assert world.load.waiting_for("new") == 1
    world.members.clear()
    world.load.note("a", Load("new", 0, 1))
    assert world.load._others == {}


def test_what_changed_is_told() -> None:
    """Everything now and then; a model for which no job waits any more once."""
    world = World({"m": 2, "n": 1})
    assert world.load.news() == [Load("m", 0, 2), Load("n", 0, 1), Load("", 5, 3)]
    assert world.load.news() == []
    world.queue.counts = {"m": 4}
    assert world.load.news() == [Load("n", 0, 0), Load("m", 0, 4)]
    world.now += REPEAT_SECONDS
    assert world.load.news() == [Load("m", 0, 4), Load("", 5, 3)]


@pytest.mark.parametrize("name", ["x" * (MAX_NAME + 1), ""])
def test_names_that_no_message_carries(name: str) -> None:
    """They are left out, and only the most wanted models are told of."""
    world = World({name: 9} | {f"m{number}": 1 + number for number in range(MAX_MODELS + 5)})
    told = [load.model for load in world.load.news()]
    assert len(told) == MAX_MODELS + 1
    assert name == "" or name not in told
    assert "m0" not in told

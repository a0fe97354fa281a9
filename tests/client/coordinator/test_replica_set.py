"""Where a client reaches its coordinator: the order of the URLs, and what failures change in it."""

from __future__ import annotations

import pytest

from tallystick.client.coordinator.replica_set import (
    DOWN_SECONDS,
    HASTY_REFRESH_SECONDS,
    MAX_TRIES,
    REFRESH_SECONDS,
    ReplicaSet,
)
from tallystick.protocol.replicas import Replica, replica_order
from tallystick.protocol.types import Address

PAYER = Address("0x" + "11" * 20)
SEED = "https://seed.example"
LISTED = [f"https://r{i}.example" for i in range(3)]
ORDER = replica_order(PAYER, LISTED)


def _listed(*urls: str) -> ReplicaSet:
    replicas = ReplicaSet((SEED + "/",), PAYER)
    assert not replicas.learn(Replica(str(i), url) for i, url in enumerate(urls))
    return replicas


def test_a_lone_coordinator() -> None:
    """Its only URL is used, also after a failure, and no list is read again."""
    replicas = _listed()
    replicas.lose(SEED, 0)
    assert (replicas.order(1), replicas.has_several, replicas.is_replicated) == ([SEED], False, False)
    assert not replicas.is_stale(1e9)


def test_the_payers_order_comes_before_the_configured_url() -> None:
    """The listed replicas come in the payer's order; a configured URL that is not listed comes last, a listed one once."""
    assert _listed(*LISTED).order(0) == [*ORDER, SEED]
    assert _listed(*LISTED, SEED).order(0) == replica_order(PAYER, [*LISTED, SEED])


def test_what_failed_comes_last_for_a_while() -> None:
    """A replica that did not answer is tried after the others, until it may be well again or is listed no more."""
    replicas = _listed(*LISTED)
    replicas.lose(ORDER[0], 100)
    assert replicas.order(101) == [*ORDER[1:], SEED, ORDER[0]]
    assert replicas.order(100 + DOWN_SECONDS) == [*ORDER, SEED]
    replicas.learn(Replica("x", url) for url in ORDER[1:])
    assert replicas.order(101) == [*ORDER[1:], SEED]


def test_the_replica_of_a_job_comes_first_while_it_is_well() -> None:
    """Requests about a job go to where it was submitted, unless that is lost or unknown."""
    replicas = _listed(*LISTED)
    assert replicas.order(0, ORDER[1]) == [ORDER[1], ORDER[0], ORDER[2], SEED]
    assert replicas.order(0, "https://gone.example") == [*ORDER, SEED]
    replicas.lose(ORDER[1], 0)
    assert replicas.order(1, ORDER[1]) == [ORDER[0], ORDER[2], SEED, ORDER[1]]


def test_tries_are_bounded() -> None:
    """A request goes to a few replicas at most, however many are listed."""
    assert len(_listed(*(f"https://r{i}.example" for i in range(60))).order(0)) == MAX_TRIES


def test_impostors_are_left_out_while_they_are_listed() -> None:
    """A URL at which another coordinator answers is not used until it has left the list."""
    replicas = _listed(*LISTED)
    replicas.refuse(ORDER[0])
    assert replicas.urls == (*ORDER[1:], SEED)
    replicas.learn(Replica("x", url) for url in LISTED)
    assert replicas.urls == (*ORDER[1:], SEED)
    replicas.learn([])
    replicas.learn(Replica("x", url) for url in LISTED)
    assert replicas.urls == (*ORDER, SEED)


@pytest.mark.parametrize("url", ["http://r0.example", "https://127.0.0.1", "http://localhost:1"])
def test_urls_that_a_coordinator_may_not_list(url: str) -> None:
    """They are not used, and told of."""
    replicas = ReplicaSet((SEED,), PAYER)
    assert replicas.learn([Replica("a", url), Replica("b", LISTED[0])]) == [url]
    assert replicas.urls == (LISTED[0], SEED)


def test_when_the_list_is_read_again() -> None:
    """Every half a minute, and more often while a replica is down."""
    replicas = _listed(*LISTED)
    replicas.read_at = 100.0
    assert not replicas.is_stale(100 + REFRESH_SECONDS - 1)
    assert replicas.is_stale(100 + REFRESH_SECONDS)
    replicas.lose(ORDER[0], 101)
    assert not replicas.is_stale(100 + HASTY_REFRESH_SECONDS - 0.5)
    assert replicas.is_stale(100 + HASTY_REFRESH_SECONDS)

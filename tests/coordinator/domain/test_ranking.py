"""Ranking: a low price without reputation buys no first place, and newcomers get a share, not the market."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from coordinator.domain.ask_book import AskBook, ListedAsk
from coordinator.domain.matching import rank_candidates, shortlist
from coordinator.domain.ranking import (
    EXPLORED,
    Ranked,
    quality_bound,
    rank,
    reliability,
    spread_concurrent,
    spread_near_ties,
    with_exploration,
)
from coordinator.domain.reputation import NEWCOMER_JOBS, Reputation
from coordinator.domain.scoring import ANY_REQUEST, RequestShape, Scorer
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Address
from tests.coordinator.harness import MODEL, START, FakeNode, World, make_ask, make_submission, person, quiet

GOOD, BAD, NEW = person("good"), person("bad"), person("new")


def _prices(price: int) -> dict[str, int]:
    return {"input_price": price, "cached_input_price": price, "output_price": price}


def _stand(book: AskBook, key: Signer, price: int, capacity: Capacity | None = None) -> ListedAsk:
    ask = make_ask(key, **_prices(price))
    book.replace(key.address, [ask], capacity or Capacity(4, 4))
    ranked_providers = book.find(ask.digest)
    assert ranked_providers is not None
    return ranked_providers


def _known(good: int = 0, bad: int = 0, reputation: Reputation | None = None, key: Signer = GOOD) -> Reputation:
    reputation = reputation or Reputation()
    for outcome, number in ((Outcome.COMPLETED, good), (Outcome.PROVIDER_ERROR, bad)):
        for _ in range(number):
            reputation.record(key.address, outcome)
    return reputation


def _rank(entries: list[ListedAsk], reputation: Reputation, shape: RequestShape = ANY_REQUEST) -> list[Ranked[ListedAsk]]:
    scorer = Scorer(shape, reputation.score)
    scorer.refer(entries)
    return rank(entries, lambda entry: entry, scorer)


def _listed(book: AskBook, reputation: Reputation, chance: float = 1.0, **demand: object) -> list[Address]:
    wanted = Demand(MODEL, **demand)  # type: ignore[arg-type]
    for listed_ask in book.of_model(MODEL):
        score = reputation.score(listed_ask.provider)
        book.set_reliability(listed_ask.provider, reliability(score), quality_bound(score))
    ranked_providers = shortlist(book, wanted, START, None, reputation.score, newcomer=reputation.newcomer, chance=chance)
    return [listed_ask.node.provider for listed_ask in ranked_providers]


@pytest.mark.parametrize("good", [0, 1, 30])
@pytest.mark.parametrize("price", [1, 1_000, 1_000_000, 10**12])
def test_a_price_of_zero_does_not_outrank_reputation(price: int, good: int) -> None:
    """A provider that fails at price 0 comes after a reliable one at any price, a newcomer too, in shortlists and matches."""
    book = AskBook()
    listed_asks = [_stand(book, BAD, 0), _stand(book, GOOD, price)]
    reputation = _known(good=good)
    _known(bad=2_000, reputation=reputation, key=BAD)
    assert _listed(book, reputation) == [GOOD.address, BAD.address]
    submission = make_submission(*(listed_ask.ask for listed_ask in listed_asks))
    fit, _ = rank_candidates(submission.candidates, book, tried=(), score=reputation.score, now=START)
    assert [ranked.listed_ask.provider for ranked in fit] == [GOOD.address, BAD.address]


def test_ones_own_price_does_not_make_failing_cheaper() -> None:
    """The cost of a failure does not depend on the failing provider's own price: lowering it gains no more than the price."""
    reputation = _known(good=50)
    _known(good=50, bad=20, reputation=reputation, key=BAD)
    places = []
    for price in (3_000, 1_000, 1, 0):
        book = AskBook()
        _stand(book, BAD, price)
        _stand(book, GOOD, 4_000)
        places.append(_listed(book, reputation))
    assert places == [[GOOD.address, BAD.address]] * 4


@pytest.mark.parametrize(("good", "first"), [(4, NEW), (500, GOOD)])
def test_a_dear_provider_is_not_first_for_a_few_good_jobs(good: int, first: Signer) -> None:
    """At fifty times the price, four good jobs against two do not win the first place; a long record against none does."""
    book, reputation = AskBook(), _known(good=good)
    _known(good=2 if good == 4 else 0, reputation=reputation, key=NEW)
    _stand(book, GOOD, 5_000_000)
    _stand(book, NEW, 100_000)
    assert _listed(book, reputation)[0] == first.address


def test_an_unreliable_provider_at_price_zero_is_not_first() -> None:
    """A provider that fails every other job at price 0 comes after one that hardly fails."""
    book, reputation = AskBook(), _known(good=500)
    for _ in range(250):
        _known(good=1, bad=1, reputation=reputation, key=BAD)
    _stand(book, BAD, 0)
    _stand(book, GOOD, 500_000)
    assert _listed(book, reputation) == [GOOD.address, BAD.address]


def test_among_equals_the_cheaper_comes_first() -> None:
    """If reputations are equal, or nearly, the price decides."""
    book, reputation = AskBook(), Reputation()
    for number, good in enumerate((200, 201, 202)):
        key = person(f"{number}")
        _stand(book, key, 1_000_000 * (number + 1))
        _known(good=good, reputation=reputation, key=key)
    assert _listed(book, reputation) == [person(f"{number}").address for number in range(3)]


def test_strangers_do_not_set_the_price_of_failing() -> None:
    """Asks of strangers at any price do not change the order of known providers."""
    reputation = Reputation()
    for key, good in ((GOOD, 200), (BAD, 190)):
        _known(good=good, reputation=reputation, key=key)
    for price in (0, 10**14):
        book = AskBook()
        _stand(book, GOOD, 1_100_000)
        _stand(book, BAD, 1_000_000)
        for number in range(20):
            _stand(book, person(f"stranger {price} {number}"), price)
        ranked_providers = [entry for entry in _listed(book, reputation) if entry in (GOOD.address, BAD.address)]
        assert ranked_providers == [BAD.address, GOOD.address]


def test_many_cheap_strangers_hide_nobody() -> None:
    """Known providers come first, behind hundreds of newcomers' asks at price 0 and many asks of one provider."""
    book, reputation = AskBook(), _known(good=30)
    for number in range(400):
        _stand(book, person(f"stranger {number}"), 0)
    cheap_seller = person("crowd")
    book.replace(cheap_seller.address, [make_ask(cheap_seller, **_prices(0), seq=seq) for seq in range(256)], Capacity(4, 4))
    _stand(book, GOOD, 5_000_000)
    ranked_providers = _listed(book, reputation)
    assert ranked_providers[0] == GOOD.address
    assert len(ranked_providers) == len(set(ranked_providers)) == 8, "and each provider has one place"


def test_many_cheap_failures_hide_nobody() -> None:
    """Hundreds of cheap providers that are known to fail do not hide others."""
    book, reputation = AskBook(), _known(good=30)
    for number in range(300):
        key = person(f"failing {number}")
        _stand(book, key, 0)
        _known(bad=NEWCOMER_JOBS, reputation=reputation, key=key)
    _stand(book, GOOD, 5_000_000)
    assert _listed(book, reputation)[0] == GOOD.address


@pytest.mark.parametrize("sort", ["latency", "throughput"])
def test_reported_speed_does_not_outrank_reputation(sort: str) -> None:
    """A node's reported speed does not put it before providers with more than twice its score."""
    book, reputation = AskBook(), _known(good=30)
    _stand(book, BAD, 1, Capacity(4, 4, 10**6, 1))
    _stand(book, GOOD, 1, Capacity(4, 4, 10, 900))
    assert _listed(book, reputation, sort=sort) == [GOOD.address, BAD.address]


# Near ties


def test_equal_prices_share_the_jobs() -> None:
    """Each of many providers at nearly the same price comes first about as often, however many there are."""
    book, reputation, random = AskBook(), Reputation(), Random(1)
    for number in range(100):
        _stand(book, person(f"{number}"), 1_000_000 + 10 * number)
    first = Counter(_listed(book, reputation, random.random())[0] for _ in range(2_000))
    assert len(first) > 90
    assert max(first.values()) < 100


def test_of_two_near_ties_the_less_loaded_comes_first() -> None:
    """Providers at equal price get jobs by their load, whatever the draw."""
    book, reputation = AskBook(), Reputation()
    _stand(book, GOOD, 5, Capacity(1, 4))
    _stand(book, NEW, 5, Capacity(2, 4))
    assert {_listed(book, reputation, draw / 10)[0] for draw in range(10)} == {NEW.address}


def test_a_near_tie_costs_a_hundredth_at_most() -> None:
    """A price more than a hundredth above the lowest, or a lower score, is no tie."""
    book, reputation = AskBook(), _known(good=30)
    _known(good=30, reputation=reputation, key=NEW)
    for price, tie in ((1_010_000, True), (1_010_001, False)):
        entries = [_stand(book, GOOD, 1_000_000), _stand(book, NEW, price)]
        firsts = {spread_near_ties(_rank(entries, reputation), d / 10)[0].entry.provider for d in range(10)}
        assert firsts == ({GOOD.address, NEW.address} if tie else {GOOD.address})
    entries = [_stand(book, GOOD, 1_000_000, Capacity(1, 4)), _stand(book, BAD, 1_000_000)]
    assert [ranked.entry for ranked in spread_near_ties(_rank(entries, reputation), 0.5)] == entries


async def test_matches_share_the_jobs_too() -> None:
    """Of a job's candidates at equal price, the one with less load gets it."""
    world = World()
    nodes = [world.node(f"{number}") for number in range(4)]
    jobs = [await world.started(*nodes) for _ in range(4)]
    providers = Counter(client.job.provider for client in jobs)
    assert max(providers.values()) <= 2
    for client in jobs:
        next(node for node in nodes if node.address == client.job.provider).complete(client.job.id)
        await quiet()


# Exploration


def test_concurrent_jobs_begin_at_different_slots() -> None:
    """Of three jobs at once, each of the first three free slots is drawn as often. What follows comes next."""
    book, reputation, keys = AskBook(), Reputation(), [person(f"slot {number}") for number in range(4)]
    entries = [_stand(book, key, 1_000 * (n + 1), Capacity(2 if n == 1 else 1, 2)) for n, key in enumerate(keys)]
    for key in keys:
        _known(good=200, reputation=reputation, key=key)
    ranking, firsts = _rank(entries, reputation), Counter[int]()
    for draw in range(3_000):
        spread = [entries.index(ranked.listed_ask) for ranked in spread_concurrent(ranking, 2, draw / 3_000)]
        first = spread[0]
        assert spread == [*range(first, 4), *range(first)]
        firsts[first] += 1
    assert firsts.keys() == {0, 1}, "the second provider has two slots"
    assert abs(firsts[0] - 1_000) < 50
    assert abs(firsts[1] - 2_000) < 50
    all_firsts = {spread_concurrent(ranking, 64, draw / 100)[0].listed_ask.provider for draw in range(100)}
    assert len(all_firsts) == 4, "more jobs than slots begin at any slot"
    assert spread_concurrent(ranking, 0, 0.9) == ranking


def test_concurrent_jobs_do_not_begin_at_providers_that_mostly_fail() -> None:
    """A provider that mostly fails stays last however many jobs look for a slot; if all do, the jobs spread among them."""
    book, reputation = AskBook(), _known(good=200)
    entries = [_stand(book, GOOD, 1_000), _stand(book, BAD, 1), _stand(book, NEW, 2)]
    for key in (BAD, NEW):
        _known(bad=200, reputation=reputation, key=key)
    for draw in range(50):
        spread = spread_concurrent(_rank(entries, reputation), 10, draw / 50)
        assert spread[0].listed_ask.provider == GOOD.address
        assert {ranked.listed_ask.provider for ranked in spread} == {GOOD.address, BAD.address, NEW.address}
    bad = {spread_concurrent(_rank(entries[1:], reputation), 10, draw / 50)[0].listed_ask.provider for draw in range(50)}
    assert bad == {BAD.address, NEW.address}


def test_newcomers_get_their_share_and_no_more() -> None:
    """A twentieth of the draws puts a newcomer first, evenly among them, however many there are."""
    book, reputation, random = AskBook(), _known(good=30), Random(1)
    listed_asks = [_stand(book, GOOD, 10)] + [_stand(book, person(f"new {number}"), 5) for number in range(4)]
    ranked = _rank(listed_asks, reputation)
    assert ranked[0].entry.provider == GOOD.address
    draws = 20_000
    first = Counter(with_exploration(ranked, reputation.newcomer, random.random())[0].entry.provider for _ in range(draws))
    assert abs(first.total() - first[GOOD.address] - EXPLORED * draws) < 150
    assert all(150 < number < 350 for provider, number in first.items() if provider != GOOD.address)


def test_exploring_costs_the_client_nothing() -> None:
    """A newcomer that is more expensive than the provider it would displace is not put first."""
    book, reputation = AskBook(), _known(good=30)
    _stand(book, GOOD, 10)
    _stand(book, NEW, 11)
    assert _listed(book, reputation, chance=0.0) == [GOOD.address, NEW.address]
    _stand(book, NEW, 10)
    assert _listed(book, reputation, chance=0.0) == [NEW.address, GOOD.address]


def test_among_newcomers_nothing_is_left_to_chance() -> None:
    """If no provider is known yet, the cheapest comes first with any draw."""
    book = AskBook()
    _stand(book, GOOD, 5)
    _stand(book, NEW, 4)
    assert _listed(book, Reputation(), chance=0.0) == [NEW.address, GOOD.address]


def test_a_full_shortlist_has_a_place_for_a_newcomer() -> None:
    """The last place of a full shortlist is a newcomer's, so a match can choose it; a shortlist of one has none to give."""
    book, reputation = AskBook(), Reputation()
    for number in range(9):
        key = person(f"{number}")
        _stand(book, key, 10 + number)
        _known(good=30, reputation=reputation, key=key)
    _stand(book, NEW, 50)
    assert _listed(book, reputation)[-1] == NEW.address
    assert _listed(book, reputation).count(NEW.address) == 1
    assert _listed(book, reputation, limit=1) == [person("0").address]


async def _serve(world: World, node: FakeNode, jobs: int) -> None:
    for _ in range(jobs):
        client = await world.started(node)
        node.complete(client.job.id)
        await quiet()


async def test_a_match_explores_unless_the_client_chose_the_order() -> None:
    """The market draws for each match; an order chosen by the client is kept."""
    world = World()
    known, new = world.node("known"), world.node("new")
    await _serve(world, known, NEWCOMER_JOBS)
    for chance, first in ((EXPLORED, known), (EXPLORED / 2, new)):
        world.chance = chance
        client = await world.started(known, new)
        assert client.job.provider == first.address


async def test_failing_newcomers_are_explored_briefly() -> None:
    """After its first jobs, however they ended, a provider has no share of exploration any more."""
    world = World(chance=0.0)
    known, new = world.node("known"), world.node("new")
    await _serve(world, known, NEWCOMER_JOBS)
    for _ in range(NEWCOMER_JOBS):
        client = await world.started(known, new)
        assert client.job.provider == new.address
        new.fail(client.job.id)
        await quiet()
        known.complete(client.job.id)
        await quiet()
    client = await world.started(known, new)
    assert client.job.provider == known.address

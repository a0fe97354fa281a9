"""Ranking for one request: its own length, output, cache, and what its client values; and who keeps a conversation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from coordinator.domain.ask_book import AskBook
from coordinator.domain.listed_ask import LATENCY_MS, TOKEN_US, ListedAsk, Speed, speed_steps
from coordinator.domain.matching import explain, rank_candidates, shape_of_demand, shortlist
from coordinator.domain.ranking import BAD, quality_bound, reliability
from coordinator.domain.scoring import FAILED_JOBS, FLOOR, LOAD_PART, MICRO, RequestShape, Scorer, ScoreTerms, shape_of
from tallystick.protocol.criteria import Demand, Reason
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Spec
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.weights import Weights
from tests.coordinator.harness import MODEL, START, World, make_ask, make_submission, person, quiet

ANN, BOB = person("ann"), person("bob")


def _stand(
    book: AskBook, key: Signer, prices: tuple[int, int, int], capacity: Capacity | None = None, score: float = 1.0
) -> None:
    input_price, cached, output_price = prices
    ask = make_ask(key, input_price=input_price, cached_input_price=cached, output_price=output_price)
    book.replace(key.address, [ask], capacity or Capacity(4, 4), reliability(score), quality_bound(score))


def _first(book: AskBook, **demand: object) -> Address:
    return shortlist(book, Demand(MODEL, **demand), START)[0].provider  # type: ignore[arg-type]


def test_the_length_of_a_request_decides() -> None:
    """Cheap input wins for a long prompt with a short answer, cheap output for the opposite, whatever the standard price says."""
    book = AskBook()
    _stand(book, ANN, (100_000, 100_000, 4_000_000))
    _stand(book, BOB, (1_000_000, 1_000_000, 1_000_000))
    for number in range(50):
        _stand(book, person(f"{number}"), (2_000_000, 2_000_000, 4_000_000))
    assert _first(book, likely_tokens=100_000, max_output=16) == ANN.address
    assert _first(book, likely_tokens=256, max_output=4_096) == BOB.address


def test_the_expected_output_is_the_mean_of_the_receipts() -> None:
    """A request's limit bounds the expected output, and the mean of the model's receipts is what is expected below it."""
    assert shape_of(100, None, None).output_tokens == 256
    assert shape_of(100, 4_096, 700).output_tokens == 700
    assert shape_of(100, 16, 700).output_tokens == 16
    assert shape_of(0, 16, 700).input_tokens == 48
    assert shape_of(0, 0, 700) == RequestShape(3, 0)
    assert shape_of(100, 0, 700, cached_tokens=9_000).cached_tokens == 100


def test_the_terms_are_what_they_say() -> None:
    """Each term, in millionths of a base unit, for an ask whose figures are known."""
    book = AskBook()
    _stand(book, ANN, (2_000_000, 500_000, 3_000_000), Capacity(1, 4, 64, 256), 0.75)
    (listed_ask,) = book.of_model(MODEL)
    weights = Weights(Amount(1_000), Amount(200), Amount(5_000))
    shape = RequestShape(1_000, 100, weights, ANN.address, 400)
    scorer = Scorer(shape, lambda _: 0.75)
    scorer.refer([listed_ask])
    terms, score, _ = scorer.judge(listed_ask)
    price = 600 * 2_000_000 + 400 * 500_000 + 100 * 3_000_000
    latency, throughput = speed_steps(Speed(256, 64))
    assert (LATENCY_MS[latency], TOKEN_US[throughput]) == (256, 15_625)
    first_token, speed = 1_000 * 256 * 1_000, 200 * 100 * 15_625
    failure = FAILED_JOBS * (price + first_token + speed) + FLOOR * 1_100 + 5_000 * MICRO
    assert terms == ScoreTerms(price, failure // 4, first_token, speed, price * 3 // (4 * LOAD_PART))
    assert (terms.total, score) == (sum(terms), 0.75)
    assert all(isinstance(term, int) for term in terms)
    assert terms.to_json()["price"] == "0.0017"


@pytest.mark.parametrize("sort", ["price", "latency", "throughput"])
@pytest.mark.parametrize("seed", range(12))
def test_the_first_of_the_shortlist_is_the_best_of_all(seed: int, sort: str) -> None:
    """In random books, no ask that fits has a lower score than the first of the shortlist, or by a near tie at most."""
    random = Random(f"{seed} {sort}")
    book, scores = AskBook(), dict[Address, float]()
    for number in range(random.choice((3, 40, 300))):
        key, capacity = (
            person(f"{seed} {number}"),
            Capacity(random.randrange(3), 2, random.choice((0, 9, 80)), random.choice((0, 90, 700))),
        )
        scores[key.address] = score = random.choice((0.1, 0.25, 0.25, 0.6, 0.8, 0.93, 0.95, 1.0))
        asks = [
            make_ask(
                key,
                seq=seq,
                input_price=random.randrange(1, 2_000_000),
                output_price=random.choice((0, random.randrange(4_000_000))),
                spec=Spec(region=random.choice(("eu", "us"))),
            )
            for seq in range(1, random.choice((2, 2, 5)))
        ]
        book.replace(key.address, asks, capacity, reliability(score), quality_bound(score))
    weights = Weights(Amount(random.choice((0, 0, 200))), Amount(random.choice((0, 0, 200))), Amount(random.choice((0, 90))))
    demand = Demand(
        MODEL, sort=sort, weights=weights, likely_tokens=random.choice((64, 8_192)), max_output=random.choice((16, 1_024))
    )
    chosen = shortlist(book, demand, START, None, scores.__getitem__, chance=random.random())
    scorer = Scorer(shape_of_demand(demand), scores.__getitem__)
    free = [entry for entry in book.of_model(MODEL) if entry.node.free]
    scorer.refer(free)

    def total(entry: ListedAsk) -> tuple[bool, int]:
        terms, score, total = scorer.judge(entry)
        assert total == terms.total
        return score < BAD, terms.total

    best, first = min(map(total, free)), total(chosen[0])
    assert first[0] == best[0]
    assert 100 * first[1] <= 103 * best[1]
    assert len({entry.provider for entry in chosen}) == len(chosen) == min(demand.limit, len({entry.provider for entry in free}))


def test_a_second_of_waiting_has_its_price() -> None:
    """A faster provider at a higher price comes first as soon as the weight of its time is worth the difference."""
    book = AskBook()
    _stand(book, ANN, (1_000_000, 0, 1_000_000), Capacity(4, 4, 50, 8_192))
    _stand(book, BOB, (2_000_000, 0, 2_000_000), Capacity(4, 4, 50, 256))
    request = {"likely_tokens": 1_024, "max_output": 16}
    for number in range(50):
        _stand(book, person(f"{number}"), (3_000_000, 0, 3_000_000), Capacity(4, 4, 50, 2_048))
    firsts = [_first(book, weights=Weights(first_token=Amount(weight)), **request) for weight in (0, 10, 1_000)]
    assert firsts == [ANN.address, ANN.address, BOB.address]


def test_equals_share_the_first_place_whatever_they_list() -> None:
    """A provider with 200 equal asks, in one spec or in many, is first as often as one with a single ask."""
    for specs in (1, 200):
        book, random = AskBook(), Random(7)
        crowd = person("crowd")
        asks = [make_ask(crowd, seq=seq, context_tokens=50_000 + seq % specs) for seq in range(1, 201)]
        book.replace(crowd.address, asks, Capacity(4, 4), reliability(1.0), quality_bound(1.0))
        for number in range(24):
            _stand(book, person(f"{number}"), (1_000_000, 1_000_000, 2_000_000))
        firsts = Counter(shortlist(book, Demand(MODEL), START, chance=random.random())[0].provider for _ in range(2_500))
        assert len(firsts) == 25
        assert 25 < firsts[crowd.address] < 250, specs


def test_an_expired_ask_does_not_hide_its_siblings() -> None:
    """If the ask that stands for a provider in the index does not fit, its next one is found; the best one is chosen."""
    book = AskBook()
    asks = [make_ask(ANN, seq=1, input_price=1, output_price=1, valid_until=START), make_ask(ANN, seq=2), make_ask(ANN, seq=3)]
    book.replace(ANN.address, asks, Capacity(0, 4))
    assert shortlist(book, Demand(MODEL), START)[0].ask in asks[1:], "a job can wait for it"
    book.set_capacity(ANN.address, Capacity(4, 4))
    assert shortlist(book, Demand(MODEL), START)[0].ask in asks[1:]


def test_what_a_shortlist_would_wait_for_is_explained_so() -> None:
    """If nobody has a free slot, those that a job can wait for are offered; if somebody has, they are busy."""
    book = AskBook()
    _stand(book, ANN, (1, 1, 1), Capacity(0, 4))
    _stand(book, BOB, (1, 1, 1), Capacity(0, 0))
    demand = Demand(MODEL)

    def reasons() -> dict[Address, Reason | None]:
        explained = explain(book.of_model(MODEL), demand, START, lambda _: 1.0)
        return {ranked.listed_ask.provider: reason for ranked, reason in explained}

    assert reasons() == {ANN.address: None, BOB.address: Reason.BUSY}
    assert [entry.provider for entry in shortlist(book, demand, START)] == [ANN.address]
    book.set_capacity(BOB.address, Capacity(1, 1))
    assert reasons() == {ANN.address: Reason.BUSY, BOB.address: None}


# Who keeps a conversation


def _kept(prices: tuple[int, int], holder: Signer | None, *, cached: int = 0, load: int = 0) -> Address:
    book = AskBook()
    _stand(book, ANN, (prices[0], prices[0] // 10, prices[0]), Capacity(4 - load, 4))
    _stand(book, BOB, (prices[1], prices[1] // 10, prices[1]))
    submission = make_submission(*(book.of_provider(key.address)[0].ask for key in (ANN, BOB)))
    shape = shape_of(1_000, 100, holder=None if holder is None else holder.address, cached_tokens=cached)
    ranking, _ = rank_candidates(
        submission.candidates, book, tried=(), score=lambda _: 1.0, now=START, shape=shape, newcomer=lambda _: False, chance=0.3
    )
    return ranking[0].listed_ask.provider


def test_a_conversation_stays_until_another_is_better_by_the_margin() -> None:
    """The holder is kept at a slightly higher price, and left at a clearly higher one; there is no way back within the margin."""
    assert _kept((1_050_000, 1_000_000), None) == BOB.address
    assert _kept((1_050_000, 1_000_000), ANN) == ANN.address
    assert _kept((1_050_000, 1_000_000), BOB) == BOB.address, "nor does it come back"
    assert _kept((1_120_000, 1_000_000), ANN) == BOB.address
    assert _kept((1_120_000, 1_000_000), BOB) == BOB.address


def test_a_cached_prefix_counts_at_its_price() -> None:
    """A holder that bills most of the input as cached keeps the conversation at more than twice the price."""
    assert _kept((2_500_000, 1_000_000), ANN) == BOB.address
    assert _kept((2_500_000, 1_000_000), ANN, cached=900) == ANN.address


def test_a_full_holder_keeps_nothing() -> None:
    """Without a free slot the holder is no candidate; with one left, it keeps the conversation."""
    assert _kept((1_000_000, 1_000_000), ANN, load=4) == BOB.address
    assert _kept((1_000_000, 1_000_000), ANN, load=3) == ANN.address


async def test_a_match_goes_by_the_hints_of_the_submission() -> None:
    """The market ranks a job's candidates by what the submission says of its request, and keeps the holder."""
    world = World()
    reader = world.node("reader", input_price=100_000, cached_input_price=100_000, output_price=4_000_000)
    writer = world.node("writer", input_price=1_000_000, cached_input_price=1_000_000, output_price=1_000_000)

    async def winner(hints: RankingHints | None) -> Address:
        submission = replace(world.submission(reader, writer), hints=hints)
        client = world.read(await world.market.place_order(submission))
        await quiet()
        node = next(node for node in (reader, writer) if node.address == client.job.provider)
        node.complete(client.job.id)
        await quiet()
        return node.address

    assert await winner(RankingHints(likely_tokens=1_000_000)) == reader.address
    assert await winner(RankingHints(likely_tokens=1)) == writer.address
    assert await winner(None) == writer.address, "its sealed request is short"
    assert await winner(RankingHints(1_000, holder=reader.address)) == reader.address
    assert await winner(RankingHints(1_000, holder=person("nobody").address)) == reader.address

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import get_args

import pytest

from coordinator.domain.ask_book import AskBook
from coordinator.domain.ask_group import price_mix
from coordinator.domain.ask_index import MAX_GROUPS, ModelIndex, group_key
from coordinator.domain.listed_ask import (
    CLASSES,
    FULL_QUALITY,
    NO_PLACE,
    OTHER,
    PROVEN,
    QUEUE_PLACE,
    RELIABLE,
    ListedAsk,
    SlotGroup,
    Speed,
    speed_steps,
)
from coordinator.domain.matching import shape_of_demand
from coordinator.domain.scoring import Scorer
from coordinator.domain.search import perfect_score
from tallystick.protocol.criteria import Demand, Facts, Reason, Sort
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address, Amount, Hash
from tallystick.protocol.weights import Weights
from tests.coordinator.harness import MODEL, START, make_ask, person

KEYS = [person(f"provider {number}") for number in range(12)]
REGIONS, CONTEXTS = ("eu", "us"), (4_096, 32_768)


def _asks(random: Random) -> list[list[Verified[Ask]]]:
    """Returns a few asks of each provider, some of them of another model."""
    return [
        [
            make_ask(
                key,
                model=random.choice((MODEL, MODEL, "other")),
                input_price=random.randrange(1, 2_000_000),
                output_price=random.randrange(2_000_000),
                context_tokens=random.choice(CONTEXTS),
                spec=Spec(region=random.choice(REGIONS), features=random.choice(((), ("Tools",), ("-tools",)))),
                seq=seq,
            )
            for seq in range(1, 4)
        ]
        for key in KEYS
    ]


def _free(index: ModelIndex | None, demand: Demand, reliability: int, draw: float = 0.5) -> list[ListedAsk]:
    """Returns the free asks of a class, in the order of the index. Checks that no ask costs less than a bound said before."""
    scorer = Scorer(shape_of_demand(demand), perfect_score)
    offers = None if index is None else index.free_asks(demand, reliability, scorer, draw)
    if offers is None:
        return []
    assert all(entry.node.quality <= offers.best_quality for _, _, entry in offers)
    yielded = list(offers)
    leads = list(dict.fromkeys(entry for _, _, entry in yielded))
    worths = {entry: (terms := scorer.judge(entry)[0]).price + terms.first_token + terms.speed for entry in leads}
    for place, (bound, _, _) in enumerate(yielded):
        seen = {entry for _, _, entry in yielded[:place]}
        assert all(bound <= worths[entry] for entry in leads if entry not in seen)
    return leads


def _with_siblings(leads: list[ListedAsk]) -> list[ListedAsk]:
    return [entry for lead in leads for entry in (lead, *lead.siblings)]


def _change(book: AskBook, asks: list[list[Verified[Ask]]], random: Random, assigned: list[SlotGroup]) -> None:
    """Makes one change of the kinds that connected nodes, jobs and reputation cause."""
    number = random.randrange(len(KEYS))
    provider = KEYS[number].address
    capacities = {
        group: Capacity(random.randrange(5), 2, random.choice((0, 5, 80)), random.choice((0, 90, 700)), random.choice((0, 0, 2)))
        for group in range(2)
    }
    node = book.node(provider)
    chosen = random.sample(asks[number], random.randrange(4))
    groups = [random.randrange(2) for _ in chosen]
    match random.randrange(7):
        case 0:
            book.replace(provider, chosen, capacities, random.choice((None, *CLASSES)), groups=groups)
        case 1:
            book.replace(provider, chosen, groups=groups)
        case 2 if node is not None:
            book.set_capacity(provider, {group.number: capacities[group.number] for group in node.groups})
        case 3:
            book.set_reliability(provider, random.choice(CLASSES), random.randrange(FULL_QUALITY))
        case 4 if node is not None and node.groups:
            group = random.choice(node.groups)
            book.assign(group)
            assigned.append(group)
        case 6:
            book.set_speed(provider, MODEL, Speed(random.choice((0, 20, 3_000)), random.choice((0, 7, 200))))
        case 5 if assigned and random.random() < 0.7:
            book.release(assigned.pop())
        case _:
            if random.random() < 0.3:
                book.drop(provider)


@pytest.mark.parametrize("seed", range(8))
def test_the_index_has_every_free_ask_that_fits(seed: int) -> None:
    """After any changes, the index yields just the asks of a state that meet a demand, in order, in the class of their provider.

    Nodes have two engines, some of which queue.
    """
    random, book, assigned = Random(seed), AskBook(), list[SlotGroup]()
    asks = _asks(random)
    for _ in range(400):
        _change(book, asks, random, assigned)
        groups = {entry.slot_group for key in KEYS for entry in book.of_provider(key.address)}
        assert book.free_slots == sum(group.free for group in groups), "the count is kept, not made by a walk over all asks"
        require = random.choice((Requirements(), Requirements(region=("EU",)), Requirements(context_tokens=8_000)))
        needs = random.choice((Requirements(), Requirements(features=("tools",)), Requirements(context_tokens=9_000)))
        length = random.choice((0, 4_096, 4_097, random.randrange(40_000)))
        demand = Demand(MODEL, require=require, sort=random.choice(get_args(Sort)), needs=needs, input_tokens=length)
        demand = random.choice((demand, demand.strict or demand))
        weights = Weights(Amount(random.choice((0, 50, 10_000))), Amount(random.choice((0, 50, 10_000))))
        size = random.choice((0, 10, 100_000))
        demand = replace(demand, weights=weights, likely_tokens=size, max_output=random.choice((0, 16, None)))
        judged = [
            (entry, demand.objection(entry.ask.message, Facts(START, free=entry.slot_group.free)))
            for entry in book.of_model(MODEL)
        ]
        fitting = [entry for entry, reason in judged if reason is None]
        index = book.index_of(MODEL)
        busy = [entry for entry, reason in judged if reason is Reason.BUSY]
        for reliability in CLASSES:
            for state in (QUEUE_PLACE, NO_PLACE):
                of_class = (entry for entry in busy if entry.node.reliability == reliability)
                expected = [entry for entry in of_class if bool(entry.slot_group.places) == (state == QUEUE_PLACE)]
                found = [] if index is None else list(index.other_asks(demand, state, reliability, random.random()))
                assert sorted(map(id, found)) == sorted(map(id, expected))
            expected = [entry for entry in fitting if entry.node.reliability == reliability]
            found = _with_siblings(_free(index, demand, reliability, random.random()))
            assert sorted(map(id, found)) == sorted(map(id, expected))


def test_an_empty_book_keeps_nothing() -> None:
    """When all asks are gone, so are the indexes."""
    book, random = AskBook(), Random(1)
    for key, asks in zip(KEYS, _asks(random), strict=True):
        book.replace(key.address, asks, Capacity(1, 1))
    for key in KEYS:
        book.drop(key.address)
    assert (book.size, book.index_of(MODEL), book.index_of("other")) == (0, None, None)


def test_a_slot_that_is_freed_after_the_node_came_back() -> None:
    """A job of a former connection neither lists nor unlists the asks of the new one."""
    book = AskBook()
    book.replace(KEYS[0].address, [make_ask(KEYS[0])], Capacity(1, 1))
    (former,) = book.groups_of((KEYS[0].address, None))
    book.assign(former)
    book.drop(KEYS[0].address)
    book.replace(KEYS[0].address, [make_ask(KEYS[0])], Capacity(0, 1))
    book.release(former)
    index = book.index_of(MODEL)
    assert index is not None
    assert _free(index, Demand(MODEL), OTHER) == []


def test_specs_that_nobody_else_has_hide_no_reliable_provider() -> None:
    """Of more groups than one shortlist considers, those with reliable providers are considered."""
    book = AskBook()
    for number in range(MAX_GROUPS + 50):
        key = person(f"strange {number}")
        book.replace(key.address, [make_ask(key, input_price=0, context_tokens=1_000 + number)], Capacity(1, 1))
    for key, reliability in zip(KEYS, (RELIABLE, PROVEN), strict=False):
        book.replace(key.address, [make_ask(key, context_tokens=100_000 + reliability)], Capacity(1, 1), reliability)
    index = book.index_of(MODEL)
    assert index is not None
    for key, reliability in zip(KEYS, (RELIABLE, PROVEN), strict=False):
        assert [entry.provider for entry in _free(index, Demand(MODEL), reliability)] == [key.address]
    assert len(_free(index, Demand(MODEL), OTHER)) == MAX_GROUPS - 2


def test_a_shortlist_looks_at_few_of_very_many_groups() -> None:
    """However many specs strangers invent, a shortlist looks at a bounded number, and still finds reliable providers."""
    book, looks = AskBook(), list[Ask]()

    class CountingDemand(Demand):
        def spec_objection(self, ask: Ask) -> Reason | None:
            looks.append(ask)
            return Demand.spec_objection(self, ask)

    for number in range(20):
        key = person(f"stranger {number}")
        asks = [make_ask(key, input_price=0, seq=seq, context_tokens=1_000 * (number + 1) + seq) for seq in range(1, 200)]
        book.replace(key.address, asks, Capacity(1, 1))
    book.replace(KEYS[0].address, [make_ask(KEYS[0], context_tokens=100_000)], Capacity(1, 1), OTHER)
    book.set_reliability(KEYS[0].address, RELIABLE)
    index = book.index_of(MODEL)
    assert index is not None
    assert [entry.provider for entry in _free(index, CountingDemand(MODEL), RELIABLE)] == [KEYS[0].address]
    assert len(looks) <= 2 * 1_024
    assert len(index._select(Demand(MODEL), 0.5)) == MAX_GROUPS
    book.set_reliability(KEYS[0].address, OTHER)
    assert _free(index, CountingDemand(MODEL), RELIABLE) == []


def test_near_ties_begin_where_the_draw_says() -> None:
    """Asks within a hundredth of the lowest price are yielded in turn, beginning at the draw; dearer ones follow in order."""
    book = AskBook()
    for number in range(60):
        key = person(f"tie {number}")
        price = 10_000 if number < 40 else 11_000 + number
        book.replace(key.address, [make_ask(key, input_price=0, output_price=price)], Capacity(1, 1))
    index = book.index_of(MODEL)
    assert index is not None
    orders = [_free(index, Demand(MODEL), OTHER, draw) for draw in (0.0, 0.25, 0.5, 0.999)]
    in_order = orders[0]
    assert [entry.price for entry in in_order] == sorted(entry.price for entry in in_order)
    for order, begin in zip(orders, (0, 10, 20, 39), strict=True):
        assert order == in_order[begin:40] + in_order[:begin] + in_order[40:]


def _unsigned(number: int, price: int, spec: Spec) -> Verified[Ask]:
    """An ask of a provider of its own, which nobody signed: signing hundreds takes seconds."""
    message = replace(make_ask(KEYS[0], input_price=price, output_price=2 * price, spec=spec).message, provider=_address(number))
    return Verified(message, bytes(65), Hash(number.to_bytes(32, "big")))


def _address(number: int) -> Address:
    return Address(f"0x{number * 0x9E3779B97F4A7C15 % (1 << 160):040x}")


@pytest.mark.parametrize("seed", range(3))
def test_many_exclusions_find_what_a_scan_finds(seed: int) -> None:
    """Whatever was excluded before, and whoever came and left since, the asks of the others are yielded, each once, in order.

    The list is long enough to remember where the asks of the others begin.
    """
    random, book, spec = Random(seed), AskBook(), Spec(region="eu")
    prices = {number: 1_000_000 + 20_000 * (number // 10) for number in range(1, 701)}
    for number, price in prices.items():
        book.replace(_address(number), [_unsigned(number, price, spec)], Capacity(1, 1))
    index = book.index_of(MODEL)
    assert index is not None
    sets = [frozenset(map(_address, range(1, count))) for count in (3, 30, 300, 650, 701, 100)]
    sets.append(frozenset(map(_address, random.sample(range(1, 701), 400))))
    for step in range(300):
        number = random.randrange(1, 701)
        if random.random() < 0.3:
            prices[number] = random.randrange(900_000, 1_200_000)
            book.replace(_address(number), [_unsigned(number, prices[number], spec)], Capacity(1, 1))
        else:
            book.set_capacity(_address(number), Capacity(random.randrange(2), 1))
        if step % 3:
            continue
        exclude, draw = random.choice(sets), random.random()
        free = [n for n in prices if book.groups_of((_address(n), 0))[0].free and _address(n) not in exclude]
        listed = _free(index, Demand(MODEL, exclude=exclude), OTHER, draw)
        assert sorted(entry.provider for entry in listed) == sorted(map(_address, free))
        tie = next((place for place, entry in enumerate(listed) if entry.price > listed[0].price * 1.03), len(listed))
        assert [entry.price for entry in listed[tie:]] == sorted(entry.price for entry in listed[tie:])


def test_no_spec_is_hidden_by_the_specs_of_others() -> None:
    """Of more specs than one shortlist looks at, each newcomer's is considered by some of the draws."""
    book, random = AskBook(), Random(3)
    for number in range(20):
        key = person(f"stranger {number}")
        asks = [make_ask(key, input_price=0, seq=seq, context_tokens=1_000 * (number + 1) + seq) for seq in range(1, 200)]
        book.replace(key.address, asks, Capacity(1, 1))
    book.replace(KEYS[0].address, [make_ask(KEYS[0], context_tokens=100_000)], Capacity(1, 1))
    index = book.index_of(MODEL)
    assert index is not None
    chosen = [any(entry.provider == KEYS[0].address for entry in _free_groups(index, random.random())) for _ in range(400)]
    assert 5 < sum(chosen) < 100, "it has one of 3,981 specs, of which 256 are considered"


def _free_groups(index: ModelIndex, draw: float) -> list[Ask]:
    return [group.example for group in index._select(Demand(MODEL), draw)]


def test_a_provider_has_one_place_in_a_group() -> None:
    """Of a provider's asks with one spec and price mix, the cheapest stands for the others, tried if it does not fit."""
    book = AskBook()
    asks = [make_ask(KEYS[0], seq=seq, input_price=seq, output_price=2 * seq) for seq in range(1, 100)]
    book.replace(KEYS[0].address, asks, Capacity(1, 1))
    (lead,) = _free(book.index_of(MODEL), Demand(MODEL), OTHER)
    assert lead.ask.message.input_price == 1
    assert len(lead.siblings) == 98


def test_price_mixes_are_apart() -> None:
    """Asks of a cheap input and of a cheap output are in different groups; equal ratios are in one, at any price."""
    mixes = {
        price_mix(make_ask(KEYS[0], input_price=10 * scale, output_price=ratio * scale).message)
        for ratio in (1, 20, 100)
        for scale in (1, 7, 10**6)
    }
    assert len(mixes) == 3
    assert price_mix(make_ask(KEYS[0], input_price=0, output_price=0).message) == 0


@pytest.mark.parametrize("milliseconds", [1, 2, 150, 90_000, 500_000])
def test_speeds_are_compared_in_steps(milliseconds: int) -> None:
    """Twice the time is later, a twentieth more is at most one step; an unknown speed is last."""
    step, _ = speed_steps(Capacity(1, 1, 0, milliseconds))
    assert speed_steps(Capacity(1, 1, 0, 2 * milliseconds))[0] == step + 4
    assert speed_steps(Capacity(1, 1, 0, milliseconds + milliseconds // 20))[0] - step <= 1
    assert step < speed_steps(Capacity(1, 1))[0]
    faster, slower, unknown = (speed_steps(Capacity(1, 1, speed))[1] for speed in (2 * milliseconds, milliseconds, 0))
    assert faster < slower < unknown


def test_a_node_remembers_when_it_was_full() -> None:
    """For recent decisions, a slot group knows whether it had a free slot then; for older ones it does not."""
    book = AskBook()
    book.decisions = 3
    book.replace(KEYS[0].address, [make_ask(KEYS[0])], Capacity(1, 1))
    (group,) = book.groups_of((KEYS[0].address, None))
    assert group.changes == (), "nothing is known of what was before"
    for decision, change in ((5, book.assign), (7, book.release)):
        book.decisions = decision
        change(group)
    book.replace(KEYS[0].address, [make_ask(KEYS[0], seq=2)])
    assert [group.was_free(decision) for decision in range(2, 10)] == [None, True, True, False, False, True, True, True]
    for decision in range(100, 200):
        book.decisions = decision
        (book.release if decision % 2 else book.assign)(group)
    assert len(group.changes) == 32
    assert group.was_free(100) is None


def test_a_route_in_capitals_hides_no_other_ask() -> None:
    """Routes are compared with their case, so asks that write one differently are told apart."""
    book = AskBook()
    for key, route in zip(KEYS, ("/v1/MESSAGES", "/v1/messages"), strict=False):
        book.replace(key.address, [make_ask(key, spec=Spec(features=(route,)))], Capacity(1, 1))
    index = book.index_of(MODEL)
    assert index is not None
    found = _free(index, Demand(MODEL, route="/v1/messages"), OTHER)
    assert [entry.provider for entry in found] == [KEYS[1].address]


def test_a_precision_is_one_whatever_its_spelling() -> None:
    """Asks that spell a class differently are one group, which a demand in a third spelling finds."""
    book = AskBook()
    for key, precision in zip(KEYS, ("bf16", "bfloat16", "torch.BFloat16", "fp16"), strict=False):
        book.replace(key.address, [make_ask(key, spec=Spec(precision=precision))], Capacity(1, 1))
    index = book.index_of(MODEL)
    for wanted, providers in (("BF16", KEYS[:3]), ("bfloat16", KEYS[:3]), ("half", KEYS[3:4]), ("fp8", [])):
        demand = Demand(MODEL, require=Requirements(precision=(wanted,)))
        assert {entry.provider for entry in _free(index, demand, OTHER)} == {key.address for key in providers}
    assert len({group_key(entry.message) for entry in book.of_model(MODEL)}) == 2

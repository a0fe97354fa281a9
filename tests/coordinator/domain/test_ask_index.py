from __future__ import annotations

from random import Random
from typing import get_args

import pytest

from coordinator.domain.ask_book import AskBook
from coordinator.domain.ask_index import MAX_GROUPS
from coordinator.domain.slot_groups import CLASSES, NO_PLACE, OTHER, PROVEN, QUEUE_PLACE, RELIABLE, SlotGroup, speed_steps
from tallystick.protocol.criteria import Demand, Facts, Reason, Sort
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.requirements import Requirements
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
    match random.randrange(6):
        case 0:
            book.replace(provider, chosen, capacities, random.choice((None, *CLASSES)), groups=groups)
        case 1:
            book.replace(provider, chosen, groups=groups)
        case 2 if node is not None:
            book.set_capacity(provider, {group.number: capacities[group.number] for group in node.groups})
        case 3:
            book.set_reliability(provider, random.choice(CLASSES))
        case 4 if node is not None and node.groups:
            group = random.choice(node.groups)
            book.assign(group)
            assigned.append(group)
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
        require = random.choice((Requirements(), Requirements(region=("EU",)), Requirements(context_tokens=8_000)))
        needs = random.choice((Requirements(), Requirements(features=("tools",)), Requirements(context_tokens=9_000)))
        length = random.choice((0, 4_096, 4_097, random.randrange(40_000)))
        demand = Demand(MODEL, require=require, sort=random.choice(get_args(Sort)), needs=needs, input_tokens=length)
        demand = random.choice((demand, demand.strict or demand))
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
                found = [] if index is None else list(index.other_asks(demand, state, reliability))
                assert sorted(map(id, found)) == sorted(map(id, expected))
                assert [entry.by_price for entry in found] == sorted(entry.by_price for entry in found)
            expected = [entry for entry in fitting if entry.node.reliability == reliability]
            found = [] if index is None else list(index.free_asks(demand, reliability, random.random()))
            assert sorted(map(id, found)) == sorted(map(id, expected))
            keys = [getattr(entry, f"by_{demand.sort}") for entry in found]
            assert keys == sorted(keys)


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
    assert list(index.free_asks(Demand(MODEL), OTHER, 0.0)) == []


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
        assert [entry.provider for entry in index.free_asks(Demand(MODEL), reliability, 0.5)] == [key.address]
    assert sum(1 for _ in index.free_asks(Demand(MODEL), OTHER, 0.5)) == MAX_GROUPS - 2


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
    assert [entry.provider for entry in index.free_asks(CountingDemand(MODEL), RELIABLE, 0.5)] == [KEYS[0].address]
    assert len(looks) <= 2 * 1_024
    assert len(index._select(Demand(MODEL))) == MAX_GROUPS
    book.set_reliability(KEYS[0].address, OTHER)
    assert list(index.free_asks(CountingDemand(MODEL), RELIABLE, 0.5)) == []


def test_near_ties_begin_where_the_draw_says() -> None:
    """Asks within a hundredth of the lowest price are yielded in turn, beginning at the draw; dearer ones follow in order."""
    book = AskBook()
    for number in range(60):
        key = person(f"tie {number}")
        price = 10_000 if number < 40 else 11_000 + number
        book.replace(key.address, [make_ask(key, input_price=0, output_price=price)], Capacity(1, 1))
    index = book.index_of(MODEL)
    assert index is not None
    orders = [list(index.free_asks(Demand(MODEL), OTHER, draw)) for draw in (0.0, 0.25, 0.5, 0.999)]
    in_order = orders[0]
    assert [entry.price for entry in in_order] == sorted(entry.price for entry in in_order)
    for order, begin in zip(orders, (0, 10, 20, 39), strict=True):
        assert order == in_order[begin:40] + in_order[:begin] + in_order[40:]


@pytest.mark.parametrize("milliseconds", [1, 2, 150, 90_000, 10**9])
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
    found = index.free_asks(Demand(MODEL, route="/v1/messages"), OTHER, 0.0)
    assert [entry.provider for entry in found] == [KEYS[1].address]

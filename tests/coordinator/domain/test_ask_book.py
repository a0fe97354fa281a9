from __future__ import annotations

from coordinator.domain.ask_book import MAX_FORMER_ASKS, AskBook
from coordinator.domain.listed_ask import ConnectedNode, SlotGroup
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Spec
from tests.coordinator.harness import MODEL, make_ask, person

ANN, BOB = person("ann"), person("bob")
FREE = Capacity(2, 2)


def _prices(book: AskBook, model: str = MODEL) -> list[int]:
    return [listed_ask.ask.message.output_price for listed_ask in book.of_model(model)]


def test_asks_stand_cheapest_first() -> None:
    """A model's asks are sorted by the price of three input tokens and one output token, in any order of arrival."""
    book = AskBook()
    for name, price in (("a", 30), ("b", 10), ("c", 20)):
        key = person(name)
        book.replace(key.address, [make_ask(key, input_price=1, output_price=price)], FREE)
    assert _prices(book) == [10, 20, 30]


def test_equal_prices_are_ordered_by_address() -> None:
    """Asks of equal price have a defined order, so every process ranks alike."""
    for keys in ((ANN, BOB), (BOB, ANN)):
        book = AskBook()
        for key in keys:
            book.replace(key.address, [make_ask(key)], FREE)
        assert [entry.node.provider for entry in book.of_model(MODEL)] == sorted((ANN.address, BOB.address))


def test_new_asks_take_the_place_of_all_old_ones() -> None:
    """Replacing a provider's asks removes what it offered before, from every model and from the digests."""
    book = AskBook()
    old = make_ask(ANN, model="old")
    book.replace(ANN.address, [old, make_ask(ANN, model="both")], FREE)
    new = make_ask(ANN, model="both", seq=2)
    book.replace(ANN.address, [new])
    assert [name for name, _ in book.models()] == ["both"]
    assert book.find(old.digest) is None
    assert book.size == 1
    listed_ask = book.find(new.digest)
    assert listed_ask is not None
    assert listed_ask.slot_group.capacity == FREE


def test_one_provider_may_sell_a_model_twice() -> None:
    """Asks of one provider for one model are listed side by side, duplicates too, and all are dropped with it."""
    book = AskBook()
    twice = make_ask(ANN, output_price=5)
    book.replace(ANN.address, [make_ask(ANN, output_price=9), twice, twice], FREE)
    book.replace(BOB.address, [make_ask(BOB, output_price=5)], FREE)
    assert _prices(book) == [5, 5, 5, 9]
    book.drop(ANN.address)
    assert [entry.node.provider for entry in book.of_model(MODEL)] == [BOB.address]


def test_a_node_that_left_leaves_nothing() -> None:
    """Dropping a provider forgets its node and its asks; dropping it again changes nothing."""
    book = AskBook()
    book.replace(ANN.address, [make_ask(ANN)], FREE)
    book.drop(ANN.address)
    book.drop(ANN.address)
    assert (book.size, book.node(ANN.address), list(book.models())) == (0, None, [])


def test_free_slots_are_the_least_that_can_be_known() -> None:
    """A node's free slots are what it reports, minus jobs that it may not have counted yet; never below zero."""
    node = SlotGroup(ConnectedNode(ANN.address), 0, Capacity(free=2, slots=4))
    assert node.free == 2
    node.assigned = 3
    assert node.free == 1
    node.assigned = 9
    assert node.free == 0


def test_a_node_keeps_its_jobs_when_its_asks_change() -> None:
    """New asks keep the assigned jobs of each slot group; its capacity changes only if reported."""
    book = AskBook()
    book.replace(ANN.address, [make_ask(ANN)], FREE)
    node = book.node(ANN.address)
    assert node is not None
    (group,) = node.groups
    book.assign(group)
    book.replace(ANN.address, [make_ask(ANN, seq=2)], Capacity(1, 1))
    assert book.node(ANN.address) is node
    assert (node.groups, group.assigned, group.capacity) == ((group,), 1, Capacity(1, 1))


def test_the_asks_of_some_providers() -> None:
    """The asks of named providers for a model are found without scanning all others."""
    book = AskBook()
    ann, bob = make_ask(ANN), make_ask(BOB)
    book.replace(ANN.address, [ann, make_ask(ANN, model="other")], FREE)
    book.replace(BOB.address, [bob], FREE)
    listed_ask = book.of_providers(MODEL, [ANN.address, person("stranger").address])
    assert [listed_ask.ask for listed_ask in listed_ask] == [ann]


def test_a_replaced_ask_can_still_be_ordered() -> None:
    """Orders may name an ask that its node replaced lately, since the node accepts them; not one whose model it withdrew."""
    book = AskBook()
    old, gone = make_ask(ANN, seq=1), make_ask(ANN, model="withdrawn")
    book.replace(ANN.address, [old, gone], FREE)
    book.replace(ANN.address, [make_ask(ANN, seq=2)])
    listed_ask = book.find(old.digest)
    assert listed_ask is not None
    assert listed_ask.node is book.node(ANN.address)
    assert (book.find(gone.digest), book.size, len(book.of_model(MODEL))) == (None, 1, 1)
    book.replace(ANN.address, [old])
    assert [entry.ask for entry in book.of_model(MODEL)] == [old]
    book.drop(ANN.address)
    assert book.find(old.digest) is None


def test_few_replaced_asks_are_kept() -> None:
    """Only the last replaced asks of a node can be ordered, and nothing of the others stays."""
    book = AskBook()
    asks = [make_ask(ANN, seq=seq) for seq in range(1, MAX_FORMER_ASKS + 5)]
    for ask in asks:
        book.replace(ANN.address, [ask], FREE)
    known = [book.find(ask.digest) is not None for ask in asks]
    assert known == [False] * 3 + [True] * (MAX_FORMER_ASKS + 1)
    book.replace(ANN.address, [])
    assert not any(book.find(ask.digest) for ask in asks)


def test_asks_have_equal_values_in_common() -> None:
    """Many nodes sell the same product, so the book keeps its values once. What was signed stays as it was."""
    book, base = AskBook(), 1_900_000_000
    asks = [make_ask(key, valid_until=base + int(second), spec=Spec(engine="vllm")) for key, second in ((ANN, "7"), (BOB, "7"))]
    for ask in asks:
        book.replace(ask.message.provider, [ask], Capacity(1, 1))
    (first,), (second,) = (book.of_provider(ask.message.provider) for ask in asks)
    assert first.message.valid_until is second.message.valid_until
    assert first.message.spec is second.message.spec
    assert [first.ask, second.ask] == asks


def test_a_slot_group_keeps_each_part_of_a_capacity() -> None:
    """The capacity that a group returns is the one that was reported; jobs change what is left of it, not the report."""
    reported = Capacity(free=3, slots=2, tokens_per_second=7, first_token_ms=11, queue=5)
    group = SlotGroup(ConnectedNode(ANN.address), 0, reported)
    assert (group.capacity, group.places, group.taken) == (reported, 3, 4)
    group.assigned = 6
    assert (group.capacity, group.places, group.taken) == (reported, 1, 6)
    group.assigned = 9
    assert (group.places, group.taken) == (0, 7)
    group.assigned, group.capacity = 0, Capacity(2, 2)
    assert (group.places, group.taken, group.load) == (2, 0, 0.0)
    group.capacity = Capacity(4, 2)
    assert (group.places, group.taken) == (2, 0), "no more than its slots"

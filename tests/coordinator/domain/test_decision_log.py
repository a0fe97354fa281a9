from __future__ import annotations

import pytest

from coordinator.domain.ask_book import AskBook
from coordinator.domain.decision_log import _MAX_JUDGED, MAX_DECISIONS, DecisionLog
from coordinator.domain.matching import shape_of_demand, shortlist
from tallystick.protocol.criteria import Demand, Reason
from tallystick.protocol.errors import TallyError
from tallystick.protocol.link import Capacity
from tallystick.protocol.messages import Spec
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Address
from tests.coordinator.harness import MODEL, START, FakeNode, World, make_ask, person, quiet
from tests.coordinator.live_server import Served


def _why(world: World, node: FakeNode) -> list[tuple[str, bool, str]]:
    verdicts = world.market.decision_log.verdicts(node.address, world.market.book, 50)
    assert all(verdict.model == MODEL for verdict in verdicts)
    return [(verdict.stage, verdict.won, verdict.why) for verdict in verdicts]


async def test_shortlists_say_why(world: World) -> None:
    """Each node gets its reason: its rank, too expensive, busy, or displaced by cheaper providers."""
    cheap, dear, busy = world.node("ann"), world.node("bob", output_price=9_000_000), world.node("eve", output_price=3_000_000)
    world.market.matchmaker.set_capacity(busy.address, Capacity(0, 4))
    world.market.matchmaker.shortlist(Demand(MODEL, max_output_price=5_000_000))
    world.market.matchmaker.shortlist(Demand(MODEL, limit=1))
    assert _why(world, cheap) == [
        ("shortlist", True, "offered to the client, place 1 of 1"),
        ("shortlist", True, "offered to the client, place 1 of 1"),
    ]
    assert _why(world, dear) == [
        ("shortlist", False, "cheaper or more reliable providers filled the shortlist"),
        ("shortlist", False, "its output price is above the client's maximum"),
    ]
    assert _why(world, busy)[-1] == ("shortlist", False, "no free slot now")


async def test_a_shortlist_that_found_nobody(world: World) -> None:
    """The reason is recorded even if the client got an error."""
    node = world.node("ann")
    with pytest.raises(TallyError):
        world.market.matchmaker.shortlist(Demand(MODEL, max_input_price=1))
    assert _why(world, node) == [("shortlist", False, "its input price is above the client's maximum")]


async def test_a_node_that_was_full_is_told_so_later(world: World) -> None:
    """The reason is that of the time of the decision, also for an ask that the shortlist did not look at."""
    node, other = world.node("ann"), world.node("bob", output_price=9_000_000)
    maker = world.market.matchmaker
    for capacity in (Capacity(0, 4), Capacity(4, 4), Capacity(0, 4)):
        maker.set_capacity(node.address, capacity)
        maker.shortlist(Demand(MODEL, limit=1))
    assert [why for _, _, why in _why(world, node)] == [
        "no free slot now",
        "offered to the client, place 1 of 1",
        "no free slot now",
    ]
    assert [won for _, won, _ in _why(world, other)] == [True, False, True]


async def test_a_node_that_declares_too_little(world: World) -> None:
    """A node learns that it would have been chosen if its ask had declared what the request needs."""
    node, other = world.node("ann"), world.node("bob", output_price=9_000_000, spec=Spec(features=("tools",)))
    world.market.matchmaker.shortlist(Demand(MODEL, needs=Requirements(features=("tools",))))
    assert _why(world, node) == [("shortlist", False, Reason.UNDECLARED.value)]
    assert _why(world, other)[0][1]
    other.leave()
    world.market.matchmaker.shortlist(Demand(MODEL, needs=Requirements(features=("tools",))))
    assert _why(world, node)[0][1]


async def test_decisions_at_other_prices(world: World) -> None:
    """A provider sees what the shortlists would have been at another price: by the demand's own limits, and by the others'."""
    node = world.node("ann", input_price=3_000_000, output_price=9_000_000)
    maker = world.market.matchmaker
    with pytest.raises(TallyError):
        maker.shortlist(Demand(MODEL, max_output_price=1_000_000))
    world.node("bob", input_price=500_000, output_price=500_000)
    maker.shortlist(Demand(MODEL, limit=1))
    maker.shortlist(Demand(MODEL, limit=2, exclude=frozenset({person("bob").address})))

    def won(output_price: int, input_price: int = 500_000) -> list[bool]:
        prices = (input_price, output_price)
        verdicts = world.market.decision_log.verdicts(node.address, world.market.book, 50, prices)
        assert {verdict.stage for verdict in verdicts} == {"shortlist"}
        return [verdict.won for verdict in reversed(verdicts)]

    assert won(1_000_001) == [False, False, True]
    assert won(1_000_000) == [True, False, True]
    assert won(500_000) == [True, False, True], "an equal price displaces nobody"
    assert won(499_999) == [True, True, True]


async def test_other_prices_are_not_judged_for_the_time_before_a_node_connected(world: World) -> None:
    """A node that came back learns what it was told before. What other prices would have meant then is not known, nor told."""
    ann, maker, log = world.node("ann"), world.market.matchmaker, world.market.decision_log
    maker.shortlist(Demand(MODEL))
    ann.leave()
    world.node("bob")
    maker.shortlist(Demand(MODEL))
    ann.connect()
    assert [verdict.won for verdict in log.verdicts(ann.address, world.market.book, 9)] == [False, True]
    assert log.verdicts(ann.address, world.market.book, 9, (1, 1)) == []
    maker.shortlist(Demand(MODEL))
    assert [verdict.won for verdict in log.verdicts(ann.address, world.market.book, 9, (1, 1))] == [True]


async def test_matches_say_why(world: World) -> None:
    """The log shows which provider got the job, and why the others did not, for a second attempt too."""
    ann, bob = world.node("ann"), world.node("bob", output_price=3_000_000)
    client = await world.started(ann, bob)
    assert _why(world, ann) == [("match", True, "got the job")]
    assert _why(world, bob) == [("match", False, "another was ranked before it: cheaper, or more reliable")]
    ann.fail(client.job.id)
    await quiet()
    assert _why(world, ann)[0] == ("match", False, "it has or had this job already")
    assert _why(world, bob)[0] == ("match", True, "got the job")
    bob.complete(client.job.id)
    await quiet()


async def test_a_payer_without_money(world: World) -> None:
    """The reason says that the payer lacked funds."""
    node = world.node("ann")
    world.funds.free.clear()
    with pytest.raises(TallyError):
        await world.place(node)
    assert _why(world, node) == [("match", False, "the payer's purse did not cover the job")]


def test_memory_is_bounded() -> None:
    """Only the last decisions are kept, and the newest is returned first."""
    world, decision_log, someone = World(), DecisionLog(), Address("0x" + "ab" * 20)
    for number in range(MAX_DECISIONS + 50):
        decision_log.add_match(MODEL, someone, {}, number)
    verdicts = decision_log.verdicts(someone, world.market.book, 10**6)
    assert (len(verdicts), verdicts[0].at, verdicts[-1].at) == (MAX_DECISIONS, MAX_DECISIONS + 49, 50)
    assert len(decision_log.verdicts(someone, world.market.book, 7)) == 7


async def test_the_route(at: Served) -> None:
    """Anyone may ask; a provider that was never listed has no verdicts."""
    node = at.world.node("ann")
    at.world.market.matchmaker.shortlist(Demand(MODEL))
    body = (await at.http.get(f"/v1/providers/{node.address}/why")).json()
    assert (body["connected"], [decision["won"] for decision in body["decisions"]]) == (True, [True])
    stranger = (await at.http.get(f"/v1/providers/0x{'ee' * 20}/why")).json()
    assert (stranger["connected"], stranger["decisions"]) == (False, [])
    assert (await at.http.get("/v1/providers/nobody/why")).status_code == 400
    route = f"/v1/providers/{node.address}/why"
    repriced = (await at.http.get(route, params={"inputPrice": 1, "outputPrice": 1})).json()
    assert [decision["why"] for decision in repriced["decisions"]] == ["would have been offered to the client at this price"]
    assert (await at.http.get(route, params={"inputPrice": 1})).json()["decisions"] == repriced["decisions"]


async def test_an_answer_judges_a_bounded_number_of_asks(world: World) -> None:
    """A provider with very many asks is told of fewer decisions: nobody keeps the coordinator busy with a question."""
    key, other = person("many"), world.node("bob")
    maker, log = world.market.matchmaker, world.market.decision_log
    maker.replace_asks(key.address, [make_ask(key, input_price=9_000_000, seq=seq) for seq in range(256)], Capacity(1, 1))
    for _ in range(60):
        maker.shortlist(Demand(MODEL, max_input_price=2_000_000))
    assert len(log.verdicts(key.address, maker.book, 500, (9_000_000, None))) == _MAX_JUDGED // 256
    assert len(log.verdicts(other.address, maker.book, 500)) == 60


async def test_a_verdict_has_the_terms_of_its_ranking() -> None:
    """A provider sees how its ask was ranked, and how the one that came first was, in shortlists and in matches."""
    world = World()
    cheap, dear = (
        world.node("cheap"),
        world.node("dear", input_price=3_000_000, cached_input_price=3_000_000, output_price=9_000_000),
    )
    world.market.matchmaker.shortlist(Demand(MODEL, likely_tokens=1_000, max_output=100))
    await world.started(cheap, dear)
    for place, prices in ((0, None), (1, ("0.0039", "0.0012"))):
        own, first = (world.market.decision_log.verdicts(node.address, world.market.book, 9)[place] for node in (dear, cheap))
        assert own.score is not None
        assert first.score is not None
        assert own.best == first.score == first.best != own.score
        assert prices in (None, (own.score["price"], first.score["price"]))


def test_a_busy_provider_that_a_job_could_wait_for_is_not_called_busy() -> None:
    """If a shortlist has only providers without a free slot, another one without it was outdone by them, not left out as busy."""
    book, decisions = AskBook(), DecisionLog()
    for number in range(3):
        key = person(f"{number}")
        book.replace(key.address, [make_ask(key, output_price=1_000_000 * (number + 1))], Capacity(0, 4))
    demand = Demand(MODEL, limit=2)
    decisions.add_shortlist(demand, shortlist(book, demand, START), [], START)
    (verdict,) = decisions.verdicts(person("2").address, book, 9)
    assert (verdict.won, verdict.why) == (False, "cheaper or more reliable providers filled the shortlist")
    (verdict,) = decisions.verdicts(person("2").address, book, 9, (None, 1))
    assert verdict.won


def test_at_another_price_the_request_decides() -> None:
    """Whether a price would have won depends on the request: cheap input wins a long prompt, not a long answer."""
    book, decisions = AskBook(), DecisionLog()
    for number in range(2):
        key = person(f"{number}")
        book.replace(key.address, [make_ask(key, input_price=1_000_000, output_price=2_000_000)], Capacity(4, 4))
    ann = person("ann")
    book.replace(ann.address, [make_ask(ann, input_price=9_000_000, output_price=9_000_000)], Capacity(4, 4))
    for tokens, output, wins in ((100_000, 16, True), (64, 4_096, False)):
        demand = Demand(MODEL, limit=2, likely_tokens=tokens, max_output=output)
        shape = shape_of_demand(demand, 4_096)
        decisions.add_shortlist(demand, shortlist(book, demand, START, mean_output=4_096), [], START, shape=shape)
        assert decisions.verdicts(ann.address, book, 1, (500_000, 5_000_000))[0].won is wins

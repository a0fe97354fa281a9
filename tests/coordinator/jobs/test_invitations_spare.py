"""No job waits while a slot is free that its client accepts and that costs no more: however few providers it ordered on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from coordinator.domain.listed_ask import ListedAsk
from coordinator.domain.reputation import ProviderRecord
from coordinator.jobs.invitations import ANSWER_SECONDS
from tallystick.protocol.criteria import Demand
from tallystick.protocol.link import read_ask
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.queue_place import MAX_INVITATIONS, QueuePlace
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import CAP, MODEL, PAYER, Client, FakeNode, World, quiet

EU, US, EU_FP8 = Spec(region="eu"), Spec(region="us"), Spec(region="EU", precision="fp8", features=("tools", "-vision"))


@pytest.fixture
def world() -> World:
    """A market whose payer can pay for many jobs."""
    world = World()
    world.funds.free[PAYER.address] = Amount(1_000 * CAP)
    return world


def _invited(client: Client) -> list[Ask]:
    """The asks that a client was told of while its job waited."""
    places = [QueuePlace.loads(payload) for kind, payload in client.frames if kind is Kind.BEAT and payload]
    return [read_ask(ask).message for place in places for ask in place.asks]


def _providers(client: Client) -> list[Address]:
    return [ask.provider for ask in _invited(client)]


@dataclass
class Answering:
    """Clients that order on each ask that they are invited to, if it is of the region that they need."""

    world: World
    regions: dict[bytes, str] = field(default_factory=dict)
    ordered: set[tuple[bytes, Address]] = field(default_factory=set)

    async def answer(self) -> None:
        """Answers all invitations, also those that follow from the answers."""
        nodes, before = {node.address: node for node in self.world.nodes}, -1
        while before != len(self.ordered):
            before = len(self.ordered)
            for client in self.world.clients:
                for ask in _invited(client):
                    key = client.job.id, ask.provider
                    region = self.regions.get(client.job.id)
                    if key in self.ordered or client.job.queued is None or (region and ask.spec.region.lower() != region):
                        continue
                    self.ordered.add(key)
                    candidate = self.world.submission(nodes[ask.provider], job=client.job.id).candidates[0]
                    await self.world.market.add_orders(client.job.id, [candidate])
                    await quiet()


async def _pass_seconds(world: World, clients: Answering | None = None) -> None:
    """Lets clients answer, and invitations lapse several times."""
    for _ in range(3 * int(ANSWER_SECONDS) + 1):
        for client in world.clients:
            if client.job.at_node:
                _node_of(world, client).accept(client.job.id)
                _node_of(world, client).chunk(client.job.id)
        if clients is not None:
            await clients.answer()
        await world.pass_time(1)


def _node_of(world: World, client: Client) -> FakeNode:
    return next(node for node in world.nodes if node.address == client.job.provider)


async def _end_all(world: World) -> None:
    while running := [client for client in world.clients if client.job.at_node and not client.ended]:
        for client in running:
            _node_of(world, client).complete(client.job.id)
            await quiet()
    assert all(client.kinds[-1] is Kind.RECEIPT for client in world.clients)
    world.assert_idle()


async def test_a_burst_on_few_providers_uses_all_slots_at_once(world: World) -> None:
    """Forty jobs that all ordered on the same two providers get forty slots: no clock moves and no slot is freed."""
    nodes = [world.node(f"node {number}", slots=2) for number in range(20)]
    clients = [await world.started(*nodes[:2]) for _ in range(40)]
    await Answering(world).answer()
    assert all(client.job.at_node for client in clients)
    assert all(len(_providers(client)) <= 1 for client in clients), "each waiting job is told of one slot of its own"
    await _end_all(world)


@pytest.mark.parametrize("seed", range(3))
async def test_a_burst_is_spread_over_the_best_free_slots(world: World, seed: int) -> None:
    """Of thirty jobs at once on sixty slots at different prices, two in three or more get one of the thirty cheapest at once.

    All shortlists are made before the first job arrives. Without the number of concurrent jobs, three would get a slot.
    """
    random, nodes = Random(seed), dict[Address, FakeNode]()
    for number in range(60):
        price = 1_000_000 + 40_000 * number
        node = world.node(f"node {number}", slots=1, input_price=price, output_price=2 * price)
        nodes[node.address] = node
    shortlists = []
    for _ in range(30):
        world.chance = random.random()
        listed = world.market.matchmaker.shortlist(Demand(MODEL, limit=3, concurrent=29))
        shortlists.append([nodes[listed_ask.provider] for listed_ask in listed])
    world.chance = 1.0
    for shortlist in shortlists:
        await world.started(*shortlist)
    assert sum(client.job.at_node for client in world.clients) >= 20
    assert all(list(nodes).index(client.job.provider) < 32 for client in world.clients if client.job.at_node)
    await Answering(world).answer()
    await _end_all(world)


@pytest.mark.parametrize("spec", [US, Spec(), EU_FP8], ids=["another region", "undeclared", "more features"])
async def test_asks_like_those_ordered_on_come_first(world: World, spec: Spec) -> None:
    """Among many cheaper asks of another product, a job is invited to the free ask that is like those that it ordered on.

    An ask that declares more is like them too.
    """
    ann = world.node("ann", slots=1, spec=EU)
    first, second = await world.started(ann), None
    for number in range(200):
        world.node(f"cheap {number}", slots=1, input_price=500_000 - number, output_price=1_000, spec=spec)
    alike = world.node("alike", slots=1, spec=EU)
    second = await world.started(ann)
    likely = spec is EU_FP8
    assert (_providers(second)[0] == alike.address) is not likely
    assert len(_providers(second)) == 1
    world.market.cancel(first.job.id)
    world.market.cancel(second.job.id)


async def test_unlike_asks_leave_room_for_those_that_fit(world: World) -> None:
    """Nodes of another region that become free use up at most half of a job's invitations; the one that fits is still named."""
    ann = world.node("ann", slots=1, spec=EU)
    await world.started(ann)
    waiting = await world.started(ann)
    for number in range(3 * MAX_INVITATIONS):
        world.node(f"far {number}", slots=1, spec=US)
    await quiet()
    await _pass_seconds(world)
    assert len(_providers(waiting)) == MAX_INVITATIONS // 2
    near = world.node("near", slots=1, spec=EU)
    await quiet()
    assert _providers(waiting)[-1] == near.address
    await Answering(world, {waiting.job.id: "eu"}).answer()
    assert waiting.job.provider == near.address
    await _end_all(world)


async def test_a_job_whose_provider_failed_is_invited_to_a_free_one(world: World) -> None:
    """A job whose attempt failed, and whose other provider is busy, is told of a free provider, not of the one that failed."""
    ann, bob = world.node("ann", slots=1), world.node("bob", slots=1)
    carl = world.node("carl", slots=1)
    first = await world.started(bob)
    failing = await world.started(ann, bob)
    ann.fail(failing.job.id)
    await quiet()
    assert _providers(failing) == [carl.address]
    await Answering(world).answer()
    assert (failing.job.provider, first.job.provider) == (carl.address, bob.address)
    await _end_all(world)


async def test_who_does_not_answer_gets_another_slot_named(world: World) -> None:
    """A client that leaves an invitation unanswered is told of one more slot after a while, and keeps nobody from the first."""
    ann, bob, carl = (world.node(name, slots=1) for name in ("ann", "bob", "carl"))
    await world.started(ann)
    deaf = await world.started(ann)
    assert len(_providers(deaf)) == 1
    await _pass_seconds(world)
    assert set(_providers(deaf)) == {bob.address, carl.address}
    prompt = await world.started(ann)
    await Answering(world, {deaf.job.id: "nowhere"}).answer()
    assert prompt.job.provider in (bob.address, carl.address)
    await _end_all(world)


def _random_book(world: World, random: Random, kind: str) -> list[FakeNode]:
    """Nodes of two regions, with prices around a mean; `kind` says how reliable they are."""
    records = {
        "reliable": ProviderRecord(100, 0, 100),
        "doubtful": ProviderRecord(3, 3, 60),
        "bad": ProviderRecord(0, 20, 60),
        "newcomer": ProviderRecord(),
    }
    nodes = []
    for number in range(random.randrange(4, 16)):
        node = world.node(
            f"node {number}",
            slots=random.randrange(1, 4),
            spec=random.choice((EU, US)),
            input_price=random.choice((900_000, 1_000_000, 1_100_000)),
        )
        of_node = random.choice(list(records)) if kind == "mixed" else kind
        world.market.matchmaker.reputation.restore({node.address: records[of_node]})
        nodes.append(node)
    return nodes


@pytest.mark.parametrize("kind", ["mixed", "reliable", "doubtful", "bad", "newcomer"])
@pytest.mark.parametrize("seed", range(4))
async def test_no_job_waits_while_a_fitting_slot_is_free(world: World, kind: str, seed: int) -> None:
    """Random books and stale shortlists: once clients have answered, no job waits to which a free slot would be acceptable."""
    random = Random(f"{kind} {seed}")
    nodes, clients = _random_book(world, random, kind), Answering(world)
    slots = sum(node.slots for node in nodes)
    for _ in range(random.randrange(slots // 2, 2 * slots)):
        region = random.choice(("eu", "us", ""))
        fitting = [node for node in nodes if not region or node.ask.message.spec.region.lower() == region]
        if fitting:  # the first ones that fit, as many clients choose at the same time
            client = await world.started(*fitting[: random.randrange(1, 4)])
            clients.regions[client.job.id] = region
    await _pass_seconds(world, clients)
    for client in world.clients:
        if client.job.queued is None:
            continue
        terms = [candidate.terms for candidate in client.job.submission.candidates]
        for node in nodes:
            ask, region = node.ask.message, clients.regions[client.job.id]
            dearer = all(ask.input_price > each.input_price and ask.output_price > each.output_price for each in terms)
            fits = not region or ask.spec.region.lower() == region
            free = sum(group.free for group in world.market.book.groups_of((node.address, None)))
            assert not (fits and free and not dearer)
    await _end_all(world)


async def test_a_sweep_looks_at_few_jobs_however_many_wait(world: World) -> None:
    """Each second, a bounded number of waiting jobs is looked at. All get their turn, and one whose client is late its slot."""
    models = [f"model {number}" for number in range(12)]
    for model in models:
        busy = world.node(f"busy {model}", slots=1, model=model)
        for _ in range(13):
            await world.started(busy, terms={"model": model})
        world.node(f"dear {model}", slots=1, model=model, input_price=9_000_000, output_price=9_000_000)
    matchmaker, looked = world.market.matchmaker, list[Demand]()
    spare_asks = matchmaker.spare_asks

    def counting(demand: Demand) -> Iterator[ListedAsk]:
        looked.append(demand)
        return spare_asks(demand)

    matchmaker.spare_asks = counting  # type: ignore[method-assign]
    seen = Counter[str]()
    for _ in range(12):
        world.market._slot_queue._invitations.sweep()
        assert 0 < len(looked) <= 12 + 2 * 64
        seen.update(demand.model for demand in looked if demand.exclude)
        looked.clear()
    assert seen.keys() == set(models)
    for client in world.clients:
        world.market.cancel(client.job.id)


async def _waiting(world: World, *nodes: FakeNode, hints: RankingHints) -> Client:
    """A job that says what it requires, and waits."""
    return world.read(await world.market.place_order(replace(world.submission(*nodes), hints=hints)))


async def test_a_client_that_says_what_it_requires_is_invited_to_nothing_else(world: World) -> None:
    """Neither to a free slot nor to one that is freed, whatever its orders have in common."""
    ann = world.node("ann", slots=1, spec=EU)
    await world.started(ann)
    world.node("bob", slots=1, spec=US)
    client = await _waiting(world, ann, hints=RankingHints(require=Requirements(region=("eu",))))
    await _pass_seconds(world)
    carl = world.node("carl", slots=1, spec=EU_FP8)
    await _pass_seconds(world)
    assert _providers(client) == [carl.address]


async def test_what_orders_have_in_common_by_chance_is_not_required(world: World) -> None:
    """A client that requires nothing is invited to slots of other regions as to any: each of them is kept in mind for it."""
    ann = world.node("ann", slots=1, spec=EU)
    await world.started(ann)
    others = [world.node(f"other {number}", slots=1, spec=US) for number in range(MAX_INVITATIONS)]
    client = await _waiting(world, ann, hints=RankingHints(require=NO_REQUIREMENTS))
    for _ in range(MAX_INVITATIONS):
        await _pass_seconds(world)
    assert set(_providers(client)) == {other.address for other in others}


async def test_what_a_request_needs_comes_first(world: World) -> None:
    """An ask that declares it, before one that does not and is cheaper: the client may still accept that one."""
    ann = world.node("ann", slots=1)
    await world.started(ann)
    plain = world.node("bob", slots=1, input_price=1, output_price=1)
    able = world.node("carl", slots=1, spec=Spec(features=("tools",)))
    client = await _waiting(world, ann, hints=RankingHints(require=NO_REQUIREMENTS, needs=("tools",)))
    await _pass_seconds(world)
    assert _providers(client)[:2] == [able.address, plain.address]

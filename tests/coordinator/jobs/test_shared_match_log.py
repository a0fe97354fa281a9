"""The match log of replicas: one log without a gap, whoever writes it, and heads and proofs that every replica has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import sqlalchemy as sa

from coordinator.domain.integrity_records import HALF_WEIGHT, ProductKey
from coordinator.domain.log_check import LogReplay
from coordinator.jobs.match_log import MatchLog
from coordinator.jobs.shared_match_log import SharedMatchLog
from coordinator.ports import Cursor, Settlement
from coordinator.storage.schema import log_heads
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.jobs import TERMINAL, State
from tallystick.protocol.match_log import Match, draw_of, pack_head
from tallystick.protocol.merkle import includes, is_prefix
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Amount, Hash
from tallystick.protocol.wire import Dispatch, Kind
from tests.coordinator.harness import COORDINATOR, DOMAIN, MODEL, PAYER, START, Client, FakeNode, World, hedged, person, quiet
from tests.coordinator.jobs.test_audit_reports import Paid
from tests.coordinator.jobs.test_audit_reports import request as report_on
from tests.coordinator.storage.replicas import Job, beat, count, database, opened, shared
from tests.postgres import POSTGRES

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")


async def until(condition: Callable[[], object]) -> None:
    """Waits until something is so, however slow the machine is: a database tells no test when it has answered."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.005)


def world_of(store: Store) -> World:
    """A replica with a market of its own."""
    return World(store=store, log_store=store.match_log, report_store=store.reports, shared=store.shared)


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """An empty database."""
    async with database() as address:
        yield address


@pytest.fixture
async def worlds(url: str) -> AsyncIterator[list[World]]:
    """Three replicas of one coordinator, each with a market that has started."""
    async with opened(url, "one", "two", "three") as stores:
        listed = [world_of(store) for store in stores]
        for world in listed:
            await world.market.start()
        yield listed
        for world in listed:
            await world.market.drain(0)


async def dispatched(world: World, *nodes: FakeNode, **changes: Any) -> Client:
    """Places a job, and waits until its first node has it."""
    client = await world.place(*nodes, **changes)
    await until(lambda: client.ended or nodes[0].got(Kind.DISPATCH, client.job.id))
    return client


async def done(client: Client) -> None:
    """Waits until a client's job has ended."""
    await until(lambda: client.ended)


async def proof(log: MatchLog, since: tuple[int, ...] = (), indexes: tuple[int, ...] = ()) -> dict[str, Any]:
    """The proofs and the verified head of a log."""
    answer = await log.proof(since, indexes)
    answer["head"] = read_signed(LogHead, answer["head"]).verify(DOMAIN).message
    return answer


def hashes(raw: list[str]) -> list[bytes]:
    """The hashes of a proof in JSON."""
    return [bytes.fromhex(part) for part in raw]


async def test_replicas_write_one_log(worlds: list[World]) -> None:
    """Jobs through all of them are consecutive leaves; each replica proves all of them under one head, and a replay of the whole
    log finds nothing wrong with the restarts that alternate.
    """
    matches = []
    for number in range(9):
        world = worlds[number % 3]
        world.market.matchmaker.draw = draw_of
        world.number = 100 * (number % 3) + number
        node = world.nodes[0] if world.nodes else world.node(f"node {number}", slots=9)
        client = await dispatched(world, node)
        matches.append(Match.loads(client.frames[0][1]))
        assert Dispatch.loads(node.got(Kind.DISPATCH, client.job.id)[0]).match == matches[-1]
        node.complete(client.job.id)
        await done(client)
    assert [match.index for match in matches] == list(range(3, 12))
    assert [match.decision.epoch for match in matches] == [world.market.match_log.epoch for world in worlds] * 3
    await worlds[1].market.match_log.sign_head()
    for world in worlds:
        answer = await proof(world.market.match_log, (1, 7), tuple(match.index for match in matches))
        head = answer["head"]
        assert (head.coordinator, head.size) == (COORDINATOR.address, 12)
        for match in matches:
            entry = answer["inclusion"][str(match.index)]
            assert includes(head.root, head.size, match.index, match.leaf_hash, hashes(entry["path"]))
    entries = (await worlds[2].market.match_log.entries(0, 99))["entries"]
    replay = LogReplay()
    found = [
        fault
        for entry in entries
        for fault in replay.add(bytes.fromhex(entry["hash"]), bytes.fromhex(entry["leaf"]))  # type: ignore[arg-type]
    ]
    assert found == []
    assert (replay.edge.size, replay.edge.root(), replay.restarts, replay.matches) == (12, head.root, 3, 9)


async def test_any_two_heads_of_any_replicas_are_consistent(worlds: list[World]) -> None:
    """Each size has one head, and the later one continues the earlier one."""
    heads = []
    for number in range(1, 10):
        await asyncio.gather(*(Job(10 * number + place).place(world.store) for place, world in enumerate(worlds)))  # type: ignore[arg-type]
        await asyncio.gather(*(world.market.match_log.sign_head() for world in worlds))
        newest = {world.market.match_log.head.message for world in worlds if world.market.match_log.head is not None}
        assert len(newest) == 1
        heads.append(newest.pop())
    assert [head.size for head in heads] == list(range(6, 33, 3))
    sizes = tuple(head.size for head in heads)
    for world in worlds:
        answer = await proof(world.market.match_log, sizes)
        last = answer["head"]
        assert last == heads[-1]
        for head in heads:
            assert is_prefix(head.size, head.root, last.size, last.root, hashes(answer["consistency"][str(head.size)]))


async def test_the_next_head_is_signed_by_whoever_finds_the_last_one_old(worlds: list[World]) -> None:
    """A replica that sees a newer head takes it. One that finds the same again signs, if there are new leaves."""
    one, two, _ = (world.market.match_log for world in worlds)
    await two.next_head()
    assert two.head is not None
    first = two.head.message
    assert first.size == 3
    await Job(1).place(worlds[0].store)  # type: ignore[arg-type]
    await two.next_head()
    assert two.head.message.size == 4, "found the same head again, so this replica signed the next"
    assert one.head is not None
    assert one.head.message.size < 4
    await one.next_head()
    assert one.head.message == two.head.message
    await one.next_head()
    assert one.head.message == two.head.message, "no new leaves"


async def test_a_head_that_another_replica_signed_is_no_second_log(worlds: list[World]) -> None:
    """A node brings the newest head from one replica to another one, which does not know it yet."""
    one, two, _ = (world.market.match_log for world in worlds)
    await Job(1).place(worlds[0].store)  # type: ignore[arg-type]
    await one.sign_head()
    assert one.head is not None
    two.add_seen_head(worlds[1].node("ann").address, pack_head(Signed(one.head.message, one.head.signature)))
    await two._check_seen()
    assert (two.conflict, two.blocked) == ("", False)
    assert two.head == one.head
    forged = COORDINATOR.sign(
        LogHead(coordinator=COORDINATOR.address, size=2, root=one.head.message.root, signed_at=START), DOMAIN
    )
    two.add_seen_head(worlds[1].nodes[0].address, pack_head(Signed(forged.message, forged.signature)))
    await two._check_seen()
    assert two.blocked


async def test_a_proof_covers_what_another_replica_signed(worlds: list[World]) -> None:
    """A client that has a head and a match of one replica may ask another one, which reads the newest head first."""
    one, two, _ = (world.market.match_log for world in worlds)
    node = worlds[0].node("ann")
    client = await dispatched(worlds[0], node)
    match = Match.loads(client.frames[0][1])
    await one.sign_head()
    answer = await proof(two, (), (match.index,))
    assert answer["head"].size == match.index + 1
    assert str(match.index) in answer["inclusion"]
    assert "99" not in (await proof(two, (99,), (98,)))["consistency"]
    client.job.open_attempts[0].deadline = 0
    await worlds[0].pass_time(1)
    await until(lambda: client.ended)


async def test_a_replay_at_another_replica_fails_and_ends_nothing(worlds: list[World]) -> None:
    """It is refused before any node gets it, and the job goes on where it is."""
    node, other = worlds[0].node("ann"), worlds[1].node("ann")
    submission = worlds[0].submission(node)
    client = worlds[0].read(await worlds[0].market.place_order(submission))
    await until(lambda: node.got(Kind.DISPATCH, submission.job))
    again = worlds[1].read(await worlds[1].market.place_order(submission))
    await until(lambda: again.ended)
    assert again.failure.code is Code.ORDER_REPLAYED
    assert other.sent == []
    worlds[1].assert_idle()
    assert await worlds[1].market.admission.was_placed(submission.job)
    with pytest.raises(Exception, match="placed before"):
        await worlds[1].market.place_order(submission)
    assert not await worlds[2].market.admission.was_placed(Job(77).id)
    node.complete(submission.job)
    await until(lambda: client.ended)
    assert client.kinds[-1] is Kind.RECEIPT
    known = await worlds[1].store.job(submission.job)
    assert known is not None
    assert known.record.state is State.COMPLETED


async def test_a_receipt_at_another_replica_waits_for_the_end_of_its_job(worlds: list[World]) -> None:
    """A node whose link to the replica of its job is lost brings the receipt elsewhere: it is taken once the job has ended."""
    node, elsewhere = worlds[0].node("ann"), worlds[1].node("ann")
    client = await dispatched(worlds[0], node)
    node.last_chunk(client.job.id)
    receipt = node.receipt(client.job.id)
    with pytest.raises(Exception, match="another replica of this coordinator runs job"):
        await elsewhere.hand_in_late(client.job.id, receipt)
    assert elsewhere.got(Kind.RECEIPT_ACK) == []
    node.leave()
    await until(lambda: client.ended)
    await until_ended(worlds[0], client)
    assert await elsewhere.hand_in_late(client.job.id, receipt)
    assert elsewhere.got(Kind.RECEIPT_ACK, client.job.id) == [b""]
    known = await worlds[2].store.job(client.job.id)
    assert known is not None
    assert known.receipt == Signed(receipt.message, receipt.signature)


async def until_ended(world: World, client: Client) -> None:
    """Waits until the end of a job is stored."""
    async with asyncio.timeout(120):
        while await world.stored(client) not in TERMINAL:  # noqa: ASYNC110 - see `until`
            await asyncio.sleep(0.01)


async def test_a_receipt_without_the_response_is_refused_at_every_replica(worlds: list[World]) -> None:
    """What was relayed is stored when the job ends, so going elsewhere gets no node around the check."""
    node, elsewhere = worlds[0].node("ann"), worlds[1].node("ann")
    client = await dispatched(worlds[0], node)
    receipt = node.receipt(client.job.id)
    node.leave()
    await until(lambda: client.ended)
    await until_ended(worlds[0], client)
    with pytest.raises(Exception, match="the last chunk of the response never reached this coordinator"):
        await elsewhere.hand_in_late(client.job.id, receipt)


async def test_a_failover_and_a_hedge_are_leaves_before_their_dispatch(worlds: list[World]) -> None:
    """Each attempt has its own leaf, in the order of the dispatches."""
    world = worlds[0]
    first, second = world.node("ann"), world.node("bob", input_price=1_500_000)
    client = await dispatched(world, first, second)
    first.fail(client.job.id)
    await until(lambda: second.got(Kind.DISPATCH, client.job.id))
    matches = [Match.loads(payload) for kind, payload in client.frames if kind is Kind.MATCH]
    assert [(match.decision.attempt, match.index) for match in matches] == [(0, 3), (1, 4)]
    second.complete(client.job.id)
    await until(lambda: client.ended)
    late = worlds[1]
    third, fourth = late.node("ann"), late.node("bob", input_price=1_500_000)
    late.number = 50
    submission = hedged(late.submission(third, fourth), 1)
    late.market.hedging.share.share = 1.0
    client = late.read(await late.market.place_order(submission))
    await until(lambda: third.got(Kind.DISPATCH, submission.job))
    await late.pass_time(2)
    await until(lambda: fourth.got(Kind.DISPATCH, submission.job))
    fourth.complete(submission.job)
    third.fail(submission.job)
    await until(lambda: client.ended)
    assert client.kinds[-1] is Kind.RECEIPT
    late.assert_idle()


async def test_a_job_that_is_cancelled_while_it_is_stored_is_not_dispatched(
    worlds: list[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client may leave, and the node too, while the match waits for the disk."""
    world = worlds[0]
    node = world.node("ann")
    hold, placing, log = asyncio.Event(), asyncio.Event(), world.market.match_log
    assert isinstance(log, SharedMatchLog)
    place = log.shared.place

    async def held(*arguments: Any) -> Any:
        row = await place(*arguments)
        placing.set()
        await hold.wait()
        return row

    monkeypatch.setattr(log.shared, "place", held)
    client = await world.place(node)
    await asyncio.wait_for(placing.wait(), 120)
    assert world.market.cancel(client.job.id)
    hold.set()
    await until(lambda: client.ended)
    assert client.failure.code is Code.CANCELLED
    assert node.got(Kind.DISPATCH) == []
    world.assert_idle()
    placing.clear()
    hold.clear()
    client = await world.place(node)
    await asyncio.wait_for(placing.wait(), 120)
    node.leave()
    hold.set()
    await until(lambda: client.ended)
    assert client.failure.code is Code.NODE_GONE
    world.assert_idle()


async def test_without_the_database_no_job_is_dispatched(worlds: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    """A match that does not reach the disk in time fails the job before any node has it; the next one goes on."""
    world = worlds[0]
    node = world.node("ann")
    monkeypatch.setattr("coordinator.jobs.shared_match_log.PLACE_SECONDS", 0.05)
    log = world.market.match_log
    assert isinstance(log, SharedMatchLog)
    place = log.shared.place

    async def never(*_arguments: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(log.shared, "place", never)
    client = await world.place(node)
    await until(lambda: client.ended)
    assert client.failure.code is Code.COORDINATOR_UNAVAILABLE
    assert node.got(Kind.DISPATCH) == []
    monkeypatch.setattr(log.shared, "place", place)
    monkeypatch.setattr("coordinator.jobs.shared_match_log.PLACE_SECONDS", 60.0)
    client = await dispatched(world, node)
    node.complete(client.job.id)
    await until(lambda: client.ended)
    assert client.kinds[-1] is Kind.RECEIPT


async def test_a_lost_replica_leaves_a_log_that_goes_on(url: str) -> None:
    """Its leaves are in the log, its job is ended by another replica, and the next replica begins with a restart of its own."""
    async with opened(url, "two") as (second,):
        async with opened(url, "one") as (first,):
            lost = world_of(first)
            await lost.market.start()
            node = lost.node("ann")
            client = await dispatched(lost, node)
            if client.task is not None:
                client.task.cancel()  # nobody drives it any more, and its end is not stored
            await quiet()
        world = world_of(second)
        await world.market.start()
        log = world.market.match_log
        assert (log.epoch, log.head is not None and log.head.message.size) == (2, 3)
        await beat(second, "two")
        assert await count(second, log_heads) == 2
        sizes = sa.select(log_heads.c.size).order_by(log_heads.c.size)
        assert await second.database.read(lambda connection: list(connection.execute(sizes).scalars())) == [1, 3]
        assert shared(second) is second.shared


async def paid_job(world: World, node: FakeNode, number: int) -> Paid:
    """A job that ended with a receipt."""
    world.number = number
    world.market.matchmaker.draw = draw_of
    client = await dispatched(world, node)
    receipt = node.complete(client.job.id)
    await done(client)
    await until_ended(world, client)
    return client.job.id, receipt


async def test_reports_at_all_replicas_count_once_and_in_the_order_of_the_log(worlds: list[World]) -> None:
    """Whichever replica takes a report, on whichever one's job: all weigh products alike, and so does a replay of the log."""
    one, two, three = worlds
    nodes = [world.node("ann") for world in worlds]
    product = ProductKey(nodes[0].address, MODEL, "unknown")
    tabs = nodes[0].tabs
    for node in nodes:
        node.tabs = tabs
    paid = [await paid_job(world, node, 10 * place) for place, (world, node) in enumerate(zip(worlds, nodes, strict=True))]
    payee = person("bob").address
    assert isinstance(one.store, Store)
    await one.store.put_settlements([Settlement(PAYER.address, payee, Amount(HALF_WEIGHT), "0x", 1)], Cursor(1))
    reports = [report_on(each) for each in paid]
    acks = await asyncio.gather(
        *(world.market.audit_reports.accept(report) for world, report in zip((two, three, one), reports, strict=True))
    )
    again = await asyncio.gather(*(three.market.audit_reports.accept(report) for report in reports))
    assert [ack.message for ack in again] == [ack.message for ack in acks]
    assert len({ack.message.index for ack in acks}) == 3
    for world in worlds:
        with pytest.raises(Refusal, match="was reported before, and counts once"):
            await world.market.audit_reports.accept(report_on(paid[0], salt=1))
        await world.market.audit_reports.refresh()
    standings = {world.market.matchmaker.integrity.standing(product) for world in worlds}
    assert len(standings) == 1
    assert standings.pop().audits == 3
    await one.market.match_log.sign_head()
    entries = (await two.market.match_log.entries(0, 99))["entries"]
    replay = LogReplay()
    found = [fault for entry in entries for fault in replay.add(Hash(bytes.fromhex(entry["hash"])), bytes.fromhex(entry["leaf"]))]
    assert found == []
    assert replay.integrity.record(product) == one.market.matchmaker.integrity.record(product)
    assert replay.reports == 3


async def test_two_replicas_do_not_count_one_job_twice(worlds: list[World]) -> None:
    """Two reports of one job at two replicas at the same time: one is counted, the other one refused."""
    node, *_ = [world.node("ann") for world in worlds]
    paid = await paid_job(worlds[0], node, 1)
    results = await asyncio.gather(
        *(world.market.audit_reports.accept(report_on(paid, salt=place)) for place, world in enumerate(worlds)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, Refusal)]
    assert [refusal.code for refusal in refused] == [Code.REPORT_REPLAYED] * 2


async def test_a_replica_has_no_numbers_of_its_own(worlds: list[World]) -> None:
    """Nothing can append to the shared log without a transaction."""
    log = worlds[0].market.match_log
    with pytest.raises(RuntimeError, match="by `place`"):
        log.append(*(None,) * 4)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="log_report"):
        log.append_report(None)  # type: ignore[arg-type]

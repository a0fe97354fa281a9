"""The match log: what is appended, when a head is signed, and what a restart, a failing database or an old database change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from coordinator.domain.limits import JobLimits
from coordinator.jobs.match_log import MAX_PAGE_BYTES, MAX_UNWRITTEN, MatchLog
from coordinator.ports import LogRow
from coordinator.storage.memory import MemoryLogStore
from tallystick.protocol.eip712 import Signed, read_signed
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.log_evidence import LogSpan
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import Match, MatchLeaf, load_leaf
from tallystick.protocol.merkle import EMPTY_ROOT, includes, includes_span, is_prefix
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Hash
from tallystick.protocol.wire import Dispatch, Kind
from tests.coordinator.harness import COORDINATOR, DOMAIN, MODEL, PAYER, START, World, person, quiet


def hashes(raw: Sequence[str]) -> list[bytes]:
    """The hashes of a proof in JSON."""
    return [bytes.fromhex(part) for part in raw]


async def jobs(world: World, count: int) -> list[Match]:
    """Runs so many jobs and returns their matches."""
    node = world.nodes[0] if world.nodes else world.node("ann", slots=64)
    clients = [await world.started(node) for _ in range(count)]
    return [Match.loads(client.frames[0][1]) for client in clients]


async def proof(log: MatchLog, since: Sequence[int] = (), indexes: Sequence[int] = ()) -> dict[str, Any]:
    """The proofs and the verified head of a log."""
    answer = await log.proof(since, indexes)
    answer["head"] = read_signed(LogHead, answer["head"]).verify(DOMAIN).message
    return answer


async def test_every_match_is_a_leaf_under_a_signed_head(world: World) -> None:
    """Client and node get a match whose leaf is in the log at its number, proven against the coordinator's signed head."""
    await world.market.start()
    matches = await jobs(world, 5)
    await world.market.match_log.sign_head()
    answer = await proof(world.market.match_log, (), [match.index for match in matches])
    head = answer["head"]
    assert (head.coordinator, head.size, head.signed_at) == (COORDINATOR.address, 6, START)
    for match in matches:
        entry = answer["inclusion"][str(match.index)]
        assert (bytes.fromhex(entry["leaf"]), bytes.fromhex(entry["hash"])) == (match.leaf, match.leaf_hash)
        assert includes(head.root, head.size, match.index, match.leaf_hash, hashes(entry["path"]))
    dispatched = [Dispatch.loads(frame).match for frame in world.nodes[0].got(Kind.DISPATCH)]
    assert dispatched == matches
    assert load_leaf(bytes.fromhex((await world.market.match_log.entries(0, 1))["entries"][0]["leaf"])) == RestartLeaf(START)


async def test_a_leaf_names_no_payer_and_no_order(world: World) -> None:
    """The log is public: it says who got which model's job at which price, and neither for whom nor on which order."""
    (match,) = await jobs(world, 1)
    order = world.nodes[0].dispatch(match.decision.job)[0]
    assert (match.decision.model, match.decision.chosen.provider) == (MODEL, world.nodes[0].address)
    for secret in (bytes.fromhex(PAYER.address[2:]), order.digest, match.secret):
        assert secret not in match.leaf
    match.check(match.decision.job, order.digest, world.nodes[0].address, PAYER.address)


async def test_a_failover_is_another_leaf(world: World) -> None:
    """Each attempt of a job is a leaf; the second says that the first provider failed the job."""
    first, second = world.node("ann"), world.node("bob", input_price=1_500_000)
    client = await world.started(first, second)
    first.fail(client.job.id)
    await quiet()
    one, two = (Match.loads(payload) for kind, payload in client.frames if kind is Kind.MATCH)
    assert (one.decision.attempt, two.decision.attempt, two.index) == (0, 1, one.index + 1)
    assert one.decision.chosen.provider == first.address
    outcomes = {entry.provider: entry.outcome.value for entry in two.decision.considered}
    assert outcomes == {second.address: "got the job", first.address: "it has or had this job already"}


async def test_a_head_is_signed_once_for_each_size(world: World) -> None:
    """Without new matches no new head is signed, whatever the time; each new head continues the one before."""
    await world.market.start()
    log = world.market.match_log
    first = log.head
    assert first is not None
    world.clock.seconds += 5
    await log.sign_head()
    assert log.head is first
    await jobs(world, 3)
    await log.sign_head()
    answer = await proof(log, [0, first.message.size, 99])
    head = answer["head"]
    assert (head.size, head.signed_at) == (4, START + 5)
    assert is_prefix(0, EMPTY_ROOT, head.size, head.root, hashes(answer["consistency"]["0"]))
    assert is_prefix(1, first.message.root, head.size, head.root, hashes(answer["consistency"]["1"]))
    assert "99" not in answer["consistency"]


async def test_a_restart_continues_the_log_and_says_so(world: World) -> None:
    """A new process goes on with the same leaves, adds the leaf of its start, and signs no second head for an old size."""
    await world.market.start()
    before = await jobs(world, 3)
    await world.market.match_log.sign_head()
    head = world.market.match_log.head
    assert head is not None
    await world.restart()
    log = world.market.match_log
    (after,) = await jobs(world, 1)
    await log.sign_head()
    answer = await proof(log, [head.message.size], [before[0].index, 4])
    newest = answer["head"]
    assert (newest.size, log.epoch, after.decision.epoch, after.index) == (6, 4, 4, 5)
    assert is_prefix(head.message.size, head.message.root, newest.size, newest.root, hashes(answer["consistency"]["4"]))
    assert isinstance(load_leaf(bytes.fromhex(answer["inclusion"]["4"]["leaf"])), RestartLeaf)
    assert isinstance(world.log_store, MemoryLogStore)
    sizes = [signed.message.size for signed in world.log_store.heads]
    assert sizes == sorted(set(sizes))


async def test_leaf_times_never_go_back(world: World) -> None:
    """A clock that was set back changes neither the order of leaves nor the time of a head."""
    await world.market.start()
    world.clock.seconds = 100
    (first,) = await jobs(world, 1)
    world.clock.seconds = 50
    (second,) = await jobs(world, 1)
    await world.market.match_log.sign_head()
    head = world.market.match_log.head
    assert head is not None
    assert (first.decision.at, second.decision.at, head.message.signed_at) == (START + 100, START + 100, START + 100)


@dataclass
class SlowLogStore(MemoryLogStore):
    """A store whose writes end when the test says so."""

    waiting: list[tuple[Sequence[LogRow], asyncio.Future[None]]] = field(default_factory=list)
    slow: bool = False
    refuses: bool = False

    def enqueue_leaves(self, rows: Sequence[LogRow]) -> asyncio.Future[None]:
        if self.refuses:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "full")
        if not self.slow:
            return super().enqueue_leaves(rows)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((rows, future))
        return future

    def finish(self, error: Exception | None = None) -> None:
        """Ends the oldest write."""
        rows, future = self.waiting.pop(0)
        if error is not None:
            future.set_exception(error)
        else:
            super().enqueue_leaves(rows)
            future.set_result(None)


@pytest.fixture
def slow() -> World:
    """A world whose log store is slow."""
    return World(log_store=SlowLogStore())


def store_of(world: World) -> SlowLogStore:
    """The slow store."""
    assert isinstance(world.log_store, SlowLogStore)
    return world.log_store


async def test_no_head_covers_a_leaf_that_is_not_written(slow: World) -> None:
    """Only what is committed is signed. Leaves that come during a write follow in one write."""
    await slow.market.start()
    store, log = store_of(slow), slow.market.match_log
    store.slow = True
    await jobs(slow, 3)
    await log.sign_head()
    assert log.head is not None
    assert log.head.message.size == 1
    assert [len(rows) for rows, _ in store.waiting] == [1]
    store.finish()
    await quiet()
    assert [len(rows) for rows, _ in store.waiting] == [2]
    await log.sign_head()
    assert log.head.message.size == 2
    store.finish()
    await quiet()
    await log.sign_head()
    assert log.head.message.size == 4


async def test_a_failed_write_is_repeated_without_a_gap(slow: World) -> None:
    """After a failure, the next head writes all leaves again, in order."""
    await slow.market.start()
    store, log = store_of(slow), slow.market.match_log
    store.slow = True
    matches = await jobs(slow, 3)
    store.finish(Unavailable(Code.DATABASE_UNAVAILABLE, "disk full"))
    await quiet()
    assert not store.waiting
    store.refuses = True
    await log.sign_head()
    with pytest.raises(Unavailable, match="does not take"):
        await log.flush()
    store.refuses = store.slow = False
    await log.flush()
    await log.sign_head()
    assert [row.number for row in store.rows] == [0, 1, 2, 3]
    answer = await proof(log, (), [match.index for match in matches])
    assert all(
        includes(answer["head"].root, 4, match.index, match.leaf_hash, hashes(answer["inclusion"][str(match.index)]["path"]))
        for match in matches
    )


async def test_no_job_is_taken_while_too_many_leaves_wait(slow: World) -> None:
    """A log that is not written stops the market instead of growing in memory."""
    await slow.market.start()
    node = slow.node("ann")
    log = slow.market.match_log
    (match,) = await jobs(slow, 1)
    store_of(slow).refuses = True
    while not log.blocked:
        log._append(match.leaf)
    assert len(log._unwritten) == MAX_UNWRITTEN
    with pytest.raises(Unavailable, match="cannot write to its database"):
        await slow.place(node)


async def test_the_log_of_another_key_or_a_shortened_one_is_refused(world: World) -> None:
    """A process that does not have the log whose head its key signed does not start: it would sign a second log."""
    await world.market.start()
    await jobs(world, 3)
    await world.market.match_log.sign_head()
    store = world.log_store
    assert isinstance(store, MemoryLogStore)
    rows, heads = list(store.rows), list(store.heads)

    def reopened() -> MatchLog:
        return MatchLog(store, COORDINATOR, DOMAIN, world.clock.now)

    store.rows = rows[:2]
    with pytest.raises(Unavailable, match="lost leaves"):
        await reopened().start()
    store.rows = [*rows[:3], LogRow(3, START, 3 * rows[0].hashes, b"changed")]
    with pytest.raises(Unavailable, match="lost leaves"):
        await reopened().start()
    store.rows = rows
    with pytest.raises(Unavailable, match="and this is"):
        await MatchLog(store, person("other"), DOMAIN, world.clock.now).start()
    forged = Signed(heads[-1].message, person("other").sign_digest(heads[-1].message.digest(DOMAIN)))
    store.heads = [forged]
    with pytest.raises(Unavailable, match="another chain"):
        await reopened().start()
    store.heads = heads
    await reopened().start()


async def test_entries_are_listed_in_pages_up_to_the_head(world: World) -> None:
    """Leaves that no head covers are not shown: nothing would hold the coordinator to them."""
    await world.market.start()
    log = world.market.match_log
    matches = await jobs(world, 4)
    assert (await log.entries(1, 10))["entries"] == []
    await log.sign_head()
    page = await log.entries(0, 3)
    assert ([entry["index"] for entry in page["entries"]], page["next"], page["size"]) == ([0, 1, 2], 3, 5)
    page = await log.entries(3, 3)
    assert ([entry["leaf"] for entry in page["entries"]], page["next"]) == ([match.leaf.hex() for match in matches[2:]], None)
    assert (await log.entries(5, 3))["entries"] == []


async def test_leaves_in_a_row_have_one_proof(world: World) -> None:
    """Their hashes are proven together, under the same head; leaves that no head covers are left out."""
    await world.market.start()
    matches = await jobs(world, 6)
    log = world.market.match_log
    await log.sign_head()
    answer = await log.proof((), (), span=(2, 5))
    head = read_signed(LogHead, answer["head"]).message
    span = LogSpan.from_json(answer["span"], "span", 3)
    assert includes_span(head.root, head.size, 2, span.hashes, span.path)
    assert list(span.hashes) == [match.leaf_hash for match in matches[1:4]]
    for beyond in ((2, head.size + 1), (head.size, head.size + 1), (3, 3), (4, 2)):
        assert (await log.proof((), (), span=beyond))["span"] is None
    assert (await log.proof((), ()))["span"] is None


async def test_a_page_is_bounded_in_bytes(world: World) -> None:
    """A page of large leaves is shorter, and the next one goes on where it ended."""
    await world.market.start()
    log = world.market.match_log
    await jobs(world, 4)
    await log.sign_head()
    assert isinstance(world.log_store, MemoryLogStore)
    world.log_store.rows = [replace(row, leaf=bytes(MAX_PAGE_BYTES // 2)) for row in world.log_store.rows]
    page = await log.entries(0, 9)
    assert ([entry["index"] for entry in page["entries"]], page["next"]) == ([0, 1], 2)
    world.log_store.rows = [replace(row, leaf=bytes(2 * MAX_PAGE_BYTES)) for row in world.log_store.rows]
    page = await log.entries(4, 9)
    assert ([entry["index"] for entry in page["entries"]], page["next"]) == ([4], None)


async def test_old_contents_go_and_proofs_stay(world: World) -> None:
    """Contents older than the kept time are deleted; their hashes still prove what was there."""
    await world.market.start()
    log = world.market.match_log
    matches = await jobs(world, 3)
    await log.sign_head()
    world.clock.seconds = world.limits.match_log_keep_seconds + 10
    await log._forget()
    answer = await proof(log, [1], [matches[0].index])
    entry, head = answer["inclusion"]["1"], answer["head"]
    assert entry["leaf"] is None
    assert includes(head.root, head.size, 1, matches[0].leaf_hash, hashes(entry["path"]))


async def test_without_a_head_there_is_no_proof(world: World) -> None:
    """Before the first head, the log is not available."""
    with pytest.raises(Unavailable, match="no signed head yet"):
        await world.market.match_log.proof((), ())


async def test_a_proof_of_an_earlier_size(world: World) -> None:
    """A proof can be asked for an earlier size of the log; one beyond the head is cut to it."""
    await world.market.start()
    log = world.market.match_log
    matches = await jobs(world, 6)
    await log.sign_head()
    whole = await log.proof((), (), None)
    earlier = await log.proof((2,), (1, 5), 4)
    assert (earlier["size"], set(earlier["inclusion"]), set(earlier["consistency"])) == (4, {"1"}, {"2"})
    rows = await world.log_store.log_entries(0, 7)
    root = (await log.proof((), (), 4))["size"]
    assert root == 4
    assert isinstance(load_leaf(rows[1].leaf or b""), MatchLeaf)
    assert whole["size"] == (await log.proof((), (), 99))["size"] == 7
    assert Hash(rows[1].hashes[:32]) == matches[0].leaf_hash


async def test_heads_are_signed_at_the_configured_interval() -> None:
    """While there are new leaves, one head follows the other without anybody asking for it."""
    world = World(limits=JobLimits(match_log_seconds=0.01))
    await world.market.start()
    log = world.market.match_log
    running = asyncio.create_task(log.run())
    for number in (1, 2):
        await jobs(world, 1)
        async with asyncio.timeout(60):
            while log.head is None or log.head.message.size <= number:  # noqa: ASYNC110 - heads have no event
                await asyncio.sleep(0.01)
    running.cancel()
    assert log.head_seconds == 0.01

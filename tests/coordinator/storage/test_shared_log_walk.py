"""Random walks over what several replicas do with one PostgreSQL, some of them killed between two statements."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from random import Random

import pytest
import sqlalchemy as sa

from coordinator.ports import LogRow
from coordinator.storage.recovery import MISSED_SECONDS, Recovery
from coordinator.storage.schema import jobs, log_heads, match_log, open_jobs, placed_jobs, tab_receipts, tabs
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signed, loads_signed
from tallystick.protocol.errors import Refusal, Unavailable
from tallystick.protocol.jobs import State
from tallystick.protocol.merkle import HASH_SIZE, Edge, leaf_hash
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Amount, Hash
from tests.coordinator.harness import COORDINATOR, DOMAIN, PAYER, START
from tests.coordinator.storage.replicas import ANN, BOB, Job, beat, count, database, opened, shared
from tests.postgres import POSTGRES

pytestmark = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
JOBS = 60
REPLICA = """
import asyncio, sys
from tests.coordinator.storage.test_shared_log_walk import walk
asyncio.run(walk(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """An empty database."""
    async with database() as address:
        yield address


def make_head(size: int, root: Hash, last_at: int, newest: Signed[LogHead] | None) -> Signed[LogHead]:
    """Signs a head."""
    signed_at = max(last_at, 0 if newest is None else newest.message.signed_at)
    signed = COORDINATOR.sign(LogHead(coordinator=COORDINATOR.address, size=size, root=root, signed_at=signed_at), DOMAIN)
    return Signed(signed.message, signed.signature)


def job_of(number: int) -> Job:
    """The jobs of all walks: two providers' tabs have half of them each, so their seqs have gaps."""
    return Job(number, ANN if number % 2 else BOB)


def say(*acknowledged: object) -> None:
    """Prints what was acknowledged, as one write."""
    sys.stdout.write(json.dumps(acknowledged) + "\n")
    sys.stdout.flush()


async def walk(url: str, name: str, seed: int) -> None:
    """What one replica does: places, ends and heads in random order, at the same time. Prints what was acknowledged."""
    random = Random(seed)
    store = Store(url, replica=name)
    await store.start()

    async def run(number: int) -> None:
        job = job_of(number)
        try:
            leaf = await job.place(store)
        except (Refusal, Unavailable):
            return
        say("placed", number, leaf)
        if random.random() < 0.3:
            await asyncio.sleep(random.random() / 50)
        await job.finish(store)
        say("finished", number, leaf)

    async def sign() -> None:
        head = await shared(store).sign_head(make_head)
        if head is not None:
            say("head", head.message.size, head.message.root.hex())

    numbers = random.sample(range(1, JOBS + 1), JOBS)
    while numbers:
        several = [numbers.pop() for _ in range(min(len(numbers), random.randrange(1, 6)))]
        await asyncio.gather(*map(run, several), sign())
    await store.close()
    say("done", 0, 0)


async def check(store: Store, said: list[tuple[str, int, object]]) -> None:
    """The invariants: the log is contiguous and has one root a size, no job has two leaves, rows or owners, and everything that
    was acknowledged is there and counted once.
    """
    rows = await store.match_log.log_entries(0, 10_000)
    roots = _roots(rows)
    assert len({row.leaf and row.leaf.rpartition(b"of ")[2] for row in rows}) == len(rows), "one leaf for each job"
    query = sa.select(log_heads.c.head_doc)
    heads = await store.database.read(lambda c: [loads_signed(LogHead, doc).message for doc in c.execute(query).scalars()])
    assert all(roots[head.size] == head.root for head in heads)
    for kind, number, value in said:
        if kind == "head":
            assert roots[number].hex() == value
        elif kind in ("placed", "finished"):
            leaf = rows[int(str(value))].leaf or b""
            assert leaf.endswith(job_of(number).id)
            known = await store.job(job_of(number).id)
            assert known is not None
            if kind == "finished":
                assert known.record.state is State.COMPLETED
                assert known.receipt is not None
    assert len(rows) == await count(store, placed_jobs)
    per_job = sa.select(sa.func.count()).select_from(jobs).group_by(jobs.c.job)
    assert set(await store.database.read(lambda c: list(c.execute(per_job).scalars()))) <= {1}
    finished = {number for kind, number, _ in said if kind == "finished"}
    query = sa.select(tabs.c.provider, tabs.c.total, tabs.c.seq)
    stored = await store.database.read(lambda c: {row.provider: row for row in c.execute(query)})
    assert len(stored) <= 2
    for provider, odd in ((ANN.address, 1), (BOB.address, 0)):
        numbers = [number for number in finished if number % 2 == odd]
        if numbers:
            assert stored[provider].seq >= max(numbers)
            assert int.from_bytes(stored[provider].total) == 20 * stored[provider].seq
    listed = [late for provider in (ANN, BOB) for late in await store.receipts_of(PAYER.address, provider.address, 999)]
    assert max(Counter(late.receipt.message.seq for late in listed).values(), default=1) == 1
    assert len(listed) == await count(store, tab_receipts) >= len(finished)


def _roots(rows: list[LogRow]) -> dict[int, Hash]:
    edge = Edge()
    roots = {0: edge.root()}
    for place, row in enumerate(rows):
        assert (row.number, row.hashes[:HASH_SIZE]) == (place, leaf_hash(row.leaf or b""))
        assert b"".join(edge.append(leaf_hash(row.leaf or b""))) == row.hashes
        roots[edge.size] = edge.root()
    return roots


@pytest.mark.parametrize("seed", range(3))
async def test_replicas_in_one_process(url: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Three replicas place the same jobs at the same time; each job runs at one of them."""
    await asyncio.gather(*(walk(url, name, 10 * seed + place) for place, name in enumerate(("one", "two", "three"))))
    said = [tuple(json.loads(line)) for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert sorted(number for kind, number, _ in said if kind == "finished") == list(range(1, JOBS + 1))
    async with opened(url, "check") as (store,):
        await check(store, said)
        assert await count(store, jobs) == await count(store, match_log) == JOBS


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("seed", range(2))
async def test_killed_processes(url: str, seed: int) -> None:
    """Of three processes two are killed at moments that nobody chose. What they acknowledged is there, the log goes on, and the
    jobs that they left open are ended by the one that lives.
    """
    async with opened(url, "check") as (store,):
        random = Random(seed)
        processes = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", REPLICA, url, name, str(100 * seed + place)),
                stdout=asyncio.subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for place, name in enumerate(("one", "two", "three"))
        ]
        lines = [random.randrange(2, 30), random.randrange(2, 30), 1_000_000]
        said = [line for part in await asyncio.gather(*map(_read, processes, lines)) for line in part]
        assert said.count(("done", 0, 0)) >= 1
        await check(store, said)
        await beat(store, "check")
        ticks = iter((0.0, MISSED_SECONDS))
        recovery = Recovery(store.database, shared(store).shared_rows, now=lambda: START + 50.0, tick=lambda: next(ticks))
        for _ in range(2):
            await recovery.look()
        await check(store, said)
        assert await count(store, open_jobs) == 0
        assert await count(store, jobs) == await count(store, placed_jobs)
        await Job(1_000).place(store)
        state = await store.load_state(START, 0)
        assert all(total % Amount(20) == 0 for total in state.totals.values())


async def _read(process: asyncio.subprocess.Process, lines: int) -> list[tuple[str, int, object]]:
    """Reads what a process acknowledges, and kills it after so many lines."""
    said: list[tuple[str, int, object]] = []
    assert process.stdout is not None
    async with asyncio.timeout(300):
        while line := await process.stdout.readline():
            if line.startswith(b"["):
                said.append(tuple(json.loads(line)))
            if len(said) == lines:
                process.send_signal(signal.SIGKILL)
        await process.wait()
    return said

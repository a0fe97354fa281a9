"""The match log under SIGKILL: whatever moment a process dies at, every head that it showed is of the one log that follows."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

from tallystick.protocol.eip712 import loads_signed
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import MatchLeaf, load_leaf
from tallystick.protocol.merkle import EMPTY_ROOT, Edge, leaf_hash
from tallystick.protocol.messages import LogHead
from tests.coordinator.harness import DOMAIN
from tests.runtime.processes import line, script

ROUNDS = 6
WRITER = """
import asyncio, sys, time
from coordinator.domain.scoring import ANY_REQUEST
from coordinator.jobs.match_log import MatchDraft, MatchLog
from coordinator.storage.store import Store
from tests.builders import build_match
from tests.coordinator.harness import COORDINATOR, DOMAIN, make_ask, make_order, make_terms, person
from tallystick.protocol.types import JobId

async def main():
    store = Store(sys.argv[1])
    await store.start()
    log = MatchLog(store.match_log, COORDINATOR, DOMAIN, time.time)
    await log.start()
    print(log.head.dumps(), flush=True)
    ask = make_ask(person("ann"))
    terms = make_terms(ask, JobId(bytes(16)))
    order = make_order(terms, person("ann").address)
    draft = MatchDraft("m", ANY_REQUEST, False, 0.5, build_match(order, terms).decision.considered)
    while True:
        for _ in range(7):
            log.append(terms.job, 0, order, draft)
        await asyncio.sleep(0.001)
        before = log.head
        await log.sign_head()
        if log.head is not before:  # the leaves may still be on their way to the disk
            print(log.head.dumps(), flush=True)

asyncio.run(main())
"""


def test_a_killed_log_has_no_gap_and_no_second_head(tmp_path: Path) -> None:
    """After each kill the log goes on. All heads that were ever shown are of it, one for each size, and each start is a leaf."""
    file, shown = tmp_path / "coordinator.db", list[str]()
    for number in range(ROUNDS):
        with script(WRITER, f"sqlite:///{file}") as process:
            shown += [line(process) for _ in range(2 + 3 * number)]
            process.kill()
            process.wait()
            assert process.stdout is not None
            shown += [text for text in process.stdout.read().split("\n") if text.endswith("}")]
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT number, hashes, leaf FROM match_log ORDER BY number").fetchall()
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    edge, roots = Edge(), [EMPTY_ROOT]
    for _, hashes, leaf in rows:
        assert b"".join(edge.append(leaf_hash(leaf))) == hashes
        roots.append(edge.root())
    heads = {(head.size, head.root) for head in (loads_signed(LogHead, text).verify(DOMAIN).message for text in shown)}
    assert all(roots[size] == root for size, root in heads)
    assert len({size for size, _ in heads}) == len(heads) > ROUNDS
    leaves = [load_leaf(leaf) for _, _, leaf in rows]
    restarts = [place for place, leaf in enumerate(leaves) if isinstance(leaf, RestartLeaf)]
    assert len(restarts) == ROUNDS
    assert all(leaf.epoch in restarts and leaf.epoch < place for place, leaf in enumerate(leaves) if isinstance(leaf, MatchLeaf))


DIER = (
    WRITER.split("async def main", maxsplit=1)[0]
    + """
import os, signal

def die():
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    store = Store(sys.argv[1])
    await store.start()
    log = MatchLog(store.match_log, COORDINATOR, DOMAIN, time.time)
    await log.start()
    print(log.head.dumps(), flush=True)
    put_head = store.match_log.put_head

    async def killed_before(head):
        die()

    async def killed_after(head):
        await put_head(head)
        die()

    point = sys.argv[2]
    if point in ("before the head is written", "after the head was written"):
        store.match_log.put_head = killed_before if "before" in point else killed_after
    ask = make_ask(person("ann"))
    terms = make_terms(ask, JobId(bytes(16)))
    order = make_order(terms, person("ann").address)
    draft = MatchDraft("m", ANY_REQUEST, False, 0.5, build_match(order, terms).decision.considered)
    for _ in range(3):
        log.append(terms.job, 0, order, draft)
    if point == "before the leaves are written":
        die()
    await log.flush()
    if point == "between leaves and head":
        die()
    await log.sign_head()
    print(log.head.dumps(), flush=True)
    die()

asyncio.run(main())
"""
)
POINTS = (
    "before the leaves are written",
    "between leaves and head",
    "before the head is written",
    "after the head was written",
    "once the head was shown",
)


def test_a_kill_at_each_point_between_leaf_and_head_leaves_one_log(tmp_path: Path) -> None:
    """Wherever the process dies, in any order of deaths: no gap in the leaves, no size has two heads, each shown head stays."""
    file, shown = tmp_path / "coordinator.db", list[str]()
    for point in (*POINTS, *reversed(POINTS)):
        with script(DIER, f"sqlite:///{file}", point) as process:
            assert process.stdout is not None
            shown += [text for text in process.stdout.read().split("\n") if text.endswith("}")]
            assert process.wait() == -signal.SIGKILL
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT number, hashes, leaf FROM match_log ORDER BY number").fetchall()
        stored = [loads_signed(LogHead, doc) for (doc,) in database.execute("SELECT head_doc FROM log_heads")]
    assert [number for number, _, _ in rows] == list(range(len(rows)))
    edge, roots = Edge(), [EMPTY_ROOT]
    for _, hashes, leaf in rows:
        assert b"".join(edge.append(leaf_hash(leaf))) == hashes
        roots.append(edge.root())
    heads = [head.verify(DOMAIN).message for head in (*stored, *(loads_signed(LogHead, text) for text in shown))]
    assert all(roots[head.size] == head.root for head in heads)
    assert len({(head.size, head.root, head.signed_at) for head in heads}) == len({head.size for head in heads})
    starts = sum(isinstance(load_leaf(leaf), RestartLeaf) for _, _, leaf in rows)
    assert (starts, len(shown)) == (2 * len(POINTS), 2 * len(POINTS) + 2)

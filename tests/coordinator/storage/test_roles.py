"""Roles: one replica has each at a time, and another one takes it when that one ends, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from coordinator.storage.roles import AllRoles, ReplicaRoles, Roles, lock_key
from tests.postgres import POSTGRES
from tests.runtime.processes import line, script

needs_postgres = pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
HOLDER = """
import asyncio, sys
import structlog
from coordinator.storage.roles import ReplicaRoles

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

async def work():
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(ReplicaRoles(sys.argv[1], sys.argv[2]).run({sys.argv[2]: work}))
"""


class Holder:
    """A replica that asks for a role. `begun`, `ended`: of its work."""

    def __init__(self, role: str, roles: Roles | None = None) -> None:
        self.roles = roles or ReplicaRoles(POSTGRES, uuid.uuid4().hex)
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self.roles.run({role: self.work}))

    async def work(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def reached(event: asyncio.Event) -> None:
    """Waits for an event, however slow the machine is."""
    await asyncio.wait_for(event.wait(), 120)


@pytest.fixture
def role() -> str:
    """A role that no other test has."""
    return uuid.uuid4().hex


@needs_postgres
async def test_one_replica_has_a_role_and_the_next_one_gets_it(role: str) -> None:
    """The second asks again and again, and has it once the first stopped; the first one's work has ended by then."""
    first = Holder(role)
    await reached(first.begun)
    looked, looks = asyncio.Event(), 0

    async def look(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            looked.set()
        await asyncio.sleep(0.01)

    second = Holder(role, ReplicaRoles(POSTGRES, uuid.uuid4().hex, look))
    await reached(looked)
    assert first.roles.held() == {role}
    assert second.roles.held() == frozenset()
    assert not second.begun.is_set()
    await first.stop()
    assert first.ended.is_set()
    assert first.roles.held() == frozenset()
    await reached(second.begun)
    await second.stop()


@needs_postgres
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
async def test_a_killed_or_stopped_replica_loses_its_roles(role: str, how: str) -> None:
    """The server ends the session of a process that is gone at once, and that of a silent one after some seconds."""
    with script(HOLDER, POSTGRES, role) as process:
        assert await asyncio.to_thread(line, process) == "held"
        other = Holder(role)
        process.send_signal(getattr(signal, how))
        await reached(other.begun)
        await other.stop()


@needs_postgres
async def test_a_cut_connection_ends_the_work(role: str) -> None:
    """Whoever loses its connection stops working, and asks again: the role is free for all until then."""
    holder = Holder(role)
    await reached(holder.begun)
    holder.begun.clear()
    engine = create_async_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        kill = (
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = :key"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        await connection.execute(sa.text(kill), {"key": lock_key(role)})
    await engine.dispose()
    await reached(holder.ended)
    await reached(holder.begun)
    await holder.stop()


async def test_no_database_no_role(role: str) -> None:
    """Without an answer of the server nobody has a role, and the replica goes on to ask."""
    asked, looks = asyncio.Event(), 0

    async def look(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            asked.set()
        await asyncio.sleep(0.01)

    holder = Holder(role, ReplicaRoles("postgresql+asyncpg://nobody@127.0.0.1:1/nothing", "one", look))
    await reached(asked)
    assert not holder.begun.is_set()
    assert holder.roles.held() == frozenset()
    await holder.stop()


@pytest.mark.parametrize("kind", ["lone", pytest.param("replica", marks=needs_postgres)])
async def test_the_error_of_a_work_is_raised(role: str, kind: str) -> None:
    """Work that fails is no reason to go on without it: whoever runs the roles gets to know."""
    roles: Roles = AllRoles() if kind == "lone" else ReplicaRoles(POSTGRES, uuid.uuid4().hex)
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def fail() -> None:
        raise LookupError("a bug")

    with pytest.raises(LookupError, match="a bug"):
        await roles.run({role: work, role + "-failing": fail})
    assert ended.is_set()
    assert roles.held() == frozenset()


async def test_a_lone_coordinator_has_all_roles(role: str) -> None:
    """It asks nobody."""
    holder = Holder(role, AllRoles())
    await reached(holder.begun)
    assert holder.roles.held() == {role}
    await holder.stop()
    assert holder.ended.is_set()

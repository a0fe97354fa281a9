"""Exclusive use of a database: one process at a time, after any end of the former one, and only while its lock is certain."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tallystick.protocol.errors import BadMessage, Fault, Unavailable
from tallystick.runtime import single_instance
from tallystick.runtime.single_instance import instance_lock
from tallystick.runtime.sqlite_backend import sqlite_file
from tests.postgres import POSTGRES
from tests.runtime.processes import line, script

HOLDER = """
import asyncio, sys
from tallystick.runtime.single_instance import instance_lock

async def main():
    await instance_lock(sys.argv[1], "test").acquire()
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of each kind."""
    monkeypatch.setattr(single_instance, "TAKEOVER_SECONDS", 1.0)
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/facts.db"
    if not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    monkeypatch.setattr(single_instance, "ADVISORY_LOCK", 0x7A13)  # other tests of this server hold the real one
    return POSTGRES


@pytest.mark.skipif(os.name != "posix", reason="the lock on a file is POSIX's")
async def test_a_second_process_does_not_use_the_database(url: str) -> None:
    """While one process holds the lock, a second is refused with the reason and the remedy; after a release the next one
    gets it.
    """
    first, second = instance_lock(url, "coordinator"), instance_lock(url, "coordinator")
    await first.acquire()
    with pytest.raises(Unavailable, match=r"runs a coordinator on the database .*stop it first") as caught:
        await second.acquire()
    assert caught.value.fault is Fault.CLIENT
    await first.release()
    await second.acquire()
    await second.release()


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
async def test_a_killed_process_does_not_keep_the_database(tmp_path: Path) -> None:
    """A lock ends with its process, also after SIGKILL. The refusal names the holder, and another path to the file has the
    same lock.
    """
    (tmp_path / "alias").symlink_to(tmp_path, target_is_directory=True)
    with script(HOLDER, f"sqlite:///{tmp_path}/facts.db") as process:
        assert line(process) == "held"
        other = instance_lock(f"sqlite:///{tmp_path}/alias/facts.db", "test")
        with pytest.raises(Unavailable, match=f"process {process.pid} runs a test"):
            await other.acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        await other.acquire()
        await other.release()
    assert (tmp_path / "facts.db.lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
async def test_a_killed_process_does_not_keep_a_postgres_database() -> None:
    """The server frees the lock of a session whose process was killed."""
    with script(HOLDER, POSTGRES) as process:
        assert line(process) == "held"
        with pytest.raises(Unavailable, match="pg_locks"):
            await instance_lock(POSTGRES, "test").acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
        other = instance_lock(POSTGRES, "test")
        await other.acquire()
        await other.release()


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
async def test_a_lost_lock_is_not_taken_for_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the server cuts the connection that holds the lock, the holder is told, and another process may take the lock."""
    monkeypatch.setattr(single_instance, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(single_instance, "ADVISORY_LOCK", 0x7A14)
    first = instance_lock(POSTGRES, "test")
    await first.acquire()
    watching = asyncio.create_task(first.lost())
    await asyncio.sleep(0.3)
    assert not watching.done()
    engine = create_async_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        kill = (
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND objid = :key"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        await connection.execute(sa.text(kill), {"key": 0x7A14})
    await engine.dispose()
    await asyncio.wait_for(watching, 60)
    second = instance_lock(POSTGRES, "test")
    await second.acquire()
    await second.release()
    await first.release()


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
async def test_replicas_share_a_database_and_a_lone_instance_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of replicas hold the shared lock. A lone instance is refused while one does, and the other way round."""
    monkeypatch.setattr(single_instance, "TAKEOVER_SECONDS", 0.5)
    monkeypatch.setattr(single_instance, "ADVISORY_LOCK", 0x7A16)
    replicas = [instance_lock(POSTGRES, "coordinator", shared=True) for _ in range(3)]
    lone = instance_lock(POSTGRES, "coordinator")
    for replica in replicas:
        await replica.acquire()
    with pytest.raises(Unavailable, match=r"another process runs a coordinator .* with `bus`, as replicas"):
        await lone.acquire()
    for replica in replicas:
        await replica.release()
    await lone.acquire()
    with pytest.raises(Unavailable, match=r"a coordinator without `bus` runs on the database .*start it with `bus`"):
        await replicas[0].acquire()
    await lone.release()
    await replicas[0].acquire()
    await replicas[0].release()


def test_replicas_need_postgresql(tmp_path: Path) -> None:
    """A file has no lock that several processes could share, and no second writer that would know of the first one's numbers."""
    with pytest.raises(BadMessage, match=r"db: expected a PostgreSQL database .* for replicas of a coordinator, got SQLite"):
        instance_lock(f"sqlite:///{tmp_path}/facts.db", "coordinator", shared=True)


async def test_a_database_in_memory_is_nobody_elses(url: str) -> None:
    """Any number of in-memory databases can be open, each with a lock that is never lost."""
    locks = [instance_lock("sqlite://", "test") for _ in range(2)]
    for lock in locks:
        await lock.acquire()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(locks[0].lost(), 0.05)
    for lock in locks:
        await lock.release()


async def test_an_unreachable_server_is_reported() -> None:
    """If the database does not answer, the error says so instead of reporting a held lock."""
    with pytest.raises(Unavailable, match=r"^db: no database server accepts connections at 127.0.0.1:1;"):
        await instance_lock("postgresql+asyncpg://nobody@127.0.0.1:1/nothing", "test").acquire()


@pytest.mark.skipif(os.name != "posix", reason="the lock on a file is POSIX's")
@pytest.mark.parametrize("uri", ["file:{}?uri=true", "file://{}?mode=rwc&uri=true", "file://localhost{}?uri=true"])
async def test_a_uri_is_no_way_around_the_lock(tmp_path: Path, uri: str) -> None:
    """A database that is named by a URI has exactly its file's lock."""
    path = tmp_path / "facts.db"
    first, second = (
        instance_lock(f"sqlite:///{path}", "coordinator"),
        instance_lock(f"sqlite:///{uri.format(path)}", "coordinator"),
    )
    await first.acquire()
    with pytest.raises(Unavailable):
        await second.acquire()
    await first.release()
    assert sqlite_file(sa.make_url("sqlite:///file:facts?mode=memory&uri=true")) is None
    assert sqlite_file(sa.make_url("sqlite:///file::memory:?uri=true")) is None

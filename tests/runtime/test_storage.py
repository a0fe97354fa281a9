"""Durable storage: acknowledged writes persist, a failing write fails alone, and nobody waits forever. PostgreSQL is tested
too if TALLYSTICK_TEST_POSTGRES names a server (scripts/with-postgres). Tests on SQLite alone concern its file or its
writer thread, which PostgreSQL does not have.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tallystick.protocol.errors import Code, Refusal, TallyError, Unavailable
from tallystick.runtime import database_migration, group_commit
from tallystick.runtime.group_commit import MAX_GROUP, MAX_QUEUED, LoopCommit, ThreadCommit
from tallystick.runtime.postgres_backend import MAX_CONNECTIONS
from tallystick.runtime.storage import Database
from tests.postgres import POSTGRES, empty_database
from tests.runtime.processes import line, script

MIGRATIONS = Path(__file__).parent / "migrations"
IN_TIME = 120


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """A path to a new database in a new folder."""
    return f"sqlite:///{tmp_path}/state/facts.db"


@pytest.fixture(params=["sqlite", "postgres"])
async def url(request: pytest.FixtureRequest, sqlite: str) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return sqlite
    if not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    return await empty_database()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    """An open database."""
    database = Database(url)
    await database.start(MIGRATIONS)
    yield database
    await database.close()


def insert(number: int, word: str | None = None) -> Callable[[Connection], int]:
    """Returns work that inserts a row."""

    def work(connection: Connection) -> int:
        connection.execute(sa.text("INSERT INTO facts (id, word) VALUES (:i, :w)"), {"i": number, "w": word or f"word {number}"})
        return number

    return work


def ids(connection: Connection) -> list[int]:
    """Returns all rows."""
    return list(connection.execute(sa.text("SELECT id FROM facts ORDER BY id")).scalars())


def commits(database: Database) -> list[int]:
    """A list that gets an entry with every commit of the database."""
    counted: list[int] = []
    engine = database._backend._engine  # type: ignore[attr-defined]  # both backends have one
    event.listen(getattr(engine, "sync_engine", engine), "commit", lambda _connection: counted.append(1))
    return counted


@asynccontextmanager
async def stuck(database: Database) -> AsyncIterator[None]:
    """Blocks the writer in a transaction inside the context, so all other writes queue."""
    entered, leave = threading.Event(), threading.Event()

    def work(_connection: Connection) -> None:
        entered.set()
        leave.wait(IN_TIME)

    task = asyncio.create_task(database.write(work))
    await asyncio.to_thread(entered.wait, IN_TIME)
    try:
        yield
    finally:
        leave.set()
        await task


async def test_a_write_returns_its_result_and_survives_reopening(url: str) -> None:
    """A row that `write` acknowledged is there after the database was reopened."""
    async with opened(url) as database:
        assert await database.write(insert(1)) == 1
    async with opened(url) as database:
        assert await database.read(ids) == [0, 1]


def durability(connection: Connection) -> str:
    """Returns the level of durability of the transaction that runs, in the database's own words."""
    query = "SHOW synchronous_commit" if connection.dialect.name == "postgresql" else "PRAGMA synchronous"
    return str(connection.exec_driver_sql(query).scalar_one())


@pytest.mark.parametrize("first_brief", [True, False])
async def test_a_write_that_failed_in_one_thread_stops_none_in_the_other(tmp_path: Path, first_brief: bool) -> None:
    """Brief writes run in the event loop and others in the writer's thread, on one connection, which a failure closes."""

    def fail(connection: Connection) -> None:
        connection.execute(sa.text("INSERT INTO facts (id, word) VALUES (1, 'a'), (1, 'b')"))

    failures = list[BaseException]()  # what holds an error, such as a log, holds what was closed with it
    async with opened(f"sqlite:///{tmp_path}/facts.db") as database:
        for number in range(10, 20):
            brief = first_brief is (number % 2 == 0)
            await database.write(insert(number), synced=False, brief=brief)
            with pytest.raises(sa.exc.IntegrityError) as caught:
                await database.write(fail, synced=False, brief=not brief)
            failures.append(caught.value)
            await database.write(insert(number + 100), synced=False, brief=brief)
        assert len(await database.read(ids)) == 21


async def test_only_synced_writes_sync(url: str) -> None:
    """SQLite syncs a transaction if one of its writes must be synced; PostgreSQL syncs all, or they were lost with its server."""
    async with opened(url) as database:
        queued: list[str] = []
        database.enqueue(lambda c: queued.append(durability(c)))
        alone = [await database.write(durability, synced=synced) for synced in (False, True, False)]
        # PostgreSQL's writer shares the event loop, so all five wait for it anyway
        async with stuck(database) if database.url.drivername.startswith("sqlite") else nullcontext():
            tasks = [asyncio.create_task(database.write(durability, synced=n == 3)) for n in range(5)]
            await asyncio.sleep(0)
        grouped = await asyncio.gather(*tasks)
    off, on = ("1", "2") if database.url.drivername.startswith("sqlite") else ("on", "on")
    assert queued == [off]
    assert alone == [off, on, off]
    assert set(grouped) == {on}


async def test_concurrent_writes_share_transactions(url: str) -> None:
    """A thousand concurrent writes take a handful of commits, and each gets its own result."""
    async with opened(url) as database:
        counted = commits(database)
        assert await asyncio.gather(*(database.write(insert(n)) for n in range(1, 1_001))) == list(range(1, 1_001))
        assert len(counted) <= -(-1_000 // MAX_GROUP) + 1
        assert len(await database.read(ids)) == 1_001


async def test_writes_that_wait_for_a_commit_share_the_next(sqlite: str) -> None:
    """Writes that arrive during a transaction share the next ones."""
    async with opened(sqlite) as database:
        async with stuck(database):
            counted = commits(database)
            waiting = [asyncio.create_task(database.write(insert(n))) for n in range(1, 51)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert len(counted) == 2, "the one that was running, and one for all the others"


async def test_a_failing_write_fails_alone(url: str) -> None:
    """Failing writes of a group get their own errors and leave nothing behind; all other writes are stored."""

    def halfway(connection: Connection) -> None:
        insert(500)(connection)
        raise Refusal(Code.UNSECURED, "changed its mind")

    async with opened(url) as database:
        works: list[Callable[[Connection], Any]] = [insert(1), halfway, insert(2), insert(2), insert(3), insert(4, "first")]
        results = await asyncio.gather(*(database.write(work) for work in works), return_exceptions=True)
        assert [type(result) for result in results] == [int, Refusal, int, IntegrityError, int, IntegrityError]
        assert await database.read(ids) == [0, 1, 2, 3]
        assert await database.write(insert(5)) == 5, "the writer goes on"


async def test_a_write_out_of_which_stopiteration_comes_does_not_hang(url: str) -> None:
    """An exception that a future cannot carry is replaced by one that it can, and the writer continues."""
    nothing: list[int] = []
    async with opened(url) as database:
        for access in (database.write, database.read):
            with pytest.raises(RuntimeError, match="StopIteration"):
                await asyncio.wait_for(access(lambda _c: next(iter(nothing))), IN_TIME)
        assert await database.write(insert(1)) == 1


async def test_a_cancelled_write_does_not_stop_the_others(sqlite: str) -> None:
    """A cancelled write may still happen, and the writes queued behind it do."""
    async with opened(sqlite) as database:
        async with stuck(database):
            gone, stays = (asyncio.create_task(database.write(insert(n))) for n in (1, 2))
            await asyncio.sleep(0)
            gone.cancel()
        assert await stays == 2
        assert set(await database.read(ids)) >= {0, 2}


async def test_a_note_is_durable_before_any_later_write(url: str) -> None:
    """When a write returns, every earlier note is on disk, in order."""
    async with opened(url) as database:
        order: list[int] = []

        def noted(number: int) -> Callable[[Connection], None]:
            def work(connection: Connection) -> None:
                order.append(number)
                insert(number)(connection)

            return work

        for n in range(1, 600):
            database.enqueue(noted(n))
        await database.write(noted(600))
        assert order == list(range(1, 601))
        assert await database.read(ids) == list(range(601))


async def test_a_note_that_fails_is_logged_and_harms_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed note is logged; the writes around it are kept."""
    events: list[str] = []

    class Log:
        def error(self, text: str, **_more: object) -> None:
            events.append(text)

    monkeypatch.setattr(group_commit, "log", Log())
    async with opened(url) as database:
        database.enqueue(insert(1))
        database.enqueue(insert(1))
        await database.write(insert(2))
        assert await database.read(ids) == [0, 1, 2]
    assert events == ["queued write lost"]


async def test_a_full_queue_refuses_notes_and_makes_writes_wait(sqlite: str) -> None:
    """With a full queue, a note raises Unavailable at once and a write waits for room; no accepted write is lost."""
    async with opened(sqlite) as database:
        async with stuck(database):
            for n in range(1, MAX_QUEUED + 1):
                database.enqueue(insert(n))
            with pytest.raises(Unavailable, match="too slow"):
                database.enqueue(insert(MAX_QUEUED + 1))
            waiting = asyncio.create_task(database.write(insert(MAX_QUEUED + 2)))
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, IN_TIME)
        assert await database.read(ids) == [*range(MAX_QUEUED + 1), MAX_QUEUED + 2]


async def test_close_writes_what_is_queued(url: str) -> None:
    """All notes and writes that preceded `close` are stored."""
    database = Database(url)
    await database.start(MIGRATIONS)
    writes = [asyncio.create_task(database.write(insert(n))) for n in range(1, 400)]
    await asyncio.sleep(0)
    for n in range(400, 800):
        database.enqueue(insert(n))
    await database.close()
    assert await asyncio.gather(*writes) == list(range(1, 400))
    async with opened(url) as database:
        assert await database.read(ids) == list(range(800))


async def test_nobody_waits_for_a_closed_database(url: str) -> None:
    """After `close`, writes, notes and reads raise Unavailable at once instead of waiting forever."""
    database = Database(url)
    await database.start(MIGRATIONS)
    closing = asyncio.create_task(database.close())
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(Unavailable, match="closed"):
            await asyncio.wait_for(database.write(insert(1)), IN_TIME)
        with pytest.raises(Unavailable, match="closed"):
            database.enqueue(insert(1))
        with pytest.raises(Unavailable, match="closed"):
            await database.read(ids)
        await closing
    await database.close()


async def test_writers_that_waited_for_room_are_served_before_the_end(sqlite: str) -> None:
    """Writes that waited for room in the full queue are stored, even if `close` was queued before them."""
    database = Database(sqlite)
    await database.start(MIGRATIONS)
    async with stuck(database):
        for n in range(1, MAX_QUEUED + 1):
            database.enqueue(insert(n))
        waiting = [asyncio.create_task(database.write(insert(n))) for n in range(MAX_QUEUED + 1, MAX_QUEUED + 600)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(database.close())
        await asyncio.sleep(0)
    await asyncio.wait_for(asyncio.gather(*waiting, closing), IN_TIME)
    async with opened(sqlite) as database:
        assert await database.read(ids) == list(range(MAX_QUEUED + 600))


async def test_close_lets_go_of_the_file(sqlite: str, tmp_path: Path) -> None:
    """After `close` there is no write-ahead log, and the file can be moved."""
    async with opened(sqlite) as database:
        await database.write(insert(1))
        await database.read(ids)
        assert (tmp_path / "state" / "facts.db-wal").exists()
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["facts.db"]


async def test_closing_what_was_never_started_is_allowed(url: str) -> None:
    """A database that was never started may be closed, as in a `finally`."""
    await Database(url).close()


async def test_two_databases_on_one_file_lose_no_update(sqlite: str) -> None:
    """Two databases on one file read and change it under its write lock: no increment from either side is lost."""

    def count(connection: Connection) -> None:
        number = connection.execute(sa.text("SELECT word FROM facts WHERE id = 1")).scalar_one()
        connection.execute(sa.text("UPDATE facts SET word = :n WHERE id = 1"), {"n": str(int(number) + 1)})

    async with opened(sqlite) as first, opened(sqlite) as second:
        await first.write(insert(1, "0"))

        async def many(database: Database) -> None:
            for _ in range(50):
                await database.write(count)

        await asyncio.gather(many(first), many(second))
        assert await first.read(lambda c: c.execute(sa.text("SELECT word FROM facts WHERE id = 1")).scalar_one()) == "100"


async def test_a_read_sees_one_moment(sqlite: str) -> None:
    """Two queries of one read agree, whatever is written between them."""
    counted, written = threading.Event(), threading.Event()

    def twice(connection: Connection) -> tuple[list[int], list[int]]:
        before = ids(connection)
        counted.set()
        written.wait(IN_TIME)
        return before, ids(connection)

    async with opened(sqlite) as database:
        reading = asyncio.create_task(database.read(twice))
        await asyncio.to_thread(counted.wait, IN_TIME)
        await database.write(insert(1))
        written.set()
        assert await reading == ([0], [0])
        assert await database.read(ids) == [0, 1]


async def test_two_that_start_together_make_the_tables_once(url: str) -> None:
    """Migrations run under the write lock: of several concurrent starts, one migrates and the others find the result."""
    databases = [Database(url) for _ in range(4)]
    await asyncio.gather(*(database.start(MIGRATIONS) for database in databases))
    assert [await database.read(ids) for database in databases] == [[0]] * 4
    for database in databases:
        await database.close()


async def test_concurrently_opened_databases_are_independent(tmp_path: Path) -> None:
    """Several databases that one process opens at once migrate independently, although Alembic uses module globals."""
    databases = [Database(f"sqlite:///{tmp_path}/{n}.db") for n in range(12)]
    await asyncio.gather(*(database.start(MIGRATIONS) for database in databases))
    for number, database in enumerate(databases, 1):
        assert await database.write(insert(number)) == number
        assert await database.read(ids) == [0, number]
        await database.close()


async def test_a_database_in_memory_works() -> None:
    """An in-memory database works and stores nothing."""
    async with opened("sqlite:///:memory:") as database:
        await database.write(insert(1))
        assert await database.read(ids) == [0, 1]


@pytest.mark.parametrize("at", [0, 4_096])
async def test_a_damaged_file_is_unavailable_and_says_what_to_do(tmp_path: Path, at: int) -> None:
    """If header or pages are overwritten, the error says so and how to recover; the file is not changed."""
    file = tmp_path / "facts.db"
    async with opened(f"sqlite:///{file}") as database:
        await database.write(insert(1))
    whole = file.read_bytes()
    damaged = whole[:at] + b"\xa5" * (len(whole) - at)
    file.write_bytes(damaged)
    database = Database(f"sqlite:///{file}")
    with pytest.raises(Unavailable, match=r"damaged.*\.recover"):
        await database.start(MIGRATIONS)
    await database.close()
    assert file.read_bytes() == damaged


class Failing:
    """A backend that loses its database before the work begins, or after it. It commits in a thread or in the event loop."""

    def __init__(self, database: Database, error: Exception, *, late: bool, threaded: bool) -> None:
        self.error, self.late = error, late
        self.runs = 0
        translate = database._translate
        self.commits = (
            ThreadCommit(self._transact, lambda work: self._transact(work, synced=False), translate)
            if threaded
            else LoopCommit(self._transact_in_loop, translate)
        )

    def _transact(self, work: Callable[[Any], Any], synced: bool) -> None:
        self.runs += 1
        if self.late:
            work(None)
        raise self.error

    async def _transact_in_loop(self, work: Callable[[Any], Any], synced: bool) -> None:
        await asyncio.sleep(0)
        self._transact(work, synced)

    async def read(self, work: Callable[[Any], Any]) -> Any:
        """Fails like a write."""
        self._transact(work, synced=False)

    async def prepare(self) -> None:
        """Connects to nothing."""

    async def migrate(self, work: Callable[[Any], Any]) -> None:
        """Has no tables."""

    async def close(self) -> None:
        pass


GONE = [
    OperationalError("COMMIT", {}, Exception("disk I/O error")),
    ConnectionRefusedError(111, "Connection refused"),
    TimeoutError("no answer"),
    PoolTimeout("QueuePool limit reached"),
]


@pytest.mark.parametrize("threaded", [True, False], ids=["thread", "loop"])
@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
async def test_a_database_that_went_away_is_unavailable(error: Exception, threaded: bool) -> None:
    """Any driver error after the server is gone becomes Unavailable with the reason, for writes and reads."""
    database = Database("sqlite://")
    await database._backend.close()
    backend: Any = Failing(database, error, late=True, threaded=threaded)
    database._backend = backend
    backend.commits.start()
    for access in (database.write, database.read):
        with pytest.raises(Unavailable, match="does not answer") as caught:
            await access(lambda _c: 1)
        assert caught.value.retry
    await database.close()


@pytest.mark.parametrize("threaded", [True, False], ids=["thread", "loop"])
async def test_a_transaction_that_cannot_begin_fails_the_whole_group_at_once(threaded: bool) -> None:
    """If no work has run, no write is at fault: a locked or lost database is not queried again for each write of a group."""
    database = Database("sqlite://")
    await database._backend.close()
    backend: Any = Failing(database, GONE[0], late=False, threaded=threaded)
    database._backend = backend
    tasks = [asyncio.create_task(database.write(lambda _c: 1)) for _ in range(50)]
    await asyncio.sleep(0)
    backend.commits.start()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    assert backend.runs == 1
    await database.close()


async def test_errors_of_the_work_itself_come_through_unchanged(url: str) -> None:
    """Refusals and bugs inside work are raised unchanged; only a lost database is translated."""
    errors: list[Exception] = [Refusal(Code.UNSECURED, "no"), KeyError("bug"), ZeroDivisionError()]
    async with opened(url) as database:
        for error in errors:

            def work(_connection: Connection, error: Exception = error) -> None:
                raise error

            for access in (database.write, database.read):
                with pytest.raises(type(error)) as caught:
                    await access(work)
                assert caught.value is error
    assert issubclass(Unavailable, TallyError)


WRITER = """
import asyncio, sys
from pathlib import Path
import sqlalchemy as sa
from tallystick.runtime.storage import Database

async def main():
    database = Database(sys.argv[1])
    await database.start(Path(sys.argv[2]))
    async def worker(start):
        for n in range(start, 1_000_000, 4):
            await database.write(lambda c: c.execute(sa.text("INSERT INTO facts VALUES (:n, :w)"), {"n": n, "w": f"w{n}"}))
            print(n, flush=True)
    await asyncio.gather(*(worker(1 + n) for n in range(4)))

asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_acknowledged(url: str) -> None:
    """After SIGKILL at any moment, every reported write is there, and the database opens at once."""
    for round_ in range(2):
        with script(WRITER.replace("range(start", f"range({round_} * 500_000 + start"), url, str(MIGRATIONS)) as process:
            reported = [int(line(process)) for _ in range(100 + 57 * round_)]
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert process.stdout is not None
            reported += [int(text) for text in process.stdout.read().split("\n")[:-1]]
        async with opened(url) as database:
            kept = set(await database.read(ids))
            assert kept >= set(reported)
            assert len(kept - {0} - set(reported)) <= 4, "and no more than was under way"
            await database.write(lambda c: c.execute(sa.text("DELETE FROM facts WHERE id > 0")))


def _modes(folder: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0, 0o022, 0o002])
async def test_others_do_not_read_a_database(tmp_path: Path, umask: int) -> None:
    """With any umask, only the owner can read a database, its write-ahead log and the created folders; an existing folder
    keeps its mode.
    """
    (tmp_path / "there").mkdir(mode=0o755)
    (tmp_path / "there").chmod(0o755)
    before = os.umask(umask)
    try:
        async with opened(f"sqlite:///{tmp_path}/there/made/deep/facts.db") as database:
            await database.write(insert(1))
            await database.read(ids)
            folder = tmp_path / "there" / "made" / "deep"
            assert _modes(folder) == dict.fromkeys(("facts.db", "facts.db-wal", "facts.db-shm"), 0o600)
    finally:
        os.umask(before)
    assert _modes(tmp_path) == {"there": 0o755}
    assert _modes(tmp_path / "there") == {"made": 0o700}
    assert _modes(tmp_path / "there" / "made") == {"deep": 0o700}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
async def test_others_do_not_read_an_old_database_any_more(sqlite: str, tmp_path: Path) -> None:
    """Files that an earlier version left readable, including a killed process's write-ahead log, become private."""
    async with opened(sqlite) as database:
        await database.write(insert(1))
        for file in (tmp_path / "state").iterdir():
            file.chmod(0o644)
        async with opened(sqlite) as again:
            assert await again.read(ids) == [0, 1]
            assert set(_modes(tmp_path / "state").values()) == {0o600}
        await database.write(insert(2))
        assert await database.read(ids) == [0, 1, 2]


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
async def test_the_connections_of_a_process_are_bounded(url: str) -> None:
    """However many reads come at once: operators set the server's `max_connections` by it."""

    def opened_now(connection: Connection) -> int:
        connection.exec_driver_sql("SELECT pg_sleep(0.05)")
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return int(connection.exec_driver_sql(query).scalar_one())

    async with opened(url) as database:
        counts = await asyncio.gather(*(database.read(opened_now) for _ in range(5 * MAX_CONNECTIONS)))
    assert max(counts) <= MAX_CONNECTIONS


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
async def test_a_server_that_takes_no_writes_is_not_healthy(url: str) -> None:
    """A standby answers each question, and refuses each job: the check of the database must tell."""
    async with opened(url) as database:
        assert await database.ping() >= 0
        await database.write(lambda c: c.exec_driver_sql("SET default_transaction_read_only = on"))
        with pytest.raises(Unavailable, match="takes no writes"):
            await database.ping()


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("state", ["40P01", "40001"])
async def test_a_transaction_that_met_another_process_is_repeated(url: str, state: str) -> None:
    """PostgreSQL undoes one of two transactions that wait for each other. It runs again, a few times; other errors are not
    repeated.
    """
    runs = 0

    def work(connection: Connection, errors: list[str]) -> int:
        nonlocal runs
        runs += 1
        insert(1_000 + len(errors))(connection)
        if errors:
            connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'met' USING ERRCODE = '{errors.pop()}'; END $$")
        return runs

    async with opened(url) as database:
        assert await database.write(partial(work, errors=[state] * 4)) == 5
        runs = 0
        with pytest.raises(Unavailable, match="met"):
            await database.write(partial(work, errors=[state] * 9))
        assert runs == 5
        runs = 0
        with pytest.raises(sa.exc.DBAPIError):
            await database.write(partial(work, errors=["22012"]))
        assert runs == 1
        query = sa.text("SELECT id FROM facts WHERE id >= 1000")
        assert await database.read(lambda connection: list(connection.execute(query).scalars())) == [1_000]


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("seen", [True, False])
async def test_a_connection_that_ended_meanwhile_is_replaced(url: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next use: its end came in the connection, or its server is asked because it was idle."""
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    monkeypatch.setattr("tallystick.runtime.postgres_backend._PING_AFTER", 3_600.0 if seen else -1.0)
    used = set[Any]()
    async with opened(url) as database, opened(url) as other:
        pool = database._backend._engine.sync_engine  # type: ignore[attr-defined]
        event.listen(pool, "checkout", lambda connection, *_: used.add(connection.driver_connection))
        await asyncio.gather(*(database.read(ids) for _ in range(4)))
        await other.write(lambda connection: connection.execute(sa.text(end)).all())
        async with asyncio.timeout(IN_TIME):
            while not all(connection.is_closed() for connection in used):  # noqa: ASYNC110 - the driver has no event for it
                await asyncio.sleep(0.01)
        if not seen:
            monkeypatch.setattr("asyncpg.Connection.is_closed", lambda _: False)
        assert await database.write(insert(7)) == 7
        assert await database.read(ids) == [0, 7]


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("idle", [True, False])
async def test_the_server_is_asked_only_about_idle_connections(url: str, idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question before each transaction would cost as much as a statement of it."""
    asked = list[str]()
    fetchrow = asyncpg.Connection.fetchrow

    async def count(connection: Any, query: str, *arguments: Any, **options: Any) -> Any:
        asked.append(query)
        return await fetchrow(connection, query, *arguments, **options)

    async with opened(url) as database:
        monkeypatch.setattr("tallystick.runtime.postgres_backend._PING_AFTER", -1.0 if idle else 3_600.0)
        monkeypatch.setattr("asyncpg.Connection.fetchrow", count)
        for number in range(3):
            await database.write(insert(number + 1))
    assert asked == [";"] * 3 * idle


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
async def test_a_process_that_hangs_in_a_transaction_holds_no_locks(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that waits for its row goes on. When it is back, its write has failed, and the next one works."""
    settings = {"idle_in_transaction_session_timeout": "200ms"}
    monkeypatch.setattr("tallystick.runtime.postgres_backend._SETTINGS", settings)
    locked, hung = threading.Event(), threading.Event()

    def hang(connection: Connection) -> None:
        connection.execute(sa.text("UPDATE facts SET word = 'hung' WHERE id = 0"))
        locked.set()
        hung.wait(IN_TIME)  # the whole event loop stands still, as that of a process that was stopped
        connection.execute(sa.text("SELECT 1"))

    async def other() -> str:
        async with opened(url) as database:
            await database.write(lambda c: c.execute(sa.text("UPDATE facts SET word = 'gone on' WHERE id = 0")))
            return await database.read(lambda c: c.execute(sa.text("SELECT word FROM facts WHERE id = 0")).scalar_one())

    def wait_for_it() -> str:
        locked.wait(IN_TIME)
        try:
            return asyncio.run(other())
        finally:
            hung.set()

    async with opened(url) as database:
        waiting = asyncio.create_task(asyncio.to_thread(wait_for_it))
        with pytest.raises(Unavailable):
            await database.write(hang)
        assert await waiting == "gone on"
        await database.write(insert(1))
        assert await database.read(ids) == [0, 1]


@pytest.mark.skipif(not POSTGRES, reason="needs PostgreSQL, which scripts/test starts")
@pytest.mark.parametrize("url", ["postgres"], indirect=True)
async def test_a_migration_may_take_its_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of its statements, on a machine that has no time for it."""
    monkeypatch.setattr("tallystick.runtime.postgres_backend._SETTINGS", {"idle_in_transaction_session_timeout": "100ms"})
    patient = database_migration.migrate

    def slowly(connection: Connection, migrations: Path) -> None:
        connection.execute(sa.text("SELECT 1"))
        time.sleep(0.5)
        patient(connection, migrations)

    monkeypatch.setattr("tallystick.runtime.storage.migrate", slowly)
    async with opened(url) as database:
        assert await database.read(ids) == [0]

"""A database that cannot be opened gives one error that names the setting and what to do, without a password or a traceback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from coordinator.storage.store import Store
from tallystick.cli.local.processes import free_port
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.database_errors import is_gone
from tallystick.runtime.postgres_backend import postgres_engine
from tallystick.runtime.single_instance import instance_lock
from tallystick.runtime.storage import Database
from tests.postgres import POSTGRES, empty_database
from tests.runtime.test_storage import MIGRATIONS, ids, insert, opened

SECRET = "s3cret"


async def failure(url: str | sa.URL, setting: str = "db") -> Unavailable:
    """The error of opening a database, after a check that it is one line without the password."""
    database = Database(url, setting)
    with pytest.raises(Unavailable) as error:
        await database.start(MIGRATIONS)
    await database.close()
    text = str(error.value)
    assert error.value.code is Code.DATABASE_UNAVAILABLE
    assert text.startswith(f"{setting}: ")
    assert SECRET not in text
    assert "\n" not in text
    assert "sqlalche" not in text
    return error.value


def _folder(path: Path) -> None:
    path.mkdir()


def _below_a_file(path: Path) -> None:
    path.parent.joinpath("file").write_text("")


def _other_content(path: Path) -> None:
    path.write_text("this is a letter and no database\n" * 100)


def _read_only(path: Path) -> None:
    path.symlink_to("/proc/version")


@pytest.mark.parametrize(
    ("prepare", "name", "hint"),
    [
        (_folder, "c.db", "Is a directory"),
        (_below_a_file, "file/c.db", "file"),
        (_other_content, "c.db", "is damaged, or is no SQLite database (file is not a database)"),
        (_read_only, "c.db", "c.db"),
    ],
)
async def test_files_that_are_no_database(tmp_path: Path, prepare: Callable[[Path], None], name: str, hint: str) -> None:
    """A folder, a path below a file, another file and an unwritable path are the operator's to change; nothing is retried."""
    prepare(tmp_path / "c.db")
    error = await failure(f"sqlite:///{tmp_path}/{name}")
    assert hint in str(error)
    assert str(tmp_path / name) in str(error)
    assert (error.fault, error.retry) == (Fault.CLIENT, False)


@pytest.mark.parametrize("name", ["file/c.db", "folder/../file/c.db"])
async def test_the_lock_reports_a_path_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    """The coordinator's lock is taken first, and its error is the same."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match=r"^db: unable to open database file"):
        await Store(f"sqlite:///{tmp_path}/{name}").start()


async def test_a_newer_schema(tmp_path: Path) -> None:
    """A schema that this version does not know says to upgrade or to restore, and is the operator's to solve."""
    async with opened(f"sqlite:///{tmp_path}/newer.db") as newer:
        await newer.write(lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num = '9999'")))
    error = await failure(f"sqlite:///{tmp_path}/newer.db", "ledger_file")
    assert error.fault is Fault.CLIENT
    for expected in ("newer.db has the schema revision 9999", "upgrade this program", "restore the backup"):
        assert expected in str(error)


@asynccontextmanager
async def server(answer: bytes | None) -> AsyncIterator[int]:
    """A server that is no PostgreSQL: it says something at once, or nothing at all. Yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            await reader.read()
        else:
            writer.write(answer)
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield running.sockets[0].getsockname()[1]


async def test_a_server_that_is_not_there() -> None:
    """An unknown host, a refused connection and silence are told apart; the last two may pass, so they may be retried."""
    unknown = await failure(f"postgres://tally:{SECRET}@no.such.host.invalid/d")
    assert "the host 'no.such.host.invalid' is unknown" in str(unknown)
    assert (unknown.fault, unknown.retry) == (Fault.CLIENT, False)
    port = free_port(0)
    for host in ("127.0.0.1", "localhost"):
        refused = await failure(f"postgresql+psycopg2://tally:{SECRET}@{host}:{port}/d")
        assert f"no database server accepts connections at {host}:{port}" in str(refused)
        assert refused.retry
    async with server(None) as silent:
        error = await failure(f"postgresql://tally:{SECRET}@127.0.0.1:{silent}/d?connect_timeout=1&sslmode=disable")
    assert f"127.0.0.1:{silent} does not answer in time" in str(error)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b"", b"N", b"\x00" * 50])
async def test_another_kind_of_server(answer: bytes) -> None:
    """A server of another protocol gives one error that names its address."""
    async with server(answer) as port:
        url = f"postgresql://tally:{SECRET}@127.0.0.1:{port}/d?connect_timeout=5"
        assert f"127.0.0.1:{port}" in str(await failure(url))
        with pytest.raises(Unavailable, match=r"^db: "):
            await instance_lock(url, "coordinator").acquire()


@pytest.mark.skipif(not POSTGRES, reason="TALLYSTICK_TEST_POSTGRES is not set")
async def test_what_postgresql_refuses() -> None:
    """An unknown database, an unknown user and a parameter that the server does not know are named."""
    url = sa.make_url(POSTGRES)
    for changed, hint in (
        (url.set(database="no_such"), "database 'no_such' on"),
        (url.set(username="nobody_here"), "refuses user 'nobody_here'"),
        (url.update_query_dict({"no_such_parameter": "1"}), "no_such_parameter"),
    ):
        error = await failure(changed.render_as_string(hide_password=False))
        assert hint in str(error)
        assert (error.fault, error.retry) == (Fault.CLIENT, False)


@pytest.mark.parametrize(
    ("sqlstate", "hint", "retry"),
    [
        ("28P01", "refuses the password of user 'tally'", False),
        ("28000", "refuses user 'tally': what the server says", False),
        ("3D000", "database 'market' on 127.0.0.1:{port} does not exist; create it with `createdb`", False),
        ("57P03", "takes no connection now: what the server says", True),
        ("53300", "takes no connection now: what the server says", True),
        ("42501", "database 'market' on 127.0.0.1:{port} cannot be used: what the server says", False),
    ],
)
async def test_what_a_server_refuses_at_the_start(sqlstate: str, hint: str, retry: bool) -> None:
    """Each refusal of PostgreSQL (by its SQLSTATE) names the user or the database; what may pass may be retried."""
    fields = b"SFATAL\0VFATAL\0C" + sqlstate.encode() + b"\0Mwhat the server says\0\0"
    async with server(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields) as port:
        error = await failure(f"postgres://tally:{SECRET}@127.0.0.1:{port}/market?sslmode=disable")
    assert hint.format(port=port) in str(error)
    assert (error.retry, error.fault) == (retry, Fault.NOBODY if retry else Fault.CLIENT)


async def test_a_server_whose_certificate_nobody_can_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the parameter that is missing, in both of its forms."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)
    error = await failure(f"postgres://tally:{SECRET}@127.0.0.1:9/market?sslmode=verify-full")
    assert "sslrootcert=FILE" in str(error)
    assert "sslrootcert=system" in str(error)
    assert (error.retry, error.fault) == (False, Fault.CLIENT)


_SERVER_FAILS = ("08006", "25006", "40001", "40P01", "53100", "53300", "57014", "57P01", "57P02", "57P03", "58030")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_the_database_of_another_program(kind: str, tmp_path: Path) -> None:
    """Programs number their revisions alike. One that is given another's database says so and leaves it as it was."""
    if kind == "postgres" and not POSTGRES:
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    url = await empty_database() if kind == "postgres" else f"sqlite:///{tmp_path}/state.db"
    for _ in range(2):
        store = Store(url)
        await store.start()
        await store.close()
        error = await failure(url)
        assert "in use by another program of Tallystick (coordinator)" in str(error)
        assert not error.retry
    foreign = Store(url := f"sqlite:///{tmp_path}/facts.db")
    async with opened(url) as database:
        before = await database.read(lambda c: set(sa.inspect(c).get_table_names()))
        with pytest.raises(Unavailable, match=r"another program of Tallystick \(runtime\)"):
            await foreign.start()
        assert await database.read(lambda c: set(sa.inspect(c).get_table_names())) == before
    await foreign.close()


async def test_a_database_from_before_the_mark(tmp_path: Path) -> None:
    """A database without the mark of its program gets it, and keeps its rows."""
    url = f"sqlite:///{tmp_path}/facts.db"
    async with opened(url) as database:
        await database.write(insert(7))
        await database.write(lambda c: c.execute(sa.text("DROP TABLE schema_owner")))
    async with opened(url) as database:
        assert await database.read(ids) == [0, 7]
        assert await database.read(lambda c: c.execute(sa.text("SELECT program FROM schema_owner")).scalar_one()) == "runtime"


@pytest.mark.skipif(not POSTGRES, reason="TALLYSTICK_TEST_POSTGRES is not set")
@pytest.mark.parametrize(("sqlstate", "gone"), [*((code, True) for code in _SERVER_FAILS), ("23505", False), ("42P01", False)])
async def test_what_a_server_answers_while_it_is_in_use(sqlstate: str, gone: bool) -> None:
    """A server that stops, starts, is full or cancels makes the work Unavailable; a fault of the work itself stays as it is."""
    raising = sa.text(f"DO $$ BEGIN RAISE EXCEPTION 'no luck' USING ERRCODE = '{sqlstate}'; END $$")
    async with opened(await empty_database()) as database:
        for run in (database.read, database.write):
            with pytest.raises(Unavailable if gone else sa.exc.DBAPIError, match="no luck") as caught:
                await run(lambda connection: connection.execute(raising))
            if gone:
                assert isinstance(caught.value, Unavailable)
                assert (caught.value.code, caught.value.retry) == (Code.DATABASE_UNAVAILABLE, True)


@pytest.mark.skipif(not POSTGRES, reason="TALLYSTICK_TEST_POSTGRES is not set")
async def test_a_server_that_takes_no_new_connection_while_it_is_in_use() -> None:
    """A server that is starting up refuses new connections with an error of its own, which makes the work Unavailable too."""
    fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
    async with server(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields) as port:
        engine = postgres_engine(sa.make_url(f"postgresql+asyncpg://tally@127.0.0.1:{port}/d?sslmode=disable"))
        with pytest.raises(sa.exc.DBAPIError) as caught:
            async with engine.connect():
                pass
        await engine.dispose()
    assert is_gone(caught.value)

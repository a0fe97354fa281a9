"""Database addresses: which forms are understood, and that no message shows a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import CoordinatorConfig
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.database_url import (
    describe_database,
    parse_database_url,
    postgres_dsn,
    sqlite_url,
    trusts_system_roots,
)
from tallystick.runtime.sqlite_backend import sqlite_file

SECRET = "s3cret"


@pytest.mark.parametrize(
    "scheme",
    [
        *("postgres", "postgresql", "POSTGRES", "pgsql", "postgresql+asyncpg", "postgresql+psycopg2", "postgresql+psycopg"),
        *("postgres+psycopg2", "postgresql+pg8000"),
    ],
)
def test_every_client_of_postgresql_names_the_same_database(scheme: str) -> None:
    """The addresses of other programs' drivers, and libpq's, are understood."""
    url = parse_database_url(f" {scheme}://tally:{SECRET}@db.example:5433/market\n", "db")
    assert (url.drivername, url.username, url.password) == ("postgresql+asyncpg", "tally", SECRET)
    assert (url.host, url.port, url.database) == ("db.example", 5433, "market")
    assert postgres_dsn(url) == (f"postgresql://tally:{SECRET}@db.example:5433/market", 10)


@pytest.mark.parametrize(
    ("query", "dsn", "seconds"),
    [
        ("sslmode=require", "sslmode=require", 10),
        ("ssl=require", "sslmode=require", 10),
        ("ssl=disable&sslmode=verify-full", "sslmode=verify-full", 10),
        ("connect_timeout=3", "", 3),
        ("connect_timeout=0", "", 10),
        ("connect_timeout=9999", "", 60),
        ("channel_binding=prefer&application_name=tally", "application_name=tally", 10),
    ],
)
def test_parameters_of_libpq(query: str, dsn: str, seconds: float) -> None:
    """Parameters that hosts put into their addresses reach the driver as it names them."""
    found = postgres_dsn(parse_database_url(f"postgres://u@h/d?{query}", "db"))
    assert found == ("postgresql://u@h/d" + (f"?{dsn}" if dsn else ""), seconds)


@pytest.mark.parametrize("query", ["sslrootcert=system", "sslmode=verify-full&sslrootcert=system&application_name=tally"])
def test_the_authorities_that_the_machine_trusts(query: str) -> None:
    """The word of libpq for them names no file; the driver, which knows files alone, does not get it."""
    url = parse_database_url(f"postgres://u@h/d?{query}", "db")
    assert trusts_system_roots(url)
    assert "ssl" not in postgres_dsn(url)[0]
    assert not trusts_system_roots(parse_database_url("postgres://u@h/d?sslmode=verify-full&sslrootcert=ca.pem", "db"))


def test_special_characters_in_a_password() -> None:
    """An escaped password is understood, and reaches the driver escaped."""
    url = parse_database_url("postgresql://u:p%40s%2Fs%3A@h/d", "db")
    assert url.password == "p@s/s:"
    assert postgres_dsn(url)[0] == "postgresql://u:p%40s%2Fs%3A@h/d"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("sqlite:///coordinator.db", "coordinator.db"),
        ("SQLite:///./a/b.db", "./a/b.db"),
        ("sqlite:////var/lib/c.db", "/var/lib/c.db"),
        ("sqlite+aiosqlite:///c.db", "c.db"),
        ("sqlite+pysqlite:///c.db", "c.db"),
        ("sqlite:///~/c.db", str(Path("~/c.db").expanduser())),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
    ],
)
def test_files_of_sqlite(text: str, path: str | None) -> None:
    """Relative and absolute paths, and databases in memory."""
    assert sqlite_file(parse_database_url(text, "db")) == (None if path is None else Path(path))


@pytest.mark.parametrize("path", ["/tmp/what?.db", "/tmp/50%.db", "/tmp/a#b.db", "/tmp/a b.db", "/tmp/ü.db"])
def test_a_path_is_not_an_address(path: str) -> None:
    """A path with characters that mean something in addresses names its file."""
    assert sqlite_file(sqlite_url(Path(path))) == Path(path)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "no scheme"),
        ("coordinator.db", "before the path of a file belongs sqlite:///"),
        ("/var/lib/c.db", "before an absolute one sqlite:////"),
        ("sqlite", "no scheme"),
        (f"tally:{SECRET}@h/d", "the scheme 'tally'"),
        (f"//tally:{SECRET}@h/d", "no scheme"),
        ("sqlite://c.db", "sqlite:///c.db"),
        ("sqlite://data/c.db", "sqlite:////data/c.db"),
        ("sqlite:c.db", "sqlite:///c.db"),
        ("sqlite:/c.db", "four before an absolute one (sqlite:////c.db)"),
        (f"mysql://tally:{SECRET}@h/d", "the scheme 'mysql'"),
        (f"mongodb+srv://tally:{SECRET}@h/d", "the scheme 'mongodb'"),
        ("http://h/d", "the scheme 'http'"),
        ("file:///c.db", "the scheme 'file'"),
        ("C:\\data\\c.db", "the scheme 'c'"),
        (f"postgresql+oracle://tally:{SECRET}@h/d", "the unknown driver 'oracle'"),
        ("sqlite+sqlcipher:///c.db", "the unknown driver 'sqlcipher'"),
        (f"postgresql://tally:p@{SECRET}@h/d", "write @ as %40"),
        (f"postgresql://tally:{SECRET}@h:port/d", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        (f"postgresql:tally:{SECRET}@h/d", "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"),
        (f"postgresql://tally:{SECRET}@h/d?channel_binding=require", "channel_binding=require is not supported"),
        (f"postgresql://tally:{SECRET}@h/d?sslrootcert=system&sslmode=require", "needs sslmode=verify-full"),
        (f"postgresql://tally:{SECRET}@h/d?connect_timeout=soon", "connect_timeout: expected seconds"),
    ],
)
def test_an_address_that_is_not_understood(text: str, hint: str) -> None:
    """The error names the setting and what was expected, and never shows a password. The coordinator's config refuses it."""
    with pytest.raises(BadMessage, match=r"^db: ") as error:
        parse_database_url(text, "db")
    assert hint in str(error.value)
    assert SECRET not in str(error.value)
    with pytest.raises(BadMessage, match=r"^config: db: "):
        CoordinatorConfig(db=text)


def test_a_description_has_no_credentials() -> None:
    """Descriptions for errors and logs have neither user nor password."""
    url = parse_database_url(f"postgresql://tally:{SECRET}@db.example/market", "db")
    assert describe_database(url) == "database 'market' on db.example:5432"
    assert describe_database(parse_database_url("postgresql:///market?host=/run/pg", "db")) == "database 'market' on /run/pg:5432"
    assert describe_database(parse_database_url("sqlite:///c.db", "db")) == "c.db"

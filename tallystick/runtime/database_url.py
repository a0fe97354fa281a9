"""Database addresses: SQLite files, and PostgreSQL in the forms that its clients use. No message contains a password."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tallystick.protocol.errors import BadMessage

FORMS = "sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
POSTGRES_SCHEMES = frozenset({"postgres", "postgresql", "pgsql"})
POSTGRES_DRIVERS = frozenset({"", "asyncpg", "psycopg", "psycopg2", "psycopg2cffi", "psycopg_async", "pg8000"})
"""Drivers of other programs. All stand for the one that is installed here, because the database is the same."""
SQLITE_DRIVERS = frozenset({"", "pysqlite", "aiosqlite"})
SYSTEM_ROOTS = "system"
"""libpq's `sslrootcert` for the certificate authorities that this machine trusts."""
CONNECT_SECONDS = 10.0
MAX_CONNECT_SECONDS = 60.0

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*)(?:\+([A-Za-z0-9_.-]*))?:(.*)", re.DOTALL)
_WITHOUT_BINDING = frozenset({"disable", "prefer"})


def parse_database_url(text: str, setting: str) -> URL:
    """The address of a database, with the driver that is installed here. Raises BadMessage that names the setting."""
    match = _SCHEME.fullmatch(text.strip())
    if match is None:
        hint = "; before the path of a file belongs sqlite:///, before an absolute one sqlite:////" if "@" not in text else ""
        raise BadMessage(f"{setting}: expected {FORMS}, got no scheme{hint}")
    scheme, driver, rest = match[1].lower(), (match[2] or "").lower(), match[3]
    drivers = POSTGRES_DRIVERS if scheme in POSTGRES_SCHEMES else SQLITE_DRIVERS if scheme == "sqlite" else None
    if drivers is None:
        raise BadMessage(f"{setting}: expected {FORMS}, got the scheme {scheme[:40]!r}")
    if driver not in drivers:
        raise BadMessage(f"{setting}: expected {FORMS}, got the unknown driver {driver[:40]!r}")
    return _parse_sqlite(rest, setting) if scheme == "sqlite" else _parse_postgres(rest, setting)


def sqlite_url(path: Path) -> URL:
    """The address of an SQLite file. Its path may contain any character."""
    return URL.create("sqlite", database=str(path))


def _parse_sqlite(rest: str, setting: str) -> URL:
    if rest in {"", "//", "///"}:
        return URL.create("sqlite")  # in memory
    if not rest.startswith("///"):
        path = rest.lstrip("/")
        raise BadMessage(
            f"{setting}: expected three slashes before a relative path (sqlite:///{path}) and four before an absolute one "
            f"(sqlite:////{path}), got sqlite:{rest[:200]}"
        )
    url = make_url(f"sqlite:{rest}")
    home_relative = (url.database or "").startswith("~/")
    return url.set(database=str(Path(url.database or "").expanduser())) if home_relative else url


def _parse_postgres(rest: str, setting: str) -> URL:
    """Understands what libpq's addresses have (https://www.postgresql.org/docs/current/libpq-connect.html)."""
    try:
        url = make_url(f"postgresql+asyncpg:{rest}")
    except (ArgumentError, ValueError):
        url = None
    if url is None or any(sign in (url.host or "") + (url.database or "") for sign in "@:"):
        raise BadMessage(
            f"{setting}: expected postgresql://USER:PASSWORD@HOST:PORT/DATABASE; in user and password, write @ as %40, : as %3A, "
            "/ as %2F, ? as %3F, # as %23 and % as %25"
        )
    query = dict(url.query)
    if "ssl" in query:  # SQLAlchemy's name of libpq's parameter
        query.setdefault("sslmode", query.pop("ssl"))
    if str(query.pop("channel_binding", "prefer")) not in _WITHOUT_BINDING:
        raise BadMessage(
            f"{setting}: channel_binding=require is not supported by the driver; remove it, and use sslmode=verify-full"
        )
    if query.get("sslrootcert") == SYSTEM_ROOTS and query.setdefault("sslmode", "verify-full") != "verify-full":
        raise BadMessage(f"{setting}: sslrootcert=system needs sslmode=verify-full, since public authorities vouch for anybody")
    if "connect_timeout" in query and not str(query["connect_timeout"]).isdecimal():
        raise BadMessage(f"{setting}: connect_timeout: expected seconds")
    return url.set(query=query)


def describe_database(url: URL) -> str:
    """A database in words, without user and password."""
    if url.drivername.startswith("sqlite"):
        return url.database or "the database in memory"
    return f"database {url.database or url.username or 'postgres'!r} on {describe_server(url)}"


def describe_server(url: URL) -> str:
    """A PostgreSQL server in words."""
    host = url.host or str(url.query.get("host", "localhost"))
    return f"{host}:{url.port or 5432}"


def trusts_system_roots(url: URL) -> bool:
    """Whether the server's certificate is checked against the authorities that this machine trusts."""
    return url.query.get("sslrootcert") == SYSTEM_ROOTS


def postgres_dsn(url: URL) -> tuple[str, float]:
    """The address as asyncpg takes it, password included, and the seconds that a connection may take.

    With `trusts_system_roots`, whoever connects passes a TLS context: asyncpg reads a file of authorities alone.
    """
    query = dict(url.query)
    if trusts_system_roots(url):
        del query["sslrootcert"], query["sslmode"]
    seconds = float(str(query.pop("connect_timeout", "")) or CONNECT_SECONDS)
    plain = url.set(drivername="postgresql", query=query)
    return plain.render_as_string(hide_password=False), min(seconds or CONNECT_SECONDS, MAX_CONNECT_SECONDS)

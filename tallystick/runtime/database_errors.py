"""Errors of databases, in words: which setting, which database, what is wrong, and what to do. None contains a password."""

from __future__ import annotations

import re
import socket
import sqlite3
from collections.abc import Iterator

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.runtime.database_migration import ForeignDatabase, MigrationFailed
from tallystick.runtime.database_url import describe_database, describe_server

BUSY_SECONDS = 15.0
"""The time for which a transaction waits for another process to release SQLite's write lock."""
START_SECONDS = 60.0
"""The same for the start: another process may be migrating the database, which takes long on a slow disk."""
MAX_REASON = 300
_REVISION = re.compile(r"Can't locate revision identified by '([^']{1,80})'")
_SERVER_FAILS = ("08", "25006", "40001", "40P01", "53", "57", "58")
"""How PostgreSQL's codes begin for what another attempt may not meet: connection, a standby that takes no writes, transactions in
each other's way, resources such as disk and connections, a server that starts, stops or cancels, and its system (appendix A of
PostgreSQL's documentation).
"""
_CALL_FAILED = "Connect call failed"
"""asyncio's text if a host has several addresses and none accepts the connection."""


def explain_failed_start(error: BaseException, url: URL, setting: str) -> Unavailable:
    """The error for a database that cannot be opened or migrated. If the operator must change something, it is not retried."""
    if is_locked(error):
        return _locked(url, START_SECONDS)
    if is_damaged(error):
        return explain(error, url, setting) or _unavailable(f"{setting}: {error}")
    if isinstance(error, ForeignDatabase):
        return _unavailable(
            f"{setting}: {describe_database(url)} is in use by another program of Tallystick ({error.owner}); each needs a "
            "database of its own: name another one"
        )
    newer = _REVISION.search(str(error)) if isinstance(error, MigrationFailed) else None
    if newer is not None:
        return _unavailable(
            f"{setting}: {describe_database(url)} has the schema revision {newer[1]}, which this version does not know. If a "
            "newer version wrote it, upgrade this program, or restore the backup from before the upgrade. Otherwise name another "
            "database"
        )
    if url.drivername.startswith("sqlite"):
        return _unavailable(f"{setting}: unable to open database file {url.database}: {describe_error(error, url)}")
    return _explain_postgres(error, url, setting)


def explain(error: BaseException, url: URL, setting: str) -> Unavailable | None:
    """The error for a database that fails while it is in use; None for an error of the work itself."""
    if is_locked(error):
        return _locked(url, BUSY_SECONDS)
    if is_damaged(error):
        text = (
            f"{setting}: {url.database} is damaged, or is no SQLite database ({getattr(error, 'orig', error)}). If it is this "
            "program's: stop all its processes, copy the file with its -wal and -shm files, then restore a backup or recover the "
            "readable rows with `sqlite3 FILE .recover | sqlite3 NEW`. Otherwise name another file"
        )
        return _unavailable(text)
    if not is_gone(error):
        return None
    return Unavailable(Code.DATABASE_UNAVAILABLE, f"the database does not answer: {describe_error(error, url)}")


def _locked(url: URL, seconds: float) -> Unavailable:
    path = url.database
    text = (
        f"another process has held the lock of {path} for more than {seconds:g} s; nothing was written. It hangs or was "
        f"stopped: find it with `fuser -v {path}`, then let it continue or end it"
    )
    return Unavailable(Code.DATABASE_UNAVAILABLE, text)


def is_gone(error: BaseException) -> bool:
    """Whether an error says that the database does not answer."""
    if isinstance(error, OperationalError | PoolTimeout | OSError):
        return True
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or _sqlstate(error).startswith(_SERVER_FAILS)
    return not _names(error).isdisjoint({"PostgresError", "InterfaceError"})  # raised by a new connection, outside of any work


def _sqlstate(error: DBAPIError) -> str:
    """The server's code of an error, five characters; empty without one."""
    return str(getattr(error.orig, "sqlstate", None) or "")


def is_damaged(error: BaseException) -> bool:
    """Whether SQLite reports a damaged file."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_locked(error: BaseException) -> bool:
    """Whether SQLite reports that another process has the file's lock."""
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


def _explain_postgres(error: BaseException, url: URL, setting: str) -> Unavailable:
    names, reason, server = _names(error), describe_error(error, url), describe_server(url)
    retry = False
    if isinstance(error, socket.gaierror):
        text = f"the host {url.host!r} is unknown ({reason})"
    elif isinstance(error, ConnectionRefusedError) or _CALL_FAILED in str(error):
        text, retry = f"no database server accepts connections at {server}; is it running?", True
    elif isinstance(error, TimeoutError):
        text, retry = f"{server} does not answer in time; check the host, the port and firewalls", True
    elif "InvalidPasswordError" in names:
        text = f"{server} refuses the password of user {url.username!r}"
    elif "InvalidAuthorizationSpecificationError" in names:
        text = f"{server} refuses user {url.username!r}: {reason}"
    elif "InvalidCatalogNameError" in names:
        text = f"{describe_database(url)} does not exist; create it with `createdb`, or name another"
    elif not names.isdisjoint({"CannotConnectNowError", "TooManyConnectionsError"}):
        text, retry = f"{server} takes no connection now: {reason}", True
    elif "root certificate file" in reason:
        remedy = "name its file with sslrootcert=FILE, or write sslrootcert=system for a public one"
        text = f"no certificate authority is known that vouches for {server}: {remedy}"
    else:
        text, retry = f"{describe_database(url)} cannot be used: {reason}", isinstance(error, OSError)
    return _unavailable(f"{setting}: {text}", retry=retry)


def _unavailable(text: str, *, retry: bool = False) -> Unavailable:
    error = Unavailable(Code.DATABASE_UNAVAILABLE, text, fault=Fault.NOBODY if retry else Fault.CLIENT)
    error.retry = retry
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the driver's error in it, and the causes of both."""
    for candidate in (error, getattr(error, "orig", None)):
        if isinstance(candidate, BaseException):
            yield candidate
            if candidate.__cause__ is not None:
                yield candidate.__cause__


def _names(error: BaseException) -> set[str]:
    """Names of the classes of an error. asyncpg's are known by name, because only PostgreSQL's users import it."""
    return {ancestor.__name__ for cause in _causes(error) for ancestor in type(cause).__mro__}


def describe_error(error: BaseException, url: URL) -> str:
    """The driver's own words, without SQL and without the password."""
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return f"{cause.strerror} ({cause.filename})"
    text = " ".join(str(cause).split()) or type(cause).__name__
    text = re.sub(r"^<class '[^']*'>: ", "", text)  # how SQLAlchemy begins asyncpg's errors
    if url.password:
        text = text.replace(str(url.password), "***")
    return text[:MAX_REASON]

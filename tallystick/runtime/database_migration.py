"""Schema migrations, by Alembic. It is imported only for a database that is not at the newest revision: that takes long."""

from __future__ import annotations

import gc
import re
import sys
import threading
from pathlib import Path

from sqlalchemy import Column, Connection, MetaData, String, Table, inspect, select, text

from tallystick.runtime.optional_import import without_module

MIGRATION_LOCK = 0x7A11
"""The advisory lock of a migration: processes that start together on one PostgreSQL wait for the one that migrates."""
_REVISION = re.compile(r"^revision\b[^=\n]*= *[\"']([^\"']+)", re.MULTILINE)
_DOWN_REVISION = re.compile(r"^down_revision\b[^=\n]*= *[\"']([^\"']+)", re.MULTILINE)


schema_owner = Table("schema_owner", MetaData(), Column("program", String(32), primary_key=True))
"""One row: the program whose tables the database has. All programs number their revisions alike, so without it one program
would migrate the tables of another.
"""


MIGRATING = threading.Lock()
"""Held during a migration. Alembic keeps its state in module globals, so a process migrates one database at a time."""
_kept = threading.Event()
"""Set while the process may migrate further databases soon."""
_kept.set()


class MigrationFailed(Exception):
    """Alembic cannot migrate the database; the message has its words."""


class ForeignDatabase(MigrationFailed):
    """The database has the tables of another program."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"it has the tables of {owner}")
        self.owner = owner


def migrate(connection: Connection, migrations: Path) -> None:
    """Migrates to the head of `migrations`/versions, in the connection's transaction. Raises MigrationFailed, SQLAlchemyError.

    The folder that `migrations` lies in names the program.
    """
    if connection.dialect.name == "postgresql":  # SQLite's write lock is held already
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
    _claim(connection, migrations.parent.name)
    if _current(connection) == _heads(migrations):
        return
    with without_module("pygments"):  # by which its templates would colour source code: 3 MiB of a daemon, as long as it runs
        from alembic import command  # noqa: PLC0415 - see above
        from alembic.config import Config  # noqa: PLC0415 - see above
        from alembic.util import CommandError  # noqa: PLC0415 - see above

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(migrations / "versions"))
    config.set_main_option("path_separator", "newline")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise MigrationFailed(str(error)) from error
    finally:
        if not _kept.is_set():
            _unload()


def _claim(connection: Connection, program: str) -> None:
    """Makes the database this program's. Raises ForeignDatabase."""
    if inspect(connection).has_table(schema_owner.name):
        owner = connection.execute(select(schema_owner.c.program)).scalar_one()
        if owner != program:
            raise ForeignDatabase(owner)
    else:
        schema_owner.create(connection)
        connection.execute(schema_owner.insert(), {"program": program})


def unload_migrations() -> None:
    """Lets go of Alembic, and of mako, its only user: a daemon that has started seldom needs them. After a later migration, which
    loads them again, they go at once. Does nothing during a migration.
    """
    if MIGRATING.acquire(blocking=False):
        try:
            _kept.clear()
            _unload()
        finally:
            MIGRATING.release()


def _unload() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in {"alembic", "mako"}]:
        del sys.modules[name]
    gc.collect()


def _heads(migrations: Path) -> set[str]:
    """The revisions that no other one follows, as Alembic finds them."""
    sources = [path.read_text(encoding="utf-8") for path in (migrations / "versions").glob("*.py")]
    revisions = {match[1] for source in sources if (match := _REVISION.search(source))}
    return revisions - {match[1] for source in sources if (match := _DOWN_REVISION.search(source))}


def _current(connection: Connection) -> set[str]:
    """The revisions that the database says it has; empty for a new one."""
    if not inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.execute(text("SELECT version_num FROM alembic_version")).scalars())

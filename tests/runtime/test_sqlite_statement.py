"""Statements that the driver runs itself: their values, rows, transaction and errors are those of SQLAlchemy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import IntegrityError, OperationalError

from tallystick.runtime.sqlite_statement import SqliteStatement

items = sa.Table(
    "items",
    sa.MetaData(),
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("count", sa.Integer),
    sa.Column("kind", sa.String, server_default="plain"),
)
INSERT = SqliteStatement(sa.insert(items), "name count")
_ADD = insert(items)
ADD = SqliteStatement(
    _ADD.on_conflict_do_update(index_elements=["name"], set_={"count": items.c.count + _ADD.excluded.count}), "name count"
)
COUNTED = SqliteStatement(
    sa.select(items.c.name, items.c.count.label("number"))
    .where(items.c.kind == "plain", items.c.count >= sa.bindparam("least"))
    .order_by(items.c.name)
    .limit(2)
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """A database with the table."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'x.db'}")
    items.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def connection(engine: sa.Engine) -> Iterator[Connection]:
    """A transaction."""
    with engine.begin() as connection:
        yield connection


def test_values_constants_and_rows(connection: Connection) -> None:
    """Values are bound by name, constants come with the statement, and rows have the names of their columns."""
    INSERT.run(connection, {"name": "a", "count": 3, "unused": "x"})
    for name, count in (("b", 4), ("c", 5), ("d", 1)):
        INSERT.run(connection, {"name": name, "count": count})
    rows = COUNTED.all(connection, {"least": 2})
    assert [(row.name, row.number) for row in rows] == [("a", 3), ("b", 4)]
    assert COUNTED.first(connection, {"least": 5}) == ("c", 5)
    assert COUNTED.first(connection, {"least": 6}) is None
    assert COUNTED.all(connection, {"least": 6}) == []


def test_an_insert_tells_the_number_of_its_row(connection: Connection) -> None:
    """One that inserts nothing tells 0, also after another one inserted a row."""
    some = SqliteStatement(
        sa.insert(items).from_select(["name", "count"], sa.select(sa.bindparam("to_name"), 1).where(sa.bindparam("whether")))
    )
    assert some.insert(connection, {"to_name": "a", "whether": True}) == 1
    assert some.insert(connection, {"to_name": "b", "whether": True}) == 2
    assert some.insert(connection, {"to_name": "c", "whether": False}) == 0


def test_what_exists_is_changed_instead(connection: Connection) -> None:
    """An INSERT with ON CONFLICT takes the values of its columns."""
    ADD.run(connection, {"name": "a", "count": 3})
    ADD.run(connection, {"name": "a", "count": 4})
    ADD.run(connection, {"name": "b", "count": 1})
    assert COUNTED.all(connection, {"least": 0}) == [("a", 7), ("b", 1)]


def test_it_is_part_of_the_transaction(engine: sa.Engine) -> None:
    """What it wrote is undone with the transaction of its connection."""
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        INSERT.run(connection, {"name": "a", "count": 3})
        connection.rollback()
        assert COUNTED.all(connection, {"least": 0}) == []


def test_errors_are_those_of_sqlalchemy(engine: sa.Engine, connection: Connection) -> None:
    """They say what failed, without the values, which may be secret."""
    INSERT.run(connection, {"name": "secret", "count": 3})
    row = {"name": "secret", "count": 3}
    with pytest.raises(IntegrityError) as failure:
        INSERT.run(connection, row)
    assert "secret" not in str(failure.value)
    assert isinstance(failure.value.orig, sqlite3.IntegrityError)
    missing = SqliteStatement(sa.select(sa.literal_column("1")).select_from(sa.text("nowhere")))
    with pytest.raises(OperationalError, match="nowhere"):
        missing.first(connection, {})
    connection.rollback()


def test_a_text_that_depends_on_its_values_is_refused() -> None:
    """A list of values has no fixed text."""
    with pytest.raises(ValueError, match="does not depend on its values"):
        SqliteStatement(sa.select(items).where(items.c.name.in_(["a", "b"])))

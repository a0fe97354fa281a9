"""Prepared statements: the rows they write, the values they convert, and the rows they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

from tallystick.runtime.prepared import Prepared, Statement

metadata = sa.MetaData()


class Padded(sa.types.TypeDecorator[int]):
    """A number as text of four digits."""

    impl = sa.String(4)
    cache_ok = True

    def process_bind_param(self, value: int | None, _dialect: Any) -> str | None:
        return None if value is None else f"{value:04d}"


facts = sa.Table(
    "facts",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("word", sa.String, unique=True),
    sa.Column("padded", Padded),
    sa.Column("flag", sa.Boolean),
)
counted = sa.Table("counted", metadata, sa.Column("name", sa.String, primary_key=True), sa.Column("n", sa.Integer, default=7))


@pytest.fixture
def connection() -> Iterator[Connection]:
    """A transaction on an empty database."""
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def rows(connection: Connection) -> list[tuple[Any, ...]]:
    """All facts, as the driver reads them."""
    return [tuple(row) for row in connection.exec_driver_sql("SELECT id, word, padded, flag FROM facts ORDER BY id")]


def row(word: str | None, padded: int | None = 7, flag: bool | None = True) -> dict[str, Any]:
    """A row of facts."""
    return {"word": word, "padded": padded, "flag": flag}


def test_rows_are_stored_with_their_columns_types(connection: Connection) -> None:
    """One row and many are stored; types convert values, and NULL stays NULL."""
    insert = Prepared(sa.insert(facts))
    assert insert.run(connection, row("one")) == 1
    assert insert.run(connection, row("two", None, None), row("three", 12, False)) == 2
    assert rows(connection) == [(1, "one", "0007", 1), (2, "two", None, None), (3, "three", "0012", 0)]


def test_the_order_of_a_rows_members_does_not_matter(connection: Connection) -> None:
    """Values go to the columns of their names."""
    Prepared(sa.insert(facts)).run(connection, {"flag": False, "padded": 1, "word": "x"})
    assert rows(connection) == [(1, "x", "0001", 0)]


def test_an_insert_of_some_columns_leaves_the_others(connection: Connection) -> None:
    """With `columns`, an INSERT sets those alone, the key included."""
    Prepared(sa.insert(facts), ["id", "word"]).run(connection, {"id": 9, "word": "x"})
    assert rows(connection) == [(9, "x", None, None)]


def test_no_rows_are_no_call(connection: Connection) -> None:
    """Without a row nothing runs, and nothing is changed."""
    assert Prepared(sa.insert(facts)).run(connection) == 0
    assert Prepared(sa.delete(facts).where(facts.c.word == sa.bindparam("w"))).run(connection) == 0
    assert rows(connection) == []


def test_updates_and_deletes_count_what_they_change(connection: Connection) -> None:
    """Parameters stand in conditions and values, more than once too; constants of the statement are bound and converted."""
    Prepared(sa.insert(facts)).run(connection, *(row(word) for word in "abc"))
    matches = (facts.c.word == sa.bindparam("w")) | (facts.c.word == sa.bindparam("w"))
    update = Prepared(sa.update(facts).where(matches, facts.c.padded == 7).values(padded=8, flag=sa.bindparam("f")))
    assert update.run(connection, {"w": "a", "f": False}, {"w": "c", "f": None}, {"w": "none", "f": True}) == 2
    assert rows(connection) == [(1, "a", "0008", 0), (2, "b", "0007", 1), (3, "c", "0008", None)]
    assert Prepared(sa.delete(facts).where(facts.c.word == sa.bindparam("w"))).run(connection, {"w": "b"}) == 1
    assert Prepared(sa.delete(facts)).run(connection, {}) == 2


def test_a_statement_may_depend_on_the_database(connection: Connection) -> None:
    """A function gives the statement for a dialect; an upsert ignores the row that is there."""
    asked: list[str] = []

    def upsert(dialect: str) -> Statement:
        asked.append(dialect)
        return sqlite.insert(facts).on_conflict_do_nothing()

    insert = Prepared(upsert)
    for word in ("a", "a", "b"):
        insert.run(connection, row(word))
    assert [stored[1] for stored in rows(connection)] == ["a", "b"]
    assert asked == ["sqlite"], "compiled once"


@pytest.mark.parametrize("wrong", [{}, {"word": "x"}, row("x") | {"id": 1}, {"word": "x", "padded": 1, "other": 2}])
def test_a_row_with_other_members_is_refused(connection: Connection, wrong: dict[str, Any]) -> None:
    """A member that lacks, or that the statement does not know, is an error and not NULL. No row is stored then."""
    with pytest.raises(ValueError, match="row"):
        Prepared(sa.insert(facts)).run(connection, row("fine"), wrong)
    assert rows(connection) == []


@pytest.mark.parametrize(
    "statement", [sa.insert(counted), sa.delete(facts).where(facts.c.id.in_([1, 2]))], ids=["default", "in list"]
)
def test_a_statement_that_needs_more_than_its_rows_is_refused(connection: Connection, statement: Statement) -> None:
    """Defaults that Python computes, and lists of changing length, do not work without SQLAlchemy's own execution."""
    columns = ["name"] if isinstance(statement, sa.Insert) else None
    with pytest.raises(TypeError, match="rows give all values"):
        Prepared(statement, columns).run(connection, {"name": "x"})


def test_errors_of_the_database_come_through(connection: Connection) -> None:
    """A row that breaks a constraint raises SQLAlchemy's error."""
    with pytest.raises(IntegrityError):
        Prepared(sa.insert(facts)).run(connection, row("a"), row("a"))

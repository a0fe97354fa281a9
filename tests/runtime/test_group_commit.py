"""Appended rows: those of a group share calls of the driver, stay in order with other writes, and fail alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, event
from sqlalchemy.exc import IntegrityError

from tallystick.protocol.errors import Unavailable
from tallystick.runtime.prepared import Prepared
from tallystick.runtime.storage import Database
from tests.runtime.test_storage import durability, ids, insert, opened, sqlite, stuck, url

__all__ = ["sqlite", "url"]  # fixtures
facts = sa.Table("facts", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("word", sa.String))
INSERT = Prepared(sa.insert(facts), ["id", "word"])
UPDATE = Prepared(sa.update(facts).where(facts.c.id == sa.bindparam("key")).values(word=sa.bindparam("new")))


def fact(number: int) -> tuple[Prepared, dict[str, Any]]:
    """A row to append."""
    return INSERT, {"id": number, "word": f"word {number}"}


def statements(database: Database) -> list[tuple[str, int]]:
    """A list that gets the first word of each statement that changes rows, and how many rows one call of the driver has."""
    seen: list[tuple[str, int]] = []
    engine = database._backend._engine  # type: ignore[attr-defined]  # both backends have one

    def record(_c: Any, _cursor: Any, sql: str, parameters: Any, _context: Any, many: bool) -> None:
        if sql.startswith(("INSERT", "UPDATE")):
            seen.append((sql.split(maxsplit=1)[0], len(parameters) if many else 1))

    event.listen(getattr(engine, "sync_engine", engine), "before_cursor_execute", record)
    return seen


async def test_appended_rows_of_a_group_are_one_call_for_each_statement(sqlite: str) -> None:
    """A hundred appends of two rows each that wait together take two calls of the driver."""
    async with opened(sqlite) as database:
        async with stuck(database):
            seen = statements(database)
            appends = [
                asyncio.create_task(database.append([fact(n), (UPDATE, {"key": n, "new": f"new {n}"})])) for n in range(1, 101)
            ]
            await asyncio.sleep(0)
        await asyncio.gather(*appends)
        assert seen == [("INSERT", 100), ("UPDATE", 100)]
        assert await database.read(ids) == list(range(101))
        words = await database.read(lambda c: set(c.execute(sa.select(facts.c.word).where(facts.c.id > 0)).scalars()))
        assert words == {f"new {n}" for n in range(1, 101)}


async def test_a_write_sees_the_rows_before_it_and_none_after_it(sqlite: str) -> None:
    """Rows and other writes of one group keep their order."""
    async with opened(sqlite) as database:
        async with stuck(database):
            first: asyncio.Future[None] = database.enqueue([fact(1), fact(2)])
            between = asyncio.create_task(database.write(ids))
            await asyncio.sleep(0)
            last: asyncio.Future[None] = database.enqueue([fact(3)])
        assert await between == [0, 1, 2]
        await asyncio.gather(first, last)
        assert await database.read(ids) == [0, 1, 2, 3]


async def test_rows_that_fail_fail_alone_and_whole(url: str) -> None:
    """Of appends in one group, one that breaks a constraint or does not fit gets its error and leaves no row behind."""
    async with opened(url) as database:
        appends = [[fact(1)], [fact(2), fact(0)], [fact(3), (INSERT, {"id": 9})], [fact(4)], []]
        waiting = [database.append(rows) for rows in appends]
        results = await asyncio.gather(*waiting, database.write(insert(5)), return_exceptions=True)
        assert [type(result) for result in results] == [type(None), IntegrityError, ValueError, type(None), type(None), int]
        assert await database.read(ids) == [0, 1, 4, 5]


async def test_appended_rows_are_synced_if_they_must_be(sqlite: str) -> None:
    """An append syncs its group unless the caller needs no sync."""
    async with opened(sqlite) as database:
        modes: list[str] = []

        def note(connection: Connection) -> None:
            modes.append(durability(connection))

        for synced in (True, False):
            async with stuck(database):
                append = asyncio.create_task(database.append([fact(1 + synced)], synced=synced))
                await asyncio.sleep(0)
                database.enqueue(note)
            await append
        await database.write(ids)
    assert modes == ["2", "1"], "FULL, NORMAL"


async def test_many_appends_at_once_are_stored_in_each_database(url: str) -> None:
    """Rows of several statements, from many callers, are all stored when their callers continue."""
    async with opened(url) as database:
        await asyncio.gather(*(database.append([fact(n), (UPDATE, {"key": n, "new": f"new {n}"})]) for n in range(1, 601)))
        stored = await database.read(lambda c: {row.id: row.word for row in c.execute(sa.select(facts))})
        assert stored == {0: "first"} | {n: f"new {n}" for n in range(1, 601)}


async def test_nobody_waits_for_rows_of_a_closed_database(url: str) -> None:
    """After `close`, an append raises Unavailable at once."""
    async with opened(url) as database:
        await database.append([fact(1)])
    with pytest.raises(Unavailable, match="closed"):
        await database.append([fact(2)])


def test_a_process_that_never_closes_its_database_ends(sqlite: str) -> None:
    """The writer thread does not keep a process alive, and what was committed is there."""

    async def leave() -> None:
        database = Database(sqlite)
        from tests.runtime.test_storage import MIGRATIONS

        await database.start(MIGRATIONS)
        await database.append([fact(1)])

    asyncio.run(leave())

    async def again() -> list[int]:
        async with opened(sqlite) as database:
            return await database.read(ids)

    assert asyncio.run(again()) == [0, 1]

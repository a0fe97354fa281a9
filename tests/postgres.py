"""Empty databases on the tests' PostgreSQL server, which scripts/with-postgres starts."""

from __future__ import annotations

import os

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

POSTGRES = os.environ.get("TALLYSTICK_TEST_POSTGRES", "")
"""The URL of a database for what needs no tables, such as advisory locks; empty without a server."""


async def empty_database() -> str:
    """Empties the database of this test process that is for tables. Returns its URL.

    Each test that creates tables uses this one, since programs with other tables use the same names of revisions.
    """
    url = sa.make_url(POSTGRES)
    name = f"{url.database}_tables"
    engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(sa.text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        await connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
    await engine.dispose()
    return url.set(database=name).render_as_string(hide_password=False)

"""Sessions of wallets that signed in, in the database: all replicas of a coordinator know them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.storage.schema import wallet_sessions
from coordinator.storage.upserts import inserting
from tallystick.protocol.types import Address
from tallystick.runtime.storage import Database
from tallystick.web.sessions import MAX_OF_ACCOUNT, NONCE_SECONDS, Session, nonce_used, too_many_sessions

MAX_SESSION_ROWS = 20_000
"""Sessions of all accounts, and used nonces. One that is over is deleted with the next that is opened; if there are too many, the
oldest ones end."""
_COUNTED_ALONE, _ENDED_AT_ONCE = 100, 100
"""Sessions that a process opens between two counts of the rows, and those that end to make room."""


class SqlSessionStore:
    """Sessions that all replicas of a coordinator know. Implements web's SessionStore."""

    def __init__(self, database: Database, max_rows: int = MAX_SESSION_ROWS) -> None:
        self._db, self._max_rows = database, max_rows
        self._room = 0
        """Sessions that may be opened before the rows are counted again."""

    async def open(self, session: Session) -> None:
        """See SessionStore."""
        self._room -= 1
        limit = None if self._room >= 0 else self._max_rows
        opened, room = await self._db.write(lambda connection: _open_session(connection, session, limit))
        if room is not None:
            self._room = room - 1
        if not opened:
            raise nonce_used()

    async def find(self, digest: bytes) -> Session | None:
        """See SessionStore."""
        columns = wallet_sessions.c
        query = sa.select(wallet_sessions).where(columns.digest == digest)
        row = await self._db.read(lambda connection: connection.execute(query).mappings().one_or_none())
        if row is None:
            return None
        return Session(digest, row["nonce"], Address(row["account"]), row["origin"], row["opened_at"], row["until"])

    async def close(self, digest: bytes) -> None:
        """See SessionStore. The row stays: its nonce was used."""
        ended = {"digest": None, "until": wallet_sessions.c.opened_at + NONCE_SECONDS}
        query = sa.update(wallet_sessions).where(wallet_sessions.c.digest == digest).values(ended)
        await self._db.write(lambda connection: connection.execute(query))


def delete_over(now: float) -> sa.Delete:
    """Deletes the sessions that are over, and whose nonces can no longer be used. An index leads to them."""
    return sa.delete(wallet_sessions).where(wallet_sessions.c.until <= now, wallet_sessions.c.opened_at + NONCE_SECONDS < now)


def _open_session(connection: Connection, session: Session, limit: int | None) -> tuple[bool, int | None]:
    """Stores a session. `limit`: the most rows that there may be; None if they need not be counted. Raises Unavailable.

    Returns whether the nonce is new, and for how many sessions there is room, if the rows were counted.
    """
    columns, now = wallet_sessions.c, session.opened_at
    connection.execute(delete_over(now))
    own = sa.select(columns.nonce).where(columns.account == session.account, columns.digest.is_not(None))
    oldest = connection.execute(own.order_by(columns.opened_at.desc()).offset(MAX_OF_ACCOUNT - 1)).scalars().all()
    if oldest:
        ended = {"digest": None, "until": columns.opened_at + NONCE_SECONDS}
        connection.execute(sa.update(wallet_sessions).where(columns.nonce.in_(oldest)).values(ended))
    room = None if limit is None else _make_room(connection, limit, now)
    row = {
        "nonce": session.nonce,
        "digest": session.digest,
        "account": session.account,
        "origin": session.origin,
        "opened_at": session.opened_at,
        "until": session.until,
    }
    insert = inserting(connection.dialect.name, wallet_sessions).on_conflict_do_nothing(index_elements=("nonce",))
    return connection.execute(insert, row).rowcount == 1, room


def _make_room(connection: Connection, limit: int, now: float) -> int:
    """Counts the rows, and ends the oldest sessions if there are `limit`. Returns how many more fit. Raises Unavailable."""
    columns = wallet_sessions.c
    rows: int = connection.execute(sa.select(sa.func.count()).select_from(wallet_sessions)).scalar_one()
    if rows >= limit:
        old = sa.select(columns.nonce).where(columns.opened_at < now - NONCE_SECONDS).order_by(columns.opened_at)
        ended = old.limit(min(rows - limit + _ENDED_AT_ONCE, max(rows - limit + 1, limit // 10)))
        rows -= connection.execute(sa.delete(wallet_sessions).where(columns.nonce.in_(ended.scalar_subquery()))).rowcount
        if rows >= limit:
            raise too_many_sessions(limit)
    return min(_COUNTED_ALONE, limit - rows)

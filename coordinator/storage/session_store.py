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
"""Sessions of all accounts, and used nonces. One that is over is deleted with the next that is opened."""


class SqlSessionStore:
    """Sessions that all replicas of a coordinator know. Implements web's SessionStore."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def open(self, session: Session) -> None:
        """See SessionStore."""
        if not await self._db.write(lambda connection: _open_session(connection, session)):
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
        query = sa.update(wallet_sessions).where(wallet_sessions.c.digest == digest).values(digest=None)
        await self._db.write(lambda connection: connection.execute(query))


def _open_session(connection: Connection, session: Session) -> bool:
    """Stores a session. Returns False if its nonce was used before. Raises Unavailable."""
    columns, now = wallet_sessions.c, session.opened_at
    over = sa.or_(columns.digest.is_(None), columns.until <= now)
    connection.execute(sa.delete(wallet_sessions).where(columns.opened_at < now - NONCE_SECONDS, over))
    own = sa.select(columns.nonce).where(columns.account == session.account, columns.digest.is_not(None))
    oldest = connection.execute(own.order_by(columns.opened_at.desc()).offset(MAX_OF_ACCOUNT - 1)).scalars().all()
    if oldest:
        connection.execute(sa.update(wallet_sessions).where(columns.nonce.in_(oldest)).values(digest=None))
    if connection.execute(sa.select(sa.func.count()).select_from(wallet_sessions)).scalar_one() >= MAX_SESSION_ROWS:
        raise too_many_sessions()
    row = {
        "nonce": session.nonce,
        "digest": session.digest,
        "account": session.account,
        "origin": session.origin,
        "opened_at": session.opened_at,
        "until": session.until,
    }
    insert = inserting(connection.dialect.name, wallet_sessions).on_conflict_do_nothing(index_elements=("nonce",))
    return connection.execute(insert, row).rowcount == 1

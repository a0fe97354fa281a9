"""Several replicas on one PostgreSQL, for tests: an empty database each, and jobs, leaves and beats for it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from coordinator.ports import AttemptRecord, JobRecord
from coordinator.storage.shared_job_store import SharedJobStore
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.jobs import State
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked
from tests.postgres import POSTGRES

ANN, BOB = person("ann"), person("bob")


@asynccontextmanager
async def database() -> AsyncIterator[str]:
    """An empty database of its own on the tests' server. Yields its URL."""
    name = f"replicas_{uuid.uuid4().hex}"
    engine = create_async_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            await connection.execute(sa.text(f"CREATE DATABASE {name}"))
        yield POSTGRES.rpartition("/")[0] + "/" + name
        async with engine.connect() as connection:
            await connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        await engine.dispose()


@asynccontextmanager
async def opened(url: str, *names: str) -> AsyncIterator[list[Store]]:
    """One store for each of these replicas; an empty name is a lone coordinator's."""
    stores = [Store(url, segment_jobs=4, replica=name) for name in names]
    try:
        await asyncio.gather(*(store.start() for store in stores))
        yield stores
    finally:
        for store in stores:
            await store.close()


def shared(store: Store) -> SharedJobStore:
    """What a replica shares."""
    assert store.shared is not None
    return store.shared


async def beat(store: Store, *names: str) -> None:
    """Lets these replicas have beaten just now, and all others never."""
    now = sa.text("INSERT INTO replicas (id, url, beat_at) VALUES (:name, '', extract(epoch FROM clock_timestamp()))")

    def work(connection: sa.Connection) -> None:
        connection.execute(sa.text("DELETE FROM replicas"))
        for name in names:
            connection.execute(now, {"name": name})

    await store.database.write(work)


class Job:
    """A job of ANN, as it begins and as it ends, with its receipt."""

    def __init__(self, number: int, provider: Signer = ANN, payer: Signer = PAYER, *, seq: int = 0) -> None:
        self.id = JobId(number.to_bytes(16, "big"))
        terms = make_terms(make_ask(provider), self.id)
        order = make_order(terms, provider.address, payer)
        attempt = AttemptRecord(unchecked(order), terms, State.MATCHED)
        self.begun = JobRecord(self.id, payer.address, State.MATCHED, START, None, (attempt,))
        ended = (replace(attempt, state=State.COMPLETED, delivered=True),)
        self.ended = replace(self.begun, state=State.COMPLETED, finished_at=START + number, attempts=ended)
        self.receipt: Verified[Receipt] = make_receipt(
            provider, order, terms, seq=seq or number, cumulative_cost=Amount(20 * (seq or number))
        )
        self.total = self.receipt.message.cumulative_cost

    def with_attempt(self, provider: Signer) -> JobRecord:
        """The job with a further attempt at this provider, after the first one failed."""
        other = Job(int.from_bytes(self.id), provider).begun.attempts[0]
        return replace(self.begun, attempts=(replace(self.begun.attempts[0], state=State.FAILED), other))

    async def place(self, store: Store, record: JobRecord | None = None) -> int:
        """Places the job with its newest attempt. Returns the number of its leaf."""
        record = record or self.begun
        row = await shared(store).place(record, START, lambda at: b"leaf %d of %s" % (at, record.job))
        return row.number

    async def finish(self, store: Store) -> None:
        """Ends the job with its receipt."""
        await store.put_receipt(self.id, self.receipt, self.total, self.ended)


async def count(store: Store, table: sa.Table) -> int:
    """The rows of a table."""
    query = sa.select(sa.func.count()).select_from(table)
    return int(await store.database.read(lambda connection: connection.execute(query).scalar_one()))

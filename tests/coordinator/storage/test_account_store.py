"""An account's jobs and tabs in the database, as payer and as provider, and what it settled."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.ports import AttemptRecord, Cursor, JobRecord, Settlement
from coordinator.storage.store import Store
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.jobs import State
from tallystick.protocol.types import Amount, JobId
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked
from tests.postgres import POSTGRES, empty_database

ANN, BOB, OTHER = person("ann"), person("bob"), person("other payer")


@pytest.fixture(params=["sqlite", "postgres"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """An empty database."""
    if request.param == "postgres" and not POSTGRES:
        if os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
            pytest.fail("needs PostgreSQL, which scripts/test starts")
        pytest.skip("needs PostgreSQL, which scripts/test starts")
    opened = Store(f"sqlite:///{tmp_path}/jobs.db" if request.param == "sqlite" else await empty_database())
    await opened.start()
    yield opened
    await opened.close()


async def put_job(store: Store, number: int, provider: Signer, payer: Signer = PAYER, cost: int = 20) -> JobId:
    """Stores a job that ended with a receipt."""
    job = JobId(number.to_bytes(16, "big"))
    terms = make_terms(make_ask(provider), job)
    order = make_order(terms, provider.address, payer, seq=number)
    attempt = AttemptRecord(unchecked(order), terms, State.MATCHED)
    record = JobRecord(job, payer.address, State.MATCHED, START + number, None, (attempt,))
    store.enqueue_job(record)
    ended = replace(
        record, state=State.COMPLETED, finished_at=START + number, attempts=(replace(attempt, state=State.COMPLETED),)
    )
    receipt = make_receipt(provider, order, terms, seq=number, cumulative_cost=Amount(cost * number))
    await store.put_receipt(job, receipt, Amount(cost * number), ended)
    return job


async def test_jobs_of_an_account(store: Store) -> None:
    """They are listed newest first, whoever of payer and provider asks, and of nobody else."""
    first = await put_job(store, 1, ANN)
    second = await put_job(store, 2, BOB)
    third = await put_job(store, 3, ANN, OTHER)
    accounts = store.accounts

    async def jobs_of(who: Signer, limit: int = 10) -> list[JobId]:
        return [known.record.job for known in await accounts.jobs_of(who.address, limit)]

    assert await jobs_of(PAYER) == [second, first]
    assert await jobs_of(ANN) == [third, first]
    assert await jobs_of(OTHER) == [third]
    assert await jobs_of(person("nobody")) == []
    assert await jobs_of(PAYER, 1) == [second]
    (known,) = await accounts.jobs_of(OTHER.address, 10)
    assert known.receipt is not None
    assert known.receipt.message.cumulative_cost == 60


async def test_the_newest_jobs_of_many_tabs(store: Store) -> None:
    """However the newest jobs spread over the tabs, they are those that are listed: one tab may have them all."""
    jobs = []
    for number in range(1, 71):
        provider = BOB if number > 45 else person(f"provider {number % 5}")
        jobs.append(await put_job(store, number, provider))
    newest = jobs[::-1]
    for limit in (1, 7, 8, 9, 16, 17, 24, 25, 26, 33, 60, 69, 70, 200):
        listed = [known.record.job for known in await store.accounts.jobs_of(PAYER.address, limit)]
        assert listed == newest[:limit]


async def test_tabs_of_an_account(store: Store) -> None:
    """Each has its total and what the chain has paid; a payer's settled total adds up all its providers."""
    await put_job(store, 1, ANN)
    await put_job(store, 2, BOB)
    await put_job(store, 3, ANN, OTHER)
    paid = [
        Settlement(PAYER.address, ANN.address, Amount(15), "0x" + "01" * 32, 5),
        Settlement(PAYER.address, BOB.address, Amount(1 << 90), "0x" + "02" * 32, 6),
        Settlement(OTHER.address, ANN.address, Amount(1), "0x" + "03" * 32, 7),
    ]
    await store.put_settlements(paid, Cursor(8))
    tabs = await store.accounts.tabs_of(PAYER.address, 10)
    assert [(tab.provider, tab.total, tab.settled, tab.tx, tab.block) for tab in tabs] == [
        (BOB.address, 40, 1 << 90, "0x" + "02" * 32, 6),
        (ANN.address, 20, 15, "0x" + "01" * 32, 5),
    ]
    assert {tab.payer for tab in await store.accounts.tabs_of(ANN.address, 10)} == {PAYER.address, OTHER.address}
    assert len(await store.accounts.tabs_of(ANN.address, 1)) == 1
    assert sum((await store.accounts.settled_by(PAYER.address)).values()) == 15 + (1 << 90)
    assert await store.accounts.settled_by(ANN.address) == {}

"""Databases of earlier releases open with all that they have, and go back to their former tables."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from coordinator.ports import AttemptRecord, StoredResponse
from coordinator.storage.store import MIGRATIONS, Store
from tallystick.protocol.jobs import State
from tallystick.protocol.link import LateReceipt
from tallystick.protocol.stored import store_signed, store_struct
from tallystick.protocol.types import JobId
from tallystick.runtime import storage
from tests.coordinator.harness import PAYER, START, make_ask, make_order, make_receipt, make_terms, person, unchecked

ANN, BOB = person("ann"), person("bob")
JOB = JobId(b"\x01" * 16)
REVISION = "0009"
"""The last one with a row of text for each job."""


def _migrate(path: Path, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "alembic"))
    config.set_main_option("version_locations", str(MIGRATIONS / "versions"))
    config.set_main_option("path_separator", "newline")
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        if sa.inspect(connection).has_table("alembic_version"):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
    engine.dispose()


def _attempts(state: State) -> list[AttemptRecord]:
    attempts = []
    for provider, ended in ((ANN, State.FAILED), (BOB, state)):
        terms = make_terms(make_ask(provider), JOB)
        order = unchecked(make_order(terms, provider.address))
        attempts.append(AttemptRecord(order, terms, ended, "because", delivered=provider is BOB))
    return attempts


def _insert(database: sqlite3.Connection, table: str, *values: object) -> None:
    database.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)


def _old_database(path: Path, state: State, *, as_json: bool) -> None:
    """A database of an earlier release, with one job that the first of two providers failed. `as_json`: as release 0.1 wrote."""
    _migrate(path, REVISION)
    docs, attempts = [], _attempts(state)
    for attempt in attempts:
        order = attempt.order.to_json() if as_json else store_signed(attempt.order)
        terms = attempt.terms.to_json() if as_json else store_struct(attempt.terms)
        doc = {"order": order, "terms": terms, "state": attempt.state.value, "reason": attempt.reason}
        docs.append(doc | ({"delivered": True} if attempt.delivered else {}))
    receipt = make_receipt(BOB, make_order(attempts[1].terms, BOB.address), attempts[1].terms)
    ended = None if state is State.RUNNING else START + 3
    with closing(sqlite3.connect(path)) as database, database:
        _insert(database, "jobs", JOB.hex(), PAYER.address, BOB.address, state.value, START, ended, json.dumps(docs))
        stored = receipt.dumps() if as_json else store_signed(receipt)
        _insert(database, "receipts", JOB.hex(), BOB.address, PAYER.address, receipt.message.seq, f"{20:029}", stored)
        columns = "job, fingerprint, ended_at, frames, payer, size"
        kept = (JOB.hex(), "05" * 32, START, b"frames", PAYER.address, 6)
        database.execute(f"INSERT INTO responses ({columns}) VALUES (?, ?, ?, ?, ?, ?)", kept)


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("state", [State.COMPLETED, State.RUNNING])
@pytest.mark.parametrize("back", [False, True])
async def test_jobs_and_receipts_of_an_older_release_are_read(tmp_path: Path, state: State, *, as_json: bool, back: bool) -> None:
    """Also by the queries that start from a tab, and by the start that ends open jobs. `back`: after a downgrade in between."""
    path = tmp_path / "coordinator.db"
    _old_database(path, state, as_json=as_json)
    attempts = _attempts(state)
    receipt = make_receipt(BOB, make_order(attempts[1].terms, BOB.address), attempts[1].terms)
    store = Store(f"sqlite:///{path}")
    await store.start()
    if back:
        await store.close()
        _migrate(path, REVISION)
        store = Store(f"sqlite:///{path}")
        await store.start()
    state_of = await store.load_state(START + 5, START)
    known = await store.job(JOB)
    assert known is not None
    assert state_of.jobs == (JOB,)
    assert state_of.totals == {(PAYER.address, BOB.address): 20}
    assert known.receipts == {BOB.address: unchecked(receipt)}
    stored = [(attempt.order, attempt.terms, attempt.delivered) for attempt in known.record.attempts]
    assert stored == [(attempt.order, attempt.terms, attempt.delivered) for attempt in attempts]
    ended = state is State.COMPLETED
    assert (known.record.state, known.record.created_at) == (State.COMPLETED if ended else State.FAILED, START)
    assert known.record.finished_at == (START + 3 if ended else START + 5)
    late = LateReceipt(unchecked(receipt), attempts[1].order, attempts[1].terms)
    assert await store.receipts_of(PAYER.address, BOB.address, 5) == [late]
    assert await store.last_receipts(BOB.address, "", 5) == [late]
    assert await store.response(JOB, START) == StoredResponse(JOB, b"\x05" * 32, b"frames", START, PAYER.address)
    await store.close()


async def test_many_jobs_of_an_older_release_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They get segments, so a start need not read them all."""
    monkeypatch.setattr("coordinator.storage.former_schema._AT_ONCE", 3)
    monkeypatch.setattr("coordinator.storage.former_schema._SEGMENT", 4)
    path = tmp_path / "coordinator.db"
    _old_database(path, State.COMPLETED, as_json=False)
    names = [JobId(bytes([number]) * 16) for number in range(1, 12)]
    with closing(sqlite3.connect(path)) as database, database:
        for job in names[1:]:
            columns = "payer, provider, state, created_at, finished_at, attempts_doc"
            copy = f"INSERT INTO jobs SELECT ?, {columns} FROM jobs WHERE job = ?"
            database.execute(copy, (job.hex(), JOB.hex()))
    store = Store(f"sqlite:///{path}")
    await store.start()
    for job in names:
        known = await store.job(job)
        assert known is not None, job.hex()
        assert known.record.job == job
    assert set((await store.load_state(START + 9, START)).jobs) == set(names)
    await store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM job_segments").fetchone()[0] == 2
        assert database.execute("SELECT count(*) FROM job_index").fetchone()[0] == len(names)


def test_a_replica_of_the_former_version_goes_on() -> None:
    """Since replicas share a database, an upgrade only adds: no statement of the version before fails after it."""
    taken = re.compile(r"\b(drop_|rename_table|alter_column|batch_alter_table|execute\(\"(?!CREATE SEQUENCE))")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (MIGRATIONS / "versions").glob("*.py")}
    shared = {name: source for name, source in sources.items() if name >= "0013"}
    assert shared
    for name, source in shared.items():
        upgrade = source[source.index("def upgrade") : source.index("def downgrade")]
        assert taken.search(upgrade) is None, f"{name}: a replica of the version before would fail"
        added = re.findall(r"op\.add_column\(.*", upgrade)
        assert all("nullable=False" not in line or "server_default" in line for line in added), name
    assert taken.search(sources["0010_compact_jobs.py"]) is not None

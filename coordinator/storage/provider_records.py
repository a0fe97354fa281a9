"""Rows of what the coordinator remembers of providers: their reputation, and their measured speeds."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.domain.reputation import MAX_REMEMBERED, ProviderRecord, RecordChange
from coordinator.domain.speeds import MAX_REMEMBERED as MAX_SPEEDS
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.storage.schema import reputations, speeds
from coordinator.storage.upserts import inserting, upsert
from tallystick.protocol.types import Address


def write_records(connection: Connection, records: Mapping[Address, ProviderRecord], measured: Mapping[Key, SpeedRecord]) -> None:
    """Writes these records, replacing earlier ones."""
    for provider, record in records.items():
        row = {"provider": provider, "good": record.good, "bad": record.bad, "jobs": record.jobs}
        upsert(connection, reputations, row, ("provider",))
    for (provider, model), speed in measured.items():
        times = {"first_token_ms": speed.first_token_ms, "token_us": speed.token_us, "output_tokens": speed.output_tokens}
        counts = {"first_tokens": speed.first_tokens, "outputs": speed.outputs}
        upsert(connection, speeds, {"provider": provider, "model": model} | times | counts, ("provider", "model"))


def change_records(
    connection: Connection, changes: Mapping[Address, RecordChange], measured: Mapping[Key, SpeedRecord]
) -> dict[Address, ProviderRecord]:
    """Changes these records, which other replicas change too, and returns them. Of speeds, which soon fade, the last ones stay.

    Rows are locked in the order of their keys, so that no two replicas wait for each other.
    """
    insert = inserting(connection.dialect.name, reputations)
    changed, columns = dict[Address, ProviderRecord](), reputations.c
    for provider, change in sorted(changes.items()):
        row = {"provider": provider, "good": change.good, "bad": change.bad, "jobs": change.jobs}
        faded = {name: columns[name] * change.fade + insert.excluded[name] for name in ("good", "bad")}
        upsert = insert.values(row).on_conflict_do_update(
            index_elements=("provider",), set_=faded | {"jobs": columns.jobs + insert.excluded.jobs}
        )
        stored = connection.execute(upsert.returning(columns.good, columns.bad, columns.jobs)).one()
        changed[provider] = ProviderRecord(*stored)
    write_records(connection, {}, dict(sorted(measured.items())))
    return changed


def read_records(connection: Connection) -> tuple[dict[Address, ProviderRecord], dict[Key, SpeedRecord]]:
    """Reads the records of the providers with the most jobs."""
    known = sa.select(reputations).order_by(reputations.c.jobs.desc()).limit(MAX_REMEMBERED)
    records = {Address(provider): ProviderRecord(good, bad, count) for provider, good, bad, count in connection.execute(known)}
    fastest = sa.select(speeds).order_by(speeds.c.outputs.desc()).limit(MAX_SPEEDS)
    return records, {
        (Address(provider), model): SpeedRecord(*figures) for provider, model, *figures in connection.execute(fastest)
    }

"""Rows of what the coordinator remembers of providers: their reputation, and their measured speeds."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.domain.reputation import MAX_REMEMBERED, ProviderRecord
from coordinator.domain.speeds import MAX_REMEMBERED as MAX_SPEEDS
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.storage.schema import reputations, speeds
from coordinator.storage.upserts import upsert
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


def read_records(connection: Connection) -> tuple[dict[Address, ProviderRecord], dict[Key, SpeedRecord]]:
    """Reads the records of the providers with the most jobs."""
    known = sa.select(reputations).order_by(reputations.c.jobs.desc()).limit(MAX_REMEMBERED)
    records = {Address(provider): ProviderRecord(good, bad, count) for provider, good, bad, count in connection.execute(known)}
    fastest = sa.select(speeds).order_by(speeds.c.outputs.desc()).limit(MAX_SPEEDS)
    return records, {
        (Address(provider), model): SpeedRecord(*figures) for provider, model, *figures in connection.execute(fastest)
    }

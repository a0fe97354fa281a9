"""The settlements of one payer, as several stores read them."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from coordinator.storage.schema import settlements
from tallystick.protocol.types import Address, Amount

_MAX_SETTLEMENTS = 10_000
"""Tabs of one payer that are read."""


def read_settled(connection: Connection, payer: Address) -> dict[Address, Amount]:
    """Returns what a payer settled on chain, by provider, in base units."""
    columns = settlements.c
    query = sa.select(columns.provider, columns.settled).where(columns.payer == payer).limit(_MAX_SETTLEMENTS)
    return {Address(provider): Amount(int(settled)) for provider, settled in connection.execute(query)}

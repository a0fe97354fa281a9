"""A payer's accounts with its providers, as the ledger has them: what was billed, what may be, when it was used last."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from tallystick.client.ledger.schema import deployment_id, tabs
from tallystick.client.ledger.writes import read_tabs
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class Account:
    """One provider's. Amounts are base units over the account's life; `used_at`: when it was last ordered from, Unix seconds;
    `frozen`: why no more goes there, or empty.
    """

    provider: Address
    billed: Amount
    in_flight: Amount
    used_at: int
    frozen: str


def read_accounts(c: Connection, domain: Domain, payer: Address, now: int) -> list[Account]:
    """Every provider that this payer ever ordered from, the last used first."""
    here = (tabs.c.deployment_id == deployment_id(domain)) & (tabs.c.payer == payer)
    providers = [Address(row) for row in c.execute(sa.select(tabs.c.provider).where(here)).scalars()]
    found = read_tabs(c, domain, payer, providers, now)
    told = [
        Account(
            provider,
            Amount(max(tab.accepted, tab.explained_total)),
            tab.open_caps,
            tab.order_seq // 1_000_000_000,
            tab.blocked_reason,
        )
        for provider, tab in found.items()
    ]
    return sorted(told, key=lambda one: one.used_at, reverse=True)

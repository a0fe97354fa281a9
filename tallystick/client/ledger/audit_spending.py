"""What audits may cost: the spending of a wallet on jobs and on audits apart, and how many jobs a provider had.

Functions of one connection.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection

from tallystick.client.ledger.schema import spent
from tallystick.client.ledger.spending import DAY_SECONDS
from tallystick.client.ledger.upstream_spending import UPSTREAM_PREFIX
from tallystick.protocol.types import Address, Amount

AUDIT_LABEL: Final = "audits"
"""The workload of scoring jobs and made-up requests: `tally spending --by label` shows it apart."""


def spent_on_jobs(c: Connection, payer: Address, since: int) -> Amount:
    """What a wallet paid providers from the UTC day of `since` (Unix seconds) on, without audits."""
    of_market = sa.func.substr(spent.c.provider, 1, len(UPSTREAM_PREFIX)) != UPSTREAM_PREFIX
    query = sa.select(sa.func.coalesce(sa.func.sum(spent.c.cost), 0)).where(
        spent.c.payer == payer, spent.c.day >= since // DAY_SECONDS, spent.c.label != AUDIT_LABEL, of_market
    )
    return Amount(int(c.execute(query).scalar_one()))


def jobs_of(c: Connection, payer: Address, provider: Address) -> int:
    """How many jobs a wallet had from a provider."""
    query = sa.select(sa.func.coalesce(sa.func.sum(spent.c.requests), 0)).where(
        spent.c.payer == payer, spent.c.provider == provider
    )
    return int(c.execute(query).scalar_one())

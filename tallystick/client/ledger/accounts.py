"""A payer's accounts with its providers: what each one billed, what it may still bill, and when it was last used."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection

from tallystick.client.ledger.schema import deployment_id, tabs
from tallystick.client.ledger.tabs import read_tabs
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.types import Address, Amount


@dataclass(frozen=True, slots=True)
class Account:
    """The account of one provider. Amounts are base units over the account's life.

    `used_at`: when this payer last ordered from the provider, in Unix seconds. `blocked_reason`: why the provider gets no more
    orders; empty if it is not blocked.
    """

    provider: Address
    billed: Amount
    in_flight: Amount
    used_at: int
    blocked_reason: str


@dataclass(frozen=True, slots=True)
class Debt:
    """What a payer owes a provider that has not collected it, and what its running jobs may add, in base units."""

    provider: Address
    owed: int
    in_flight: int


def debt_of(account: Account, settled: int) -> Debt | None:
    """The debt to a provider that has collected `settled` base units; None if there is none and no job runs."""
    debt = Debt(account.provider, max(0, account.billed - settled), int(account.in_flight))
    return debt if debt.owed or debt.in_flight else None


def read_accounts(c: Connection, domain: Domain, payer: Address, now: int) -> list[Account]:
    """Returns the account of every provider that this payer ever ordered from, the most recently used first."""
    own_tabs = (tabs.c.deployment_id == deployment_id(domain)) & (tabs.c.payer == payer)
    providers = [Address(row) for row in c.execute(sa.select(tabs.c.provider).where(own_tabs)).scalars()]
    accounts = [
        Account(
            provider,
            Amount(max(tab.accepted, tab.explained_total)),
            tab.open_caps,
            tab.order_seq // 1_000_000_000,
            tab.blocked_reason,
        )
        for provider, tab in read_tabs(c, domain, payer, providers, now).items()
    ]
    return sorted(accounts, key=lambda account: account.used_at, reverse=True)

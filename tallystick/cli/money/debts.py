"""What a wallet owes its providers, by this machine's ledger and the chain, and the warning before its money leaves."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tallystick.cli.output import counted, dollars, note
from tallystick.protocol.types import Address

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.client.config import ClientConfig
    from tallystick.client.ledger.accounts import Account, Debt
    from tallystick.protocol.eip712 import Domain


async def ledger_accounts(config: ClientConfig, payer: Address, domain: Domain) -> dict[Address, Account]:
    """A payer's accounts by provider, from this machine's ledger; empty if there is no ledger."""
    from tallystick.client.ledger.ledger import Ledger

    path = config.ledger_path(payer)
    if not path.exists():
        return {}
    ledger = await Ledger.open(path, payer)
    try:
        return {account.provider: account for account in await ledger.accounts(domain, int(time.time()))}
    finally:
        await ledger.close()


async def read_debts(escrow: Escrow, payer: Address, only: Address | None = None) -> list[Debt]:
    """What a payer owes each provider, or `only` one of them, and what its running jobs may add. Raises Unavailable."""
    from tallystick.client.config import load_config
    from tallystick.client.ledger.accounts import debt_of

    accounts = await ledger_accounts(load_config(), payer, escrow.deployment.domain)
    debts = [
        debt_of(account, (await escrow.tab(payer, provider)).settled)
        for provider, account in accounts.items()
        if only in (None, provider)
    ]
    return [debt for debt in debts if debt is not None]


async def warn_of_debts(escrow: Escrow, payer: Address, *, only: Address | None = None) -> int:
    """Warns of debts before money leaves the purse, or the reservation for `only` this provider; returns them in base units."""
    debts = await read_debts(escrow, payer, only)
    owed, in_flight = sum(debt.owed for debt in debts), sum(debt.in_flight for debt in debts)
    if not debts:
        return 0
    running = f", and running jobs may cost up to {dollars(in_flight)}" if in_flight else ""
    note(
        f"warning: {payer} owes {dollars(owed)} to {counted(len(debts), 'provider')}{running}. They are told, collect it before "
        "the money leaves, and take no further job on it; what they collect is not paid out"
    )
    return owed

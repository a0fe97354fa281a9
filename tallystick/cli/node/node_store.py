"""Shared by `tally node earnings` and `tally node collect`: the node's store, and where its money is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tallystick.cli.market_deployment import ensure_deployment_file
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address

if TYPE_CHECKING:
    from node.chain.settled_money import SettledMoney
    from node.domain.earned_money import TabMoney
    from node.service.config import NodeConfig
    from node.storage.store import SqlStore
    from tallystick.chain.escrow import Escrow

MAX_TABS = 100_000


@contextlib.asynccontextmanager
async def open_store(loaded: NodeConfig, provider: Address) -> AsyncIterator[SqlStore]:
    """Opens the node's database, which may be in use by a running node. Raises BadMessage if there is none."""
    from node.storage.store import SqlStore
    from tallystick.chain.deployment import Deployment

    if not (loaded.state / "node.db").exists():
        raise BadMessage(
            f"no node has run with the state folder {loaded.state}; name the node's config with --config, or set `state` in it"
        )
    domain = Deployment.load(await ensure_deployment_file(loaded.deployment, loaded.coordinator, loaded.rpc)).domain
    store = SqlStore(loaded.database, provider, domain)
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def read_tabs(store: SqlStore, now: int) -> list[TabMoney]:
    """All tabs as the store knows them at `now` (Unix seconds)."""
    from node.storage.earnings import read_tab_money

    return await store.read(lambda connection: read_tab_money(connection, now))


async def read_money(store: SqlStore, escrow: Escrow, provider: Address, now: int) -> SettledMoney:
    """All money of a provider as of the chain's latest block; what will not change is stored for the next time. Raises
    Unavailable.
    """
    from node.chain.settled_money import read_settled_money

    tabs = await read_tabs(store, now)
    money = await read_settled_money(escrow, provider, tabs, await store.fee_total())
    await store.record_fee_total(money.final)
    recorded = {tab.payer: tab.funds for tab in tabs}
    for tab in money.tabs:
        if tab.funds.settled != recorded[tab.payer].settled:
            await store.record_funds(tab.payer, tab.funds, now)
    return money

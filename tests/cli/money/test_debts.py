"""A payer who owes is warned before its money leaves, by the command line and by its client."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tallystick.chain.deployment import Deployment
from tallystick.client.config import ClientConfig
from tallystick.client.ledger.accounts import Account, Debt, debt_of
from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.schema import deployment_id
from tallystick.client.recovery.escrow import PayerEscrow
from tallystick.protocol.types import Amount
from tests.chain.harness import DOLLAR, World
from tests.cli.conftest import Tally, on_chain
from tests.cli.money.test_funds import KEY, NODE, _advance, market

__all__ = ["market"]


def _owe(market: Tally, units: int) -> None:
    """Writes into the wallet's ledger that it accepted receipts of the node for so many base units."""
    path = ClientConfig(ledger_file=None).ledger_path(KEY.address)

    async def make() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        await (await Ledger.open(path, KEY.address)).close()

    asyncio.run(make())
    domain = Deployment.load(market.home / "deployment.json").domain
    tab = (deployment_id(domain), KEY.address, NODE.address, units, units, 0, units, 0, "", 0, 0, 0, 0, 0)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"INSERT INTO tabs VALUES (NULL, {', '.join('?' * len(tab))})", tab)


def test_a_payer_without_debts_is_not_warned(market: Tally) -> None:
    """Without a debt, or with one that is collected, the commands say nothing of it."""
    assert market("thaw", "1")["owed"] == "0"
    assert "warning" not in market.says("thaw", "2")


def test_a_payer_who_owes_is_warned(market: Tally) -> None:
    """Thaw, withdraw and release name the debt, to how many, and what follows; the payer may do it all the same."""
    _owe(market, 2 * DOLLAR)
    market("reserve", "node", "1")
    shown = market.says("release", "node")
    assert f"warning: {KEY.address} owes 2 dollars to 1 provider. They are told" in shown
    assert market("thaw", "4")["owed"] == str(2 * DOLLAR)
    assert "owes 2 dollars to 1 provider" in market.says("thaw", "4")
    _advance(market, "1m")
    assert market("withdraw")["owed"] == str(2 * DOLLAR)


def test_what_providers_collected_is_not_withdrawn(market: Tally) -> None:
    """If providers collected all that was thawing, nothing is sent, and the error says why."""
    market("thaw", "all")

    async def settle(world: World) -> None:
        await world.escrow.settle(world.deployer, [world.claim(NODE, world.row(KEY, NODE.address, 10 * DOLLAR))])

    on_chain(market, settle)
    _advance(market, "1m")
    assert "providers have collected it" in market("withdraw", fails=True)["message"]


def test_the_client_warns_once_of_each_thaw(market: Tally, tmp_path: Path) -> None:
    """A client with a chain endpoint logs a thaw while its wallet owes, once, with the command that ends it."""

    async def look(world: World) -> None:
        (tmp_path / "d.json").unlink(missing_ok=True)
        world.deployment.save(tmp_path / "d.json")
        config = ClientConfig(deployment=tmp_path / "d.json", ledger_file=tmp_path / "ledger.db")
        client = PayerEscrow.of(config, KEY)
        assert client is not None
        account = Account(NODE.address, Amount(DOLLAR), Amount(5), 0, "")
        with capture_logs() as logs:
            await client.warn_leaving([account])
            assert logs == [], "nothing is leaving"
            await world.escrow.thaw(await world.sender(KEY), KEY.address, Amount(DOLLAR))
            await client.warn_leaving([])
            assert logs == [], "nothing is owed"
            await client.warn_leaving([account])
            await client.warn_leaving([account])
        (warning,) = logs
        assert (warning["owed"], warning["in_flight"], warning["thawing"]) == ("1", "0.000005", "1")
        assert "tally thaw --cancel" in warning["hint"]
        await client.close()

    on_chain(market, look)


@pytest.mark.parametrize(
    ("billed", "in_flight", "settled", "debt"),
    [(10, 0, 10, None), (10, 0, 11, None), (10, 0, 9, (1, 0)), (10, 3, 10, (0, 3)), (0, 0, 0, None)],
)
def test_what_counts_as_debt(billed: int, in_flight: int, settled: int, debt: tuple[int, int] | None) -> None:
    """Receipts that were not collected, and the caps of running jobs; never less than nothing."""
    account = Account(NODE.address, Amount(billed), Amount(in_flight), 0, "")
    assert debt_of(account, settled) == (None if debt is None else Debt(NODE.address, *debt))

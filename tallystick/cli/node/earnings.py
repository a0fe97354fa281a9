"""`tally node earnings` and `tally node collect`: what a node earned, and collecting it on chain without a coordinator."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import open_escrow, parse_account, require_gas
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import dollars, json_fields, out, show_fields, show_json, show_table, step
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import Address, Amount, format_amount, parse_amount

if TYPE_CHECKING:
    from node.ports import ClaimableTab
    from node.service.config import NodeConfig
    from node.storage.store import SqlStore
    from tallystick.chain.escrow import Escrow
    from tallystick.protocol.eip712 import Signer

DAY_SECONDS = 86_400
MAX_TABS = 100_000


def earnings(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    days: Annotated[int, typer.Option(min=1, max=3_650, help="Number of days back.")] = 30,
    offline: Annotated[bool, typer.Option("--offline", help="Do not read the chain.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the node earned, by day, model and payer, and where the money is now. Needs no password.

    Earned: the sum of all receipts. Settled: paid into the wallet's credit on chain; `tally cash-out` pays it out. Claimable: can
    be collected now; the node does so by itself, `tally node collect` at once. Out of reach: the orders behind it have expired.
    Written off: the part out of reach that the node has recorded as lost.
    """
    from node.service.config import load_config

    loaded, provider = load_config(config), parse_account(wallet, "--wallet")

    async def run() -> None:
        from node.storage.earnings import read_gas, read_lines, read_totals

        now = int(time.time())
        async with _open_store(loaded, provider) as store:
            lines = await store.read(lambda c: read_lines(c, now - days * DAY_SECONDS))
            totals = await store.read(read_totals)
            gas = await store.read(lambda c: read_gas(c, now - days * DAY_SECONDS))
            claimable = sum(tab.due for tab in await store.claimable(now, MAX_TABS))
        pending = totals.earned - totals.settled
        places = {
            "earned": totals.earned,
            "settled": totals.settled,
            "claimable": Amount(claimable),
            "out_of_reach": Amount(max(0, pending - claimable)),
            "written_off": totals.written_off,
        }
        if not offline:
            async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
                account = await escrow.provider(provider)
            places |= {"credit": account.credit, "stake": account.stake}
        if as_json:
            costs = {"transactions": gas.transactions, "gasUsed": gas.gas_used, "fee": str(gas.fee)}
            document = {"provider": provider, "days": [_line_json(line) for line in lines]}
            show_json(document | {"where": json_fields(places), "gas": costs})
            return
        rows = map(_line_row, lines)
        show_table(("day", "model", "payer", "jobs", "tokens", "dollars"), rows, title=f"Earnings of the last {days} days")
        fields = [(name.replace("_", " "), format_amount(value)) for name, value in places.items()]
        paid = f"{gas.fee // 10**9} gwei for {gas.transactions} transaction(s)"
        gas_text = paid if gas.transactions else "none: coordinators paid"
        show_fields([*fields, ("gas paid", gas_text)], title="Where the money is, in dollars")

    asyncio.run(run())


def _line_row(line: Any) -> tuple[object, ...]:
    tokens = f"{line.input_tokens} + {line.output_tokens}"
    return line.day, line.model, line.payer, line.jobs, tokens, format_amount(line.revenue)


def _line_json(line: Any) -> dict[str, Any]:
    return {
        "day": line.day,
        "model": line.model,
        "payer": line.payer,
        "jobs": line.jobs,
        "inputTokens": line.input_tokens,
        "outputTokens": line.output_tokens,
        "revenue": str(int(line.revenue)),
    }


def collect(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    min_amount: Annotated[
        str, typer.Option("--min-amount", help="Skip tabs on which less than this is owed, in dollars.")
    ] = "0.01",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be collected, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Collect what payers owe on chain, without a coordinator. The wallet pays the gas; the node may keep running.

    Afterwards `tally cash-out` pays out the credit.
    """
    from node.service.config import load_config

    loaded, least = load_config(config), parse_amount(min_amount, field="--min-amount")
    signer = None if dry_run else unlock(wallet, password_file)
    provider = signer.address if signer else parse_account(wallet, "--wallet")

    async def run() -> None:
        async with _open_store(loaded, provider) as store, open_escrow(loaded.deployment, loaded.rpc) as escrow:
            claimable = [tab for tab in await store.claimable(int(time.time()), MAX_TABS) if tab.due >= 1]
            tabs = [tab for tab in claimable if tab.due >= least]
            owed = {tab.payer: due for tab in tabs if (due := await _owed(escrow, tab, provider)) >= max(1, least)}
            settlement = _Settlement({}, {}, [])
            if owed and signer:
                settlement = await _settle(store, escrow, signer, [tab for tab in tabs if tab.payer in owed])
        if as_json:
            lines = [
                {
                    "payer": payer,
                    "owed": str(due),
                    "paid": str(settlement.paid.get(payer, 0)),
                    "skipped": settlement.skipped.get(payer),
                }
                for payer, due in owed.items()
            ]
            show_json({"provider": provider, "tabs": lines, "transactions": settlement.transactions})
            return
        if not owed:
            small = sum(tab.due for tab in claimable if tab.due < least)
            remark = f"; {dollars(small)} are owed on tabs below --min-amount {min_amount}" if small else ""
            out.print(f"nothing to collect{remark}", highlight=False)
            return
        rows = ((payer, format_amount(Amount(due)), settlement.outcome(payer)) for payer, due in owed.items())
        show_table(("payer", "owed, dollars", "collected, dollars"), rows)
        if settlement.transactions:
            collected = dollars(sum(settlement.paid.values()))
            step(f"collected {collected} in {len(settlement.transactions)} transaction(s); next: tally cash-out")

    asyncio.run(run())


class _Settlement:
    """What became of the claims that were sent: base units paid and reasons for skipping, by payer, and transaction hashes."""

    def __init__(self, paid: dict[Address, int], skipped: dict[Address, str], transactions: list[str]) -> None:
        self.paid, self.skipped, self.transactions = paid, skipped, transactions

    def outcome(self, payer: Address) -> str:
        """One payer's result, in dollars or words."""
        if payer in self.paid:
            return format_amount(Amount(self.paid[payer]))
        return f"skipped: {self.skipped[payer]}" if payer in self.skipped else "not sent"


async def _settle(store: SqlStore, escrow: Escrow, signer: Signer, tabs: list[ClaimableTab]) -> _Settlement:
    """Signs claims for these tabs and sends them to the contract. Raises Refusal, Unavailable."""
    from tallystick.chain.claims import ClaimBatch, SettleRow
    from tallystick.chain.events import RowSkipped, Settled
    from tallystick.chain.rpc import Sender

    await require_gas(escrow, signer.address)
    rows = tuple(SettleRow(tab.order, tab.seq, tab.cumulative) for tab in tabs)
    settlement = _Settlement({}, {}, [])
    batch = ClaimBatch.sign(signer, rows, escrow.deployment.domain)
    for result in await escrow.settle_all(Sender(escrow.rpc, signer), batch):
        settlement.transactions.append(result.hash)
        await store.record_gas(result.hash, int(time.time()), result.gas_used, result.fee)
        settlement.paid |= {event.payer: int(event.paid) for event in result.of(Settled)}
        settlement.skipped |= {event.payer: event.reason.name.lower() for event in result.of(RowSkipped)}
    return settlement


async def _owed(escrow: Escrow, tab: ClaimableTab, provider: Address) -> int:
    """Base units that the contract would still pay on a tab."""
    settled = (await escrow.tab(tab.payer, provider)).settled
    return min(tab.cumulative, tab.order.message.ceiling) - settled


@contextlib.asynccontextmanager
async def _open_store(loaded: NodeConfig, provider: Address) -> AsyncIterator[SqlStore]:
    """Opens the node's database, which may be in use by a running node. Raises BadMessage if there is none."""
    from node.storage.store import SqlStore
    from tallystick.chain.deployment import Deployment

    if not (loaded.state / "node.db").exists():
        raise BadMessage(
            f"no node has run with the state folder {loaded.state}; name the node's config with --config, or set `state` in it"
        )
    try:
        domain = Deployment.load(loaded.deployment).domain
    except OSError as error:
        raise BadMessage(f"deployment file {loaded.deployment}: {error.strerror}; set `deployment` in the config") from None
    store = SqlStore(loaded.database, provider, domain)
    await store.start()
    try:
        yield store
    finally:
        await store.close()

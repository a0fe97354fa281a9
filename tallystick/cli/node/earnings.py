"""`tally node earnings`: what a node earned, and where the money is now."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.node.money_report import MoneyReport, moment, payout_text
from tallystick.cli.node.node_store import open_store, read_money, read_tabs
from tallystick.cli.onchain import open_escrow, parse_account
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, Wallet
from tallystick.cli.output import counted, dollars, json_fields, show_fields, show_json, show_table
from tallystick.protocol.types import Address, format_amount

if TYPE_CHECKING:
    from node.service.config import NodeConfig
    from node.storage.store import SqlStore

DAY_SECONDS = 86_400
LAST_PAYOUTS = 5


def earnings(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    days: Annotated[int, typer.Option(min=1, max=3_650, help="Number of days back.")] = 30,
    offline: Annotated[bool, typer.Option("--offline", help="Do not read the chain.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the node earned, by day, model and payer, and where the money is now. Needs no password.

    Every earned unit is in exactly one place, as of one block of the chain. Accrued and claimable: payers have signed for it and
    have it; claimable is what `tally node collect` takes. Owed on trust: signed for, but the payer's purse is empty. Lost: the
    orders behind it have expired. Credited: in the escrow; `tally cash-out` pays it out. With --offline, what was settled is not
    divided further.
    """
    from node.service.config import load_config

    loaded, provider = load_config(config), parse_account(wallet, "--wallet")

    async def run() -> None:
        from node.storage.earnings import read_gas, read_lines, read_payouts

        now = int(time.time())
        async with open_store(loaded, provider) as store:
            lines = await store.read(lambda c: read_lines(c, now - days * DAY_SECONDS))
            gas = await store.read(lambda c: read_gas(c, now - days * DAY_SECONDS))
            payouts = await store.read(lambda c: read_payouts(c, LAST_PAYOUTS))
            report = await _locate(store, loaded, provider, now, offline=offline)
        if as_json:
            costs = {"transactions": gas.transactions, "gasUsed": gas.gas_used, "fee": str(gas.fee)}
            document = {"provider": provider, "days": [_line_json(line) for line in lines]} | report.to_json()
            paid_out = [json_fields(asdict(payout)) for payout in payouts]
            show_json(document | {"gas": costs, "payouts": paid_out, "automaticPayout": payout_text(loaded)})
            return
        rows = map(_line_row, lines)
        show_table(("day", "model", "payer", "jobs", "tokens", "dollars"), rows, title=f"Earnings of the last {days} days")
        show_table(("where", "dollars", "what it is"), report.rows(), title="Where the money is")
        paid = f"{gas.fee // 10**9} gwei for {counted(gas.transactions, 'transaction')}"
        fields = [("gas paid", paid if gas.transactions else "none: coordinators paid"), ("payout", payout_text(loaded))]
        if report.account is not None:
            fields.append(("payout address", report.account.payout))
        fields += [
            ("paid out", f"{dollars(payout.amount)} to {payout.address} at {moment(payout.at)}, in {payout.tx}")
            for payout in payouts
        ]
        show_fields(fields)

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


async def _locate(store: SqlStore, loaded: NodeConfig, provider: Address, now: int, *, offline: bool) -> MoneyReport:
    """Where the money is, by the chain, or by what the node recorded of it. Raises Unavailable."""
    from node.domain.earned_money import locate_money

    least = loaded.claims.direct_min_amount
    if offline:
        tabs = await read_tabs(store, now)
        return MoneyReport(provider, tabs, locate_money(tabs, least=least), least)
    async with open_escrow(loaded.deployment, loaded.rpc) as escrow:
        settled = await read_money(store, escrow, provider, now)
    money = locate_money(settled.tabs, least=least, fees=settled.fees, credit=settled.account.credit)
    return MoneyReport(provider, settled.tabs, money, least, settled.account)

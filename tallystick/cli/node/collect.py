"""`tally node collect`: collects what payers owe on chain, without a coordinator."""

from __future__ import annotations

import asyncio
import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.node.money_report import moment
from tallystick.cli.node.node_store import MAX_TABS, open_store, read_money
from tallystick.cli.onchain import open_escrow, parse_account, require_gas
from tallystick.cli.options import DEFAULT_WALLET, Config, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import counted, dollars, note, show_json, show_table, step
from tallystick.protocol.types import Address, Amount, format_amount, parse_amount

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.domain.earned_money import TabMoney
    from node.domain.payout_policy import PayoutPolicy
    from node.ports import ClaimableTab
    from node.storage.store import SqlStore
    from tallystick.chain.escrow import Escrow
    from tallystick.protocol.eip712 import Signer


def collect(
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    min_amount: Annotated[
        str | None,
        typer.Option(
            "--min-amount",
            help="Skip tabs that would pay less than this, in dollars; default: direct_min_amount under [claims], 0.01.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be collected, and send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Collect what payers owe on chain, without a coordinator. The wallet pays the gas; the node may keep running.

    Only tabs that pay something now are collected, so nothing is sent if there is nothing to get. Afterwards `tally cash-out`
    pays out the credit.
    """
    from node.service.config import load_config

    loaded = load_config(config)
    least = loaded.claims.direct_min_amount if min_amount is None else parse_amount(min_amount, field="--min-amount")
    signer = None if dry_run else unlock(wallet, password_file)
    provider = signer.address if signer else parse_account(wallet, "--wallet")

    async def run() -> None:
        now = int(time.time())
        async with open_store(loaded, provider) as store, open_escrow(loaded.deployment, loaded.rpc) as escrow:
            plan = CollectionPlan((await read_money(store, escrow, provider, now)).tabs, max(1, least))
            settlement = Settlement()
            if plan.worthwhile and signer:
                payers = {tab.payer for tab in plan.worthwhile}
                claims = [tab for tab in await store.claimable(now, MAX_TABS) if tab.payer in payers]
                settlement = await _settle(store, escrow, signer, claims)
                await read_money(store, escrow, provider, now)
        if as_json:
            show_json(plan.to_json(provider, settlement))
        else:
            _show(plan, settlement, credit_advice(loaded.payout, wallet))

    asyncio.run(run())


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """What a collection does with each tab that owes something. `least`: base units that a tab must pay to be collected."""

    tabs: Sequence[TabMoney]
    least: int

    @property
    def worthwhile(self) -> list[TabMoney]:
        """The tabs to collect, largest first."""
        return sorted((tab for tab in self.tabs if tab.collectable >= self.least), key=lambda tab: -tab.collectable)

    @property
    def small(self) -> list[TabMoney]:
        """The tabs that would pay something, but less than `least`."""
        return [tab for tab in self.tabs if 0 < tab.collectable < self.least]

    @property
    def remarks(self) -> list[str]:
        """What is left, how much it is, and what to do about it."""
        remarks = []
        if self.small:
            amount = sum(tab.collectable for tab in self.small)
            remarks.append(
                f"{dollars(amount)} on {counted(len(self.small), 'tab')} are left: each would pay less than --min-amount "
                f"{format_amount(Amount(self.least))}. The node claims them by itself; to collect them now: "
                "tally node collect --min-amount 0"
            )
        if unfunded := [tab for tab in self.tabs if tab.owed_on_trust]:
            amount, until = sum(tab.owed_on_trust for tab in unfunded), min(tab.claim_by for tab in unfunded)
            remarks.append(
                f"{dollars(amount)} on {counted(len(unfunded), 'tab')} cannot be paid now: the payers' purses are empty. "
                f"Collect again after they deposit; the first order expires at {moment(until)}"
            )
        if lost := sum(tab.lost for tab in self.tabs):
            remarks.append(f"{dollars(lost)} are lost: the payers' orders behind them have expired")
        return remarks

    def to_json(self, provider: Address, settlement: Settlement) -> dict[str, Any]:
        """The JSON document: the tabs to collect, what became of them, and the amounts that are left."""
        lines = [
            {
                "payer": tab.payer,
                "owed": str(tab.signed),
                "collectable": str(tab.collectable),
                "paid": str(settlement.paid.get(tab.payer, 0)),
                "skipped": settlement.skipped.get(tab.payer),
            }
            for tab in self.worthwhile
        ]
        left = {
            "belowMinAmount": str(sum(tab.collectable for tab in self.small)),
            "owedOnTrust": str(sum(tab.owed_on_trust for tab in self.tabs)),
            "lost": str(sum(tab.lost for tab in self.tabs)),
        }
        return {
            "provider": provider,
            "tabs": lines,
            "left": left,
            "remarks": self.remarks,
            "transactions": settlement.transactions,
        }


@dataclass(slots=True)
class Settlement:
    """What became of the claims that were sent: base units paid and reasons for skipping, by payer, and transaction hashes."""

    paid: dict[Address, int] = field(default_factory=dict)
    skipped: dict[Address, str] = field(default_factory=dict)
    transactions: list[str] = field(default_factory=list)

    def outcome(self, payer: Address) -> str:
        """One payer's result, in dollars or words."""
        if payer in self.paid:
            return format_amount(Amount(self.paid[payer]))
        return f"skipped: {self.skipped[payer]}" if payer in self.skipped else "not sent"


def credit_advice(payout: PayoutPolicy, wallet: str) -> str:
    """What becomes of the collected credit: the node pays it out by itself, or a command of this wallet does."""
    return (
        f"next: tally cash-out --wallet {shlex.quote(wallet)}" if payout.min_amount is None else "the node pays it out by itself"
    )


def _show(plan: CollectionPlan, settlement: Settlement, advice: str) -> None:
    if plan.worthwhile:
        rows = ((tab.payer, format_amount(Amount(tab.collectable)), settlement.outcome(tab.payer)) for tab in plan.worthwhile)
        show_table(("payer", "collectable, dollars", "collected, dollars"), rows)
        if settlement.transactions:
            collected = dollars(sum(settlement.paid.values()))
            step(f"collected {collected} in {counted(len(settlement.transactions), 'transaction')}; {advice}")
    else:
        note("nothing was collected, and nothing was sent" + ("" if plan.remarks else ": no payer owes anything"))
    for remark in plan.remarks:
        note(remark)


async def _settle(store: SqlStore, escrow: Escrow, signer: Signer, tabs: list[ClaimableTab]) -> Settlement:
    """Signs claims for these tabs and sends them to the contract. Raises Refusal, Unavailable."""
    from tallystick.chain.claims import ClaimBatch, SettleRow
    from tallystick.chain.events import RowSkipped, Settled
    from tallystick.cli.transactions import ShownSender

    await require_gas(escrow, signer.address)
    rows = tuple(SettleRow(tab.order, tab.seq, tab.cumulative) for tab in tabs)
    settlement = Settlement()
    batch = ClaimBatch.sign(signer, rows, escrow.deployment.domain)
    for result in await escrow.settle_all(ShownSender(escrow.rpc, signer), batch):
        settlement.transactions.append(result.hash)
        await store.record_gas(result.hash, int(time.time()), result.gas_used, result.fee)
        settlement.paid |= {event.payer: int(event.paid) for event in result.of(Settled)}
        settlement.skipped |= {event.payer: event.reason.name.lower() for event in result.of(RowSkipped)}
    return settlement

"""`tally contract inspect`: shows a purse, a tab, a provider or the rules from chain state, in words and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import open_escrow, parse_account
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, Provider, Rpc
from tallystick.cli.output import json_fields, out, show_fields, show_json, show_table
from tallystick.cli.progress import run_shown
from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.state_explainer import Explanation, StateExplainer

app = typer.Typer(no_args_is_help=True, help="Inspect the contract's state, for contract developers.")
inspect = typer.Typer(
    no_args_is_help=True, help="Show a part of the contract's state, what it means, and what can be done next, by whom and when."
)
app.add_typer(inspect, name="inspect")

Key = Annotated[str, typer.Argument(help="Key of the purse: an address or a wallet name.")]
Payer = Annotated[str, typer.Argument(help="Key of the payer: an address or a wallet name.")]

Reader = Callable[["Escrow", "StateExplainer"], Awaitable[tuple[dict[str, Any], "Explanation"]]]


@inspect.command()
def purse(key: Key = DEFAULT_WALLET, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """Show a payer's purse: its owner, what is free and what is thawing."""
    address = parse_account(key, "KEY")

    async def read(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state = await escrow.purse(address)
        return {"key": address} | asdict(state), explain.purse(state)

    _show("purse", read, deployment, rpc, as_json=as_json)


@inspect.command()
def tab(payer: Payer, provider: Provider, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """Show a payer's tab with a provider: what was settled, what is reserved, whether a release is announced."""
    parties: tuple[Address, Address] = parse_account(payer, "PAYER"), parse_account(provider, "PROVIDER")

    async def read(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state, purse_state = await asyncio.gather(escrow.tab(*parties), escrow.purse(parties[0]))
        fields: dict[str, Any] = {"payer": parties[0], "provider": parties[1]} | asdict(state)
        fields |= {"purse_owner": purse_state.owner, "purse_free": purse_state.free}
        return fields, explain.tab(state, purse_state)

    _show("tab", read, deployment, rpc, as_json=as_json)


@inspect.command()
def provider(
    address: Provider = DEFAULT_WALLET, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False
) -> None:
    """Show an account that earns: its credit and payout address, its stake, and the fee if it is a coordinator."""
    account = parse_account(address, "ADDRESS")

    async def read(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state = await escrow.provider(account)
        return {"account": account} | asdict(state), explain.provider(state, account)

    _show("account", read, deployment, rpc, as_json=as_json)


@inspect.command()
def rules(deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """Show the deployment: its addresses, waiting times and penalty."""

    async def read(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        loaded = escrow.deployment
        fields = {
            "escrow": loaded.escrow,
            "token": loaded.token,
            "token_decimals": loaded.token_decimals,
            "since_block": loaded.block,
        }
        return fields | asdict(await escrow.rules()), explain.rules()

    _show("rules", read, deployment, rpc, as_json=as_json)


def _show(kind: str, read: Reader, deployment: Path | None, rpc: str | None, *, as_json: bool) -> None:
    from tallystick.chain.state_explainer import StateExplainer

    async def run() -> tuple[dict[str, Any], Explanation, dict[str, Any], int]:
        async with open_escrow(deployment, rpc) as escrow:
            now, block = await asyncio.gather(escrow.rpc.now(), escrow.rpc.block_number())
            decimals = escrow.deployment.token_decimals
            explain = StateExplainer(await escrow.rules(), now, lambda amount: f"{format_amount(amount, decimals)} dollars")
            fields, meaning = await read(escrow, explain)
            return fields, meaning, {"id": escrow.deployment.chain_id, "block": block, "now": now}, decimals

    fields, meaning, chain, decimals = run_shown("asking the chain", run())
    if as_json:
        steps = [step.to_json() for step in meaning.next_steps]
        document = {kind: json_fields(fields), "state": meaning.state, "says": list(meaning.sentences)}
        show_json(document | {"next": steps, "chain": chain})
    else:
        _print(kind, fields, meaning, chain, decimals)


def _print(kind: str, fields: dict[str, Any], meaning: Explanation, chain: dict[str, Any], decimals: int) -> None:
    from tallystick.chain.state_explainer import moment, utc

    def text(name: str, value: Any) -> str:
        if isinstance(value, Amount):
            return f"{format_amount(value, decimals)} dollars"
        if name.endswith("_at"):
            return moment(value, chain["now"]) if value else "-"
        return "-" if value is None else str(value)

    title = f"{kind}: {meaning.state} (chain {chain['id']}, block {chain['block']}, {utc(chain['now'])})"
    show_fields([(name.replace("_", " "), text(name, value)) for name, value in fields.items()], title=title)
    for sentence in meaning.sentences:
        out.print(sentence, highlight=False, soft_wrap=True)
    if meaning.next_steps:
        rows = [
            (step.actor, step.action, moment(step.at, chain["now"]), step.command or f"{step.call}()")
            for step in meaning.next_steps
        ]
        show_table(("by whom", "what", "when", "command or call"), rows, title="What can be done next")

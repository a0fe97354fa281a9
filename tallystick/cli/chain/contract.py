"""`tally contract inspect`: a purse, a tab, a provider or the rules, from chain state, in words and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import account_of, open_escrow
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, Rpc
from tallystick.cli.output import out, show_facts, show_json, show_rows
from tallystick.protocol.types import Address, Amount, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.state_explainer import Explanation, StateExplainer

app = typer.Typer(no_args_is_help=True, help="For contract developers: what the contract holds, from chain state.")
inspect = typer.Typer(
    no_args_is_help=True, help="Shows what something is, what it means, and what can be done next, by whom, when."
)
app.add_typer(inspect, name="inspect")

Key = Annotated[str, typer.Argument(help="The purse's key: an address, or a wallet's name.")]
Payer = Annotated[str, typer.Argument(help="The payer's key: an address, or a wallet's name.")]
Provider = Annotated[str, typer.Argument(help="The provider: an address, or a wallet's name.")]

Look = Callable[["Escrow", "StateExplainer"], Awaitable[tuple[dict[str, Any], "Explanation"]]]


@inspect.command()
def purse(key: Key = DEFAULT_WALLET, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """A payer's deposit: who owns it, what is free, what is leaving."""
    address = account_of(key, "KEY")

    async def look(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state = await escrow.purse(address)
        return {"key": address} | asdict(state), explain.purse(state)

    _show("purse", look, deployment, rpc, as_json=as_json)


@inspect.command()
def tab(payer: Payer, provider: Provider, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """One payer's account with one provider: what was paid, what is reserved, whether it is being taken back."""
    pair: tuple[Address, Address] = account_of(payer, "PAYER"), account_of(provider, "PROVIDER")

    async def look(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state, whole = await asyncio.gather(escrow.tab(*pair), escrow.purse(pair[0]))
        facts: dict[str, Any] = {"payer": pair[0], "provider": pair[1]} | asdict(state)
        return facts | {"purse_owner": whole.owner, "purse_free": whole.free}, explain.tab(state, whole)

    _show("tab", look, deployment, rpc, as_json=as_json)


@inspect.command()
def provider(
    address: Provider = DEFAULT_WALLET, deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False
) -> None:
    """An account that earns: its credit, where that goes, its stake; a coordinator's rate."""
    account = account_of(address, "ADDRESS")

    async def look(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        state = await escrow.provider(account)
        return {"account": account} | asdict(state), explain.provider(state, account)

    _show("account", look, deployment, rpc, as_json=as_json)


@inspect.command()
def rules(deployment: DeploymentFile = None, rpc: Rpc = None, as_json: Json = False) -> None:
    """The deployment: its addresses, its waits, its penalty."""

    async def look(escrow: Escrow, explain: StateExplainer) -> tuple[dict[str, Any], Explanation]:
        known = escrow.deployment
        places = {
            "escrow": known.escrow,
            "token": known.token,
            "token_decimals": known.token_decimals,
            "since_block": known.block,
        }
        return places | asdict(await escrow.rules()), explain.rules()

    _show("rules", look, deployment, rpc, as_json=as_json)


def _show(kind: str, look: Look, deployment: Path | None, rpc: str | None, *, as_json: bool) -> None:
    from tallystick.chain.state_explainer import StateExplainer

    async def run() -> tuple[dict[str, Any], Explanation, dict[str, Any], int]:
        async with open_escrow(deployment, rpc) as escrow:
            now, block = await asyncio.gather(escrow.rpc.now(), escrow.rpc.block_number())
            decimals = escrow.deployment.token_decimals
            explain = StateExplainer(await escrow.rules(), now, lambda amount: format_amount(amount, decimals))
            facts, meaning = await look(escrow, explain)
            return facts, meaning, {"id": escrow.deployment.chain_id, "block": block, "now": now}, decimals

    facts, meaning, chain, decimals = asyncio.run(run())
    if as_json:
        steps = [step.to_json() for step in meaning.next_steps]
        show_json({kind: _plain(facts), "state": meaning.state, "says": list(meaning.sentences), "next": steps, "chain": chain})
    else:
        _tell(kind, facts, meaning, chain, decimals)


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Amounts as decimal strings of base units, as everywhere on the wire; times and rates as numbers."""
    return {name: str(int(value)) if isinstance(value, Amount) else value for name, value in facts.items()}


def _tell(kind: str, facts: dict[str, Any], meaning: Explanation, chain: dict[str, Any], decimals: int) -> None:
    from tallystick.chain.state_explainer import moment, utc

    def words(name: str, value: Any) -> str:
        if isinstance(value, Amount):
            return format_amount(value, decimals)
        if name.endswith("_at"):
            return moment(value, chain["now"]) if value else "-"
        return "-" if value is None else str(value)

    title = f"{kind}: {meaning.state} (chain {chain['id']}, block {chain['block']}, {utc(chain['now'])})"
    show_facts([(name.replace("_", " "), words(name, value)) for name, value in facts.items()], title=title)
    for sentence in meaning.sentences:
        out.print(sentence, highlight=False)
    if meaning.next_steps:
        rows = [
            (one.actor, one.action, one.command or f"{one.call}()", moment(one.at, chain["now"])) for one in meaning.next_steps
        ]
        show_rows(("who", "can", "with", "when"), rows, title="What can be done next")

"""`tally deploy`: deploys the contracts to any chain and writes the deployment file."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.chain.chain import COIN_DECIMALS, LocalRpc
from tallystick.cli.market_deployment import LOCAL_RPC
from tallystick.cli.onchain import dev_account, held_by_escrow, parse_account, parse_duration, with_rpc
from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import note, show_fields, show_json, step
from tallystick.cli.progress import activity
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.public_url import has_secret, public_url
from tallystick.protocol.types import Address, format_amount, parse_address, parse_amount
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import EscrowRules
    from tallystick.protocol.eip712 import Signer

MAX_WAIT_SECONDS = 365 * 86_400
"""The contract's limit."""
GIFT_COINS, GIFT_DOLLARS = "1", "1000"

DevAccount = Annotated[
    int | None, typer.Option("--dev-account", help="Pay with this funded account of `tally chain` instead of a wallet.")
]


def _wait(name: str) -> Any:
    return typer.Option(f"--{name}-wait", help=f"Waiting time of {name}, for example 24h or 7d.", show_default=False)


def deploy(
    rpc: LocalRpc = LOCAL_RPC,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    dev: DevAccount = None,
    token: Annotated[
        str | None, typer.Option(help="Address of the ERC-20 token to settle in; default: deploy a test dollar.")
    ] = None,
    short_waits: Annotated[
        bool, typer.Option("--short-waits", help="Use waiting times of seconds instead of days, for tests.")
    ] = False,
    thaw: Annotated[str | None, _wait("thaw")] = None,
    release: Annotated[str | None, _wait("release")] = None,
    unstake: Annotated[str | None, _wait("unstake")] = None,
    penalty: Annotated[
        str | None, typer.Option(help="Highest penalty for one piece of evidence against a provider, in dollars.")
    ] = None,
    treasury: Annotated[
        str | None, typer.Option(help="Address that gets the rest of a penalty, after the reporter's part.")
    ] = None,
    fund: Annotated[
        list[str] | None,
        typer.Option(help="Wallet or address to give coins for gas and test dollars (repeatable; with --dev-account only)."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Deployment file to write; default: deployment.json in the home folder."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a deployment file whose escrow holds money, or cannot be read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Deploy the escrow (and a test dollar) to a chain, and write the deployment file that clients and daemons need.

    An earlier file is kept as deployment.1.json, and so on. If its escrow holds money, this needs --force: clients and daemons
    that use the file would no longer find that money.
    """
    path = file or home() / "deployment.json"
    if not force and path.exists():
        asyncio.run(_check_replaceable(path))
    gifts = [parse_account(text, "--fund") for text in fund or []]
    if gifts and (dev is None or token is not None):
        raise BadMessage(
            "--fund: only with --dev-account and without --token, since only a local chain has coins and dollars to give"
        )
    rules = _rules({"thaw": thaw, "release": release, "unstake": unstake}, penalty, treasury, short_waits=short_waits)
    existing = parse_address(token, "--token") if token else None
    signer = unlock(wallet, password_file) if dev is None else dev_account(dev)

    async def run(endpoint: Rpc) -> None:
        deployment = await _deploy(endpoint, signer, rules, existing, gifts)
        shown = deployment.to_json() | {"rpc": public_url(deployment.rpc)}
        if has_secret(deployment.rpc):
            note(f"{path} has the JSON-RPC URL with its API key: remove the key from its member rpc before you share the file")
        kept = deployment.save_keeping(path)
        if kept:
            note(f"the earlier {path} is kept as {kept}")
        if as_json:
            show_json(shown | {"file": str(path)})
            return
        step(f"wrote {path}")
        show_fields([*shown.items(), *_waits(rules)], title="Deployment")

    asyncio.run(with_rpc(rpc, run))


async def _check_replaceable(path: Path) -> None:
    """Raises BadMessage if the file at `path` is of a deployment that holds money, or might."""
    from tallystick.chain.deployment import Deployment

    try:
        existing = Deployment.load(path)
    except (BadMessage, OSError) as error:
        reason = f"it is no deployment file ({error})"
    else:
        held = await held_by_escrow(existing)
        if held == 0:
            return
        where = f"the escrow {existing.escrow} on chain {existing.chain_id}"
        if held is None:
            reason = f"chain {existing.chain_id} does not answer at {public_url(existing.rpc)}, so what {where} holds is unknown"
        else:
            reason = f"{where} holds {format_amount(held, existing.token_decimals)} dollars"
    raise BadMessage(f"{path}: {reason}. Name another file with --out, or use --force, which keeps this file beside the new one")


def _rules(waits: dict[str, str | None], penalty: str | None, treasury: str | None, *, short_waits: bool) -> EscrowRules:
    from tallystick.chain.deploy import LOCAL_RULES, PRODUCTION_RULES

    changes: dict[str, Any] = {name: parse_duration(text, f"--{name}-wait") for name, text in waits.items() if text is not None}
    if penalty is not None:
        changes["penalty"] = parse_amount(penalty, field="--penalty")
    if treasury is not None:
        changes["treasury"] = parse_address(treasury, "--treasury")
    rules = replace(LOCAL_RULES if short_waits else PRODUCTION_RULES, **changes)
    if rules.unstake > MAX_WAIT_SECONDS:
        raise BadMessage("--unstake-wait: expected at most 365d, so that no mistake locks money for good")
    if rules.unstake <= max(rules.thaw, rules.release):
        raise BadMessage(
            "--unstake-wait: expected longer than --thaw-wait and --release-wait, so that evidence against a "
            "provider is never late"
        )
    return rules


def _waits(rules: EscrowRules) -> list[tuple[str, object]]:
    from tallystick.chain.state_explainer import span

    return [(f"{name} wait", span(getattr(rules, name))) for name in ("thaw", "release", "unstake")]


async def _deploy(rpc: Rpc, signer: Signer, rules: EscrowRules, token: Address | None, gifts: list[Address]) -> Deployment:
    """Deploys the contracts and pays the gifts, with a line of progress for each. Raises Refusal, Unavailable."""
    from tallystick.chain.deploy import deploy as deploy_contracts
    from tallystick.chain.token import Token
    from tallystick.cli.transactions import ShownSender

    sender, coins = ShownSender(rpc, signer), await rpc.balance(signer.address)
    step(f"chain {await rpc.chain_id()} at {rpc.shown_url}; {signer.address} has {format_amount(coins, COIN_DECIMALS)} coins")
    if coins == 0:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"{signer.address} has no coins of the chain to pay for gas; send it some, or use --dev-account 0 on a local chain",
        )
    with activity("deploying the contracts"):
        deployment = await deploy_contracts(rpc, sender, rules=rules, token=token)
    step(f"escrow at {deployment.escrow}, settling in {'the token' if token else 'a test dollar'} at {deployment.token}")
    gift = parse_amount(GIFT_DOLLARS)
    for account in gifts:
        await sender.send(account, b"", value=int(parse_amount(GIFT_COINS, COIN_DECIMALS)))
        await Token(rpc, deployment.token).mint(sender, account, gift)
        step(f"gave {account} {GIFT_COINS} coin for gas and {GIFT_DOLLARS} test dollars")
    return deployment

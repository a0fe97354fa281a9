"""`tally chain`, `tally deploy`: a local chain and its clock, and the contracts on any chain."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tallystick.cli.onchain import LOCAL_RPC, account_of, parse_wait
from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import err, show_facts, show_json, show_rows, step
from tallystick.protocol.eip712 import checksum
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Address, Amount, format_amount, parse_address, parse_amount
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import EscrowRules
    from tallystick.protocol.eip712 import Signer

LONGEST_WAIT = 365 * 86_400
"""As the contract has it."""

GIFT_COINS, GIFT_DOLLARS = "1", "1000"

app = typer.Typer(help="Runs a local chain behind JSON-RPC; its sub-commands use one that runs.")
LocalRpc = Annotated[str, typer.Option("--rpc", help="JSON-RPC address of the chain.")]
Accounts = Annotated[int, typer.Option(help="How many funded accounts.", min=1, max=100)]
Dev = Annotated[int | None, typer.Option("--dev-account", help="Act as this account of `tally chain` instead of a wallet.")]


@app.callback(invoke_without_command=True)
def chain(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port of the JSON-RPC.")] = 8545,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    chain_id: Annotated[int, typer.Option(help="The chain's id.")] = 31337,
    accounts: Accounts = 10,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let web pages of this origin use it, as https://wallet.example or chrome-extension://ID; * for all."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Answer under this name too, beside localhost and plain IP addresses.")
    ] = None,
) -> None:
    """Runs a local chain behind JSON-RPC, with funded accounts whose keys everybody knows. It forgets all on exit.

    It serves the programs of this machine. Web pages are refused, unless --allow-origin names theirs: any page could otherwise
    move its clock.
    """
    if context.invoked_subcommand is not None:
        return
    from tallystick.chain.devnet import build_app, dev_accounts
    from tallystick.cli.daemons import start
    from tallystick.runtime.serving import serving, wait_for_stop_signal

    async def serve() -> None:
        app = build_app(chain_id, accounts, origins=allow_origin or (), hosts=(host, *(allow_host or ())))
        async with serving(app, host, port) as bound:
            rows = [(number, checksum(signer.address)) for number, signer in enumerate(dev_accounts(accounts))]
            show_rows(("--dev-account", "funded account"), rows, title="Play money only: anyone can derive these keys")
            err.print(
                f"chain {chain_id} on http://{host}:{bound} - take an account with: tally wallet import NAME --dev-account 0"
            )
            await wait_for_stop_signal()

    start(serve())


@app.command()
def accounts(
    count: Accounts = 10,
    keys: Annotated[bool, typer.Option("--private-keys", help="Show the private keys too, for other tools.")] = False,
    as_json: Json = False,
) -> None:
    """Lists the funded accounts: the same on every local chain, on anvil and hardhat too. Needs no chain that runs."""
    from tallystick.chain.devnet import dev_accounts

    found = [
        {"dev": number, "address": checksum(signer.address)} | ({"privateKey": "0x" + signer.secret.hex()} if keys else {})
        for number, signer in enumerate(dev_accounts(count))
    ]
    if as_json:
        show_json(found)
        return
    show_rows(("--dev-account", "address", *(["private key"] if keys else [])), [tuple(one.values()) for one in found])
    err.print("Anyone can derive these keys: play money only. Take one with: tally wallet import NAME --dev-account 0")


@app.command()
def advance(
    by: Annotated[str, typer.Argument(help="How far, for example 30s, 5m, 2h or 1d.")],
    rpc: LocalRpc = LOCAL_RPC,
    as_json: Json = False,
) -> None:
    """Moves a local chain's clock forward and makes a block, so that thaws, releases and unstakes can be tried."""
    seconds = parse_wait(by)

    async def travel(endpoint: Rpc) -> None:
        block, timestamp = await move_clock(endpoint, seconds)
        if as_json:
            show_json({"advanced": seconds, "timestamp": timestamp, "block": block})
        else:
            from tallystick.chain.state_explainer import span, utc

            step(f"{span(seconds)} later: block {block} is of {utc(timestamp)}")

    asyncio.run(_with_rpc(rpc, travel))


async def move_clock(rpc: Rpc, seconds: int) -> tuple[int, int]:
    """Moves the clock and makes a block: its number and its time. Raises Refusal where the chain has no time travel."""
    from tallystick.chain.endpoint import RpcError

    try:
        await rpc.request("evm_increaseTime", seconds)
        await rpc.request("evm_mine")
    except RpcError as error:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"the chain at {rpc.url} has no time travel ({error.reason}): only local test chains have (tally chain, anvil, "
            "hardhat). Elsewhere a wait must be waited for",
        ) from None
    block = await rpc.block()
    return (block.number, block.timestamp) if block else (0, 0)


@app.command()
def fund(
    account: Annotated[str, typer.Argument(help="A wallet's name, or an address.")] = DEFAULT_WALLET,
    coins: Annotated[str, typer.Option(help="Coins of the chain, for gas.")] = GIFT_COINS,
    dev: Annotated[int, typer.Option("--dev-account", help="The funded account that gives them.")] = 0,
    rpc: LocalRpc = LOCAL_RPC,
    as_json: Json = False,
) -> None:
    """Gives an account coins of a local chain, to pay for gas. Test dollars come with `tally deposit --mint`."""
    from tallystick.chain.sender import Sender

    to, value = account_of(account, "account"), int(parse_amount(coins, 18, "--coins"))

    async def give(endpoint: Rpc) -> None:
        mined = await Sender(endpoint, _dev(dev)).send(to, b"", value=value)
        have = await endpoint.balance(to)
        if as_json:
            show_json({"account": to, "coins": str(have), "tx": mined.hash})
        else:
            step(f"{to} has {format_amount(have, 18)} coins")

    asyncio.run(_with_rpc(rpc, give))


async def _with_rpc(url: str, use: Any) -> None:
    from tallystick.chain.endpoint import Rpc

    endpoint = Rpc(url)
    try:
        await use(endpoint)
    finally:
        await endpoint.close()


def _dev(number: int) -> Signer:
    from tallystick.chain.devnet import dev_accounts

    found = dev_accounts()
    if not 0 <= number < len(found):
        raise BadMessage(f"--dev-account: expected 0 to {len(found) - 1}")
    return found[number]


# -------------------------------------------------------------------------------------------------------------------- deploy


def _wait(name: str) -> Any:
    return typer.Option(f"--{name}-wait", help="For example 24h or 7d.", show_default=False)


def deploy(
    rpc: LocalRpc = LOCAL_RPC,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    dev: Dev = None,
    token: Annotated[
        str | None, typer.Option(help="Address of the ERC-20 to settle in; a test dollar is deployed without it.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--short-waits", help="Waits of seconds instead of days (thaw, release, unstake), for trying things.")
    ] = False,
    thaw: Annotated[str | None, _wait("thaw")] = None,
    release: Annotated[str | None, _wait("release")] = None,
    unstake: Annotated[str | None, _wait("unstake")] = None,
    penalty: Annotated[str | None, typer.Option(help="Dollars that one piece of evidence costs a provider, at most.")] = None,
    treasury: Annotated[
        str | None, typer.Option(help="Address that gets what penalties leave after the reporter's part.")
    ] = None,
    fund: Annotated[
        list[str] | None,
        typer.Option(help="Give this wallet or address coins for gas and test dollars (repeatable; with --dev-account only)."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", "-o", help="Deployment file to write; deployment.json in the home folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Deploys the escrow (and a test dollar) to any chain and writes the deployment file that every daemon is pointed at."""
    path = to or home() / "deployment.json"
    gifts = [account_of(one, "--fund") for one in fund or []]
    if gifts and (dev is None or token is not None):
        raise BadMessage("--fund: only an account of a local chain (--dev-account) gives coins and test dollars away")
    rules = _rules(local, {"thaw": thaw, "release": release, "unstake": unstake}, penalty, treasury)
    existing = parse_address(token, "--token") if token else None
    signer = unlock(wallet, password_file) if dev is None else _dev(dev)

    async def run(endpoint: Rpc) -> None:
        deployment = await _deploy(endpoint, signer, rules, existing, gifts)
        deployment.save(path)
        if as_json:
            show_json(deployment.to_json() | {"file": str(path)})
            return
        step(f"wrote {path}")
        show_facts([*deployment.to_json().items(), *_waits(rules)], title="Deployment")

    asyncio.run(_with_rpc(rpc, run))


def _rules(local: bool, waits: dict[str, str | None], penalty: str | None, treasury: str | None) -> EscrowRules:
    from tallystick.chain.deploy import LOCAL_RULES, PRODUCTION_RULES

    changed: dict[str, Any] = {name: parse_wait(text, f"--{name}-wait") for name, text in waits.items() if text is not None}
    if penalty is not None:
        changed["penalty"] = parse_amount(penalty, field="--penalty")
    if treasury is not None:
        changed["treasury"] = parse_address(treasury, "--treasury")
    rules = replace(LOCAL_RULES if local else PRODUCTION_RULES, **changed)
    if rules.unstake > LONGEST_WAIT:
        raise BadMessage("--unstake-wait: at most 365d, so that no mistake locks money for good")
    if rules.unstake <= max(rules.thaw, rules.release):
        raise BadMessage(
            "--unstake-wait: must be longer than --thaw-wait and --release-wait: evidence against a provider must never be late"
        )
    return rules


def _waits(rules: EscrowRules) -> list[tuple[str, object]]:
    from tallystick.chain.state_explainer import span

    return [(name, span(getattr(rules, name))) for name in ("thaw", "release", "unstake")]


async def _deploy(rpc: Rpc, signer: Signer, rules: EscrowRules, token: Address | None, gifts: list[Address]) -> Deployment:
    """Deploys with a line of progress for each thing done. Raises Refusal, Unavailable."""
    from tallystick.chain.deploy import deploy as deploy_contracts
    from tallystick.chain.sender import Sender
    from tallystick.chain.token import Token

    sender, have = Sender(rpc, signer), await rpc.balance(signer.address)
    step(f"chain {await rpc.chain_id()} at {rpc.url}; {signer.address} has {format_amount(have, 18)} coins")
    if have == 0:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"{signer.address} has no coins of the chain to pay for gas; send it some, or on a local chain use --dev-account 0",
        )
    deployment = await deploy_contracts(rpc, sender, rules=rules, token=token)
    step(f"escrow at {deployment.escrow}, settling in {'the token' if token else 'a test dollar'} at {deployment.token}")
    dollars: Amount = parse_amount(GIFT_DOLLARS)
    for account in gifts:
        await sender.send(account, b"", value=int(parse_amount(GIFT_COINS, 18)))
        await Token(rpc, deployment.token).mint(sender, account, dollars)
        step(f"gave {account} {GIFT_COINS} coin for gas and {GIFT_DOLLARS} test dollars")
    return deployment

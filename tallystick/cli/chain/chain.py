"""`tally chain`: runs a local chain, lists and funds its accounts, and moves its clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.market_deployment import LOCAL_RPC
from tallystick.cli.onchain import LOCAL_CHAIN_ID, dev_account, parse_account, parse_duration, with_rpc
from tallystick.cli.options import DEFAULT_WALLET, DeploymentFile, Json, deployment_path
from tallystick.cli.output import note, show_json, show_table, step
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.signatures import checksum
from tallystick.protocol.types import format_amount, parse_amount
from tallystick.runtime.config import home

if TYPE_CHECKING:
    from tallystick.chain.endpoint import Rpc

COIN_DECIMALS = 18
IMPORT_HINT = "tally wallet import NAME --dev-account 0"

app = typer.Typer(help="Run a local chain; the sub-commands use one that runs.")
LocalRpc = Annotated[str, typer.Option("--rpc", help="JSON-RPC URL of the chain.")]
MarketRpc = Annotated[
    str | None,
    typer.Option("--rpc", help=f"JSON-RPC URL of any local chain; default: the deployment file's, or {LOCAL_RPC} without one."),
]
Accounts = Annotated[int, typer.Option(help="Number of funded accounts.", min=1, max=100)]


@app.callback(invoke_without_command=True)
def chain(
    context: typer.Context,
    port: Annotated[int, typer.Option(help="Port of the JSON-RPC endpoint.")] = 8545,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    chain_id: Annotated[int, typer.Option(help="Chain id.")] = LOCAL_CHAIN_ID,
    accounts: Accounts = 10,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of web pages that may use the chain, such as https://wallet.example or chrome-extension://ID; * for all "
            "(repeatable)."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name under which to answer, in addition to localhost and plain IP addresses (repeatable)."),
    ] = None,
) -> None:
    """Run a local chain behind JSON-RPC, with funded accounts whose keys are public. It forgets everything on exit.

    The chain serves programs on this machine. It refuses web pages unless --allow-origin names their origin, since any page could
    otherwise move its clock.
    """
    if context.invoked_subcommand is not None:
        return
    from tallystick.chain.devnet import build_app, dev_accounts
    from tallystick.cli.daemons import run_daemon
    from tallystick.runtime.serving import serving, wait_for_stop_signal

    async def serve() -> None:
        app = build_app(chain_id, accounts, origins=allow_origin or (), hosts=(host, *(allow_host or ())))
        async with serving(app, host, port) as bound:
            rows = [(number, checksum(signer.address)) for number, signer in enumerate(dev_accounts(accounts))]
            show_table(("--dev-account", "address"), rows, title="Funded accounts. Play money only: their keys are public")
            note(f"chain {chain_id} on http://{host}:{bound} - import an account with: {IMPORT_HINT}")
            await wait_for_stop_signal()

    run_daemon(serve())


@app.command()
def accounts(
    count: Accounts = 10,
    private_keys: Annotated[bool, typer.Option("--private-keys", help="Also show the private keys, for other tools.")] = False,
    as_json: Json = False,
) -> None:
    """List the funded accounts, which are the same on every local chain, anvil and hardhat. Needs no running chain."""
    from tallystick.chain.devnet import dev_accounts

    listed = [
        {"devAccount": number, "address": checksum(signer.address)}
        | ({"privateKey": "0x" + signer.secret.hex()} if private_keys else {})
        for number, signer in enumerate(dev_accounts(count))
    ]
    if as_json:
        show_json(listed)
        return
    columns = ("--dev-account", "address", *(["private key"] if private_keys else []))
    show_table(columns, [tuple(account.values()) for account in listed])
    note(f"These keys are public: play money only. Import one with: {IMPORT_HINT}")


@app.command()
def advance(
    duration: Annotated[str, typer.Argument(help="Length of time, for example 30s, 5m, 2h or 1d.")],
    rpc: MarketRpc = None,
    deployment: DeploymentFile = None,
    as_json: Json = False,
) -> None:
    """Move a local chain's clock forward and mine a block, to skip the waits of thaw, release and unstake.

    Moves the chain of the deployment file, after a check that the contracts are there. --rpc names any other chain.
    """
    seconds = parse_duration(duration, "DURATION")

    async def act(endpoint: Rpc) -> None:
        block, timestamp = await move_clock(endpoint, seconds)
        if as_json:
            show_json({"advanced": seconds, "timestamp": timestamp, "block": block, "rpc": endpoint.url})
        else:
            from tallystick.chain.state_explainer import span, utc

            step(f"{span(seconds)} later: block {block} of {endpoint.shown_url} has the time {utc(timestamp)}")

    asyncio.run(_with_market_chain(rpc, deployment, act, check_contracts=True))


async def _with_market_chain(
    rpc: str | None, deployment: Path | None, act: Callable[[Rpc], Awaitable[None]], *, check_contracts: bool
) -> None:
    """Runs `act` with the chain that `rpc` names, else the deployment's.

    Raises WrongChain for another chain id than the deployment's, and WrongContract if `check_contracts` finds no escrow.
    """
    from tallystick.chain.codec import WrongContract
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.escrow import Escrow

    path = deployment or home() / "deployment.json"
    if rpc is not None or (deployment is None and not path.exists()):
        await with_rpc(rpc or LOCAL_RPC, act)
        return
    loaded = Deployment.load(deployment_path(path))

    async def check_and_act(endpoint: Rpc) -> None:
        endpoint.expect(loaded.chain_id)
        if check_contracts:
            try:
                await Escrow(endpoint, loaded).check()
            except WrongContract as error:
                raise WrongContract(f"{error}. To use this chain all the same: --rpc {endpoint.shown_url}") from None
        await act(endpoint)

    await with_rpc(loaded.rpc, check_and_act)


async def move_clock(rpc: Rpc, seconds: int) -> tuple[int, int]:
    """Moves the clock and mines a block. Returns the block's number and timestamp. Raises Refusal if the chain cannot."""
    from tallystick.chain.rpc_errors import RpcError

    try:
        await rpc.request("evm_increaseTime", seconds)
        await rpc.request("evm_mine")
    except RpcError as error:
        raise Refusal(
            Code.CHAIN_REFUSED,
            f"the chain at {rpc.shown_url} cannot move its clock ({error.reason}): only local test chains can (tally chain, "
            "anvil, hardhat). On other chains, wait",
        ) from None
    block = await rpc.block()
    return (block.number, block.timestamp) if block else (0, 0)


@app.command()
def fund(
    account: Annotated[str, typer.Argument(help="Account to fund: an address or a wallet name.")] = DEFAULT_WALLET,
    coins: Annotated[str, typer.Option(help="Number of coins of the chain, for gas.")] = "1",
    dev: Annotated[int, typer.Option("--dev-account", help="Number of the funded account that pays.")] = 0,
    rpc: MarketRpc = None,
    deployment: DeploymentFile = None,
    as_json: Json = False,
) -> None:
    """Send coins of a local chain to an account, to pay for gas. Test dollars come with `tally deposit --mint`.

    Uses the chain of the deployment file; --rpc names any other.
    """
    from tallystick.cli.transactions import ShownSender

    address, value = parse_account(account, "ACCOUNT"), int(parse_amount(coins, COIN_DECIMALS, "--coins"))

    async def act(endpoint: Rpc) -> None:
        mined = await ShownSender(endpoint, dev_account(dev)).send(address, b"", value=value)
        total = await endpoint.balance(address)
        if as_json:
            show_json({"account": address, "coins": str(total), "tx": mined.hash})
        else:
            shown = format_amount(total, COIN_DECIMALS)
            step(f"{address} has {shown} {'coin' if shown == '1' else 'coins'} on {endpoint.shown_url}")

    asyncio.run(_with_market_chain(rpc, deployment, act, check_contracts=False))

"""`tally chain`, `tally deploy`: a local chain, and the contracts on any chain."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.options import DEFAULT_WALLET, Json, PasswordFile, Wallet, unlock
from tallystick.cli.output import err, show_facts, show_json, show_rows, step
from tallystick.protocol.eip712 import checksum
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.types import parse_address
from tallystick.runtime.config import home


def chain(
    port: Annotated[int, typer.Option(help="Port of the JSON-RPC.")] = 8545,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    chain_id: Annotated[int, typer.Option(help="The chain's id.")] = 31337,
    accounts: Annotated[int, typer.Option(help="How many funded accounts.", min=1, max=100)] = 10,
) -> None:
    """Runs a local chain behind JSON-RPC, with funded accounts whose keys everybody knows. It forgets all on exit."""
    from tallystick.chain.devnet import build_app, dev_accounts
    from tallystick.cli.market import start
    from tallystick.runtime.serving import serving, until_stopped

    async def serve() -> None:
        async with serving(build_app(chain_id, accounts), host, port) as bound:
            rows = [(number, checksum(signer.address)) for number, signer in enumerate(dev_accounts(accounts))]
            show_rows(("--dev", "funded account"), rows, title="Play money only: anyone can derive these keys")
            err.print(f"chain {chain_id} on http://{host}:{bound} - take an account with: tally wallet import NAME --dev 0")
            await until_stopped()

    start(serve())


def deploy(
    rpc: Annotated[str, typer.Option(help="JSON-RPC address of the chain.")] = "http://127.0.0.1:8545",
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    dev: Annotated[int | None, typer.Option(help="Deploy with this account of `tally chain` instead of a wallet.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Address of the ERC-20 to settle in; a test dollar is deployed without it.")
    ] = None,
    local: Annotated[
        bool, typer.Option(help="Waits of seconds instead of days (thaw, release, unstake), for trying things.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--out", "-o", help="Deployment file to write; deployment.json in the home folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Deploys the escrow (and a test dollar) to any chain and writes the deployment file that every daemon is pointed at."""
    from tallystick.chain.deploy import LOCAL_RULES, PRODUCTION_RULES
    from tallystick.chain.deploy import deploy as deploy_contracts
    from tallystick.chain.devnet import dev_accounts
    from tallystick.chain.rpc import Rpc, Sender

    path = to or home() / "deployment.json"
    if dev is not None and not 0 <= dev < len(dev_accounts()):
        raise BadMessage(f"--dev: expected 0 to {len(dev_accounts()) - 1}")
    signer = unlock(wallet, password_file) if dev is None else dev_accounts()[dev]
    existing = parse_address(token, "--token") if token else None

    async def run() -> None:
        endpoint = Rpc(rpc)
        try:
            rules = LOCAL_RULES if local else PRODUCTION_RULES
            deployment = await deploy_contracts(endpoint, Sender(endpoint, signer), rules=rules, token=existing)
        finally:
            await endpoint.close()
        deployment.save(path)
        if as_json:
            show_json(deployment.to_json() | {"file": str(path)})
            return
        step(f"wrote {path}")
        show_facts([(name, value) for name, value in deployment.to_json().items()], title="Deployment")

    asyncio.run(run())

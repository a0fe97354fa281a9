"""`tally coordinator fee`: the rate that a coordinator has registered on chain."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.onchain import account_of, open_escrow, require_coins
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import show_facts, show_json, step
from tallystick.protocol.types import format_amount

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig


def fee(
    bps: Annotated[
        int | None, typer.Argument(min=0, max=10_000, help="The new rate in hundredths of a percent; none: only show it.")
    ] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Shows the fee that this coordinator has registered on chain, or registers another one with its wallet, which pays the gas.

    The contract takes the registered rate of what is settled, never more than the order allows. `fee_bps` in the coordinator's
    config is what clients are told: a coordinator does not start where the two differ. Showing needs no password.
    """
    loaded = _config(config)
    path, endpoint = deployment or (loaded.deployment if loaded else None), rpc or (loaded.rpc if loaded else None)

    async def run() -> None:
        from tallystick.chain.sender import Sender

        signer = unlock(wallet, password_file) if bps is not None else None
        coordinator = signer.address if signer else account_of(wallet, "--wallet")
        async with open_escrow(path, endpoint) as escrow:
            tx = None
            if signer and bps is not None and await escrow.fee_bps(coordinator) != bps:
                await require_coins(escrow, coordinator)
                tx = (await escrow.set_fee(Sender(escrow.rpc, signer), bps)).hash
            registered = await escrow.fee_bps(coordinator)
        told = loaded.fee_bps if loaded else None
        if as_json:
            show_json({"coordinator": coordinator, "registeredBps": registered, "configBps": told, "tx": tx})
            return
        facts = [("registered", f"{registered} bps, {format_amount(registered, 2)} % of what is settled")]
        facts += [("config", f"{told} bps is what clients are told")] if told is not None else []
        show_facts(facts, title=f"fee of coordinator {coordinator}")
        if tx:
            step(f"registered in transaction {tx}")
        if told is not None and told != registered:
            step(f"the coordinator does not start like this: set fee_bps = {registered}, or run tally coordinator fee {told}")
        elif tx and told is None:
            step(f"let fee_bps = {registered} stand in the coordinator's config, so that clients are told")

    asyncio.run(run())


def _config(path: Path | None) -> CoordinatorConfig | None:
    """The coordinator's config, where one is named."""
    from coordinator.config import load_config

    return load_config(path) if path else None

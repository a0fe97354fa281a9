"""`tally coordinator fee`: shows or registers a coordinator's fee on chain."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tallystick.cli.onchain import open_escrow, parse_account, require_gas
from tallystick.cli.options import DEFAULT_WALLET, Config, DeploymentFile, Json, PasswordFile, Rpc, Wallet, unlock
from tallystick.cli.output import note, show_fields, show_json, step
from tallystick.protocol.types import format_amount

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig


def fee(
    bps: Annotated[
        int | None, typer.Argument(min=0, max=10_000, help="New fee in basis points (hundredths of a percent); omit to show it.")
    ] = None,
    config: Config = None,
    wallet: Wallet = DEFAULT_WALLET,
    password_file: PasswordFile = None,
    deployment: DeploymentFile = None,
    rpc: Rpc = None,
    as_json: Json = False,
) -> None:
    """Show the fee that a coordinator has registered on chain, or register another one. Showing needs no password.

    The contract takes the registered fee from what is settled, at most what the order allows. `fee_bps` in the coordinator's
    config is what clients are told: a coordinator does not start if the two differ. Registering costs the wallet gas.
    """
    loaded = _load(config)
    path, endpoint = deployment or (loaded.deployment if loaded else None), rpc or (loaded.rpc if loaded else None)

    async def run() -> None:
        from tallystick.cli.transactions import ShownSender

        signer = unlock(wallet, password_file) if bps is not None else None
        coordinator = signer.address if signer else parse_account(wallet, "--wallet")
        async with open_escrow(path, endpoint) as escrow:
            tx = None
            if signer and bps is not None and await escrow.fee_bps(coordinator) != bps:
                await require_gas(escrow, coordinator)
                tx = (await escrow.set_fee(ShownSender(escrow.rpc, signer), bps)).hash
            registered = await escrow.fee_bps(coordinator)
        configured = loaded.fee_bps if loaded else None
        if as_json:
            show_json({"coordinator": coordinator, "registeredBps": registered, "configBps": configured, "tx": tx})
        else:
            _show(coordinator, registered, configured, tx)

    asyncio.run(run())


def _show(coordinator: str, registered: int, configured: int | None, tx: str | None) -> None:
    fields = [("registered", f"{registered} bps ({format_amount(registered, 2)} % of what is settled)")]
    fields += [("config", f"{configured} bps, as clients are told")] if configured is not None else []
    show_fields(fields, title=f"Fee of coordinator {coordinator}")
    if tx:
        step(f"registered in transaction {tx}")
    if configured is not None and configured != registered:
        note(
            f"the coordinator does not start while these differ: set fee_bps = {registered} in its config, or run "
            f"tally coordinator fee {configured}"
        )
    elif tx and configured is None:
        note(f"set fee_bps = {registered} in the coordinator's config, which is what clients are told")


def _load(path: Path | None) -> CoordinatorConfig | None:
    """The coordinator's config, if one is named."""
    from coordinator.config import load_config

    return load_config(path) if path else None

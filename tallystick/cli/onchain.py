"""Shared by the commands that use the contracts: opening the escrow, resolving accounts, parsing lengths of time."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.cli.market_deployment import LOCAL_RPC, default_deployment_file, ensure_deployment_file
from tallystick.cli.options import deployment_path
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import Address, Amount, parse_address
from tallystick.runtime.config import home
from tallystick.runtime.keystore import keystore_address, keystore_path

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

LOCAL_CHAIN_ID = 31_337
HOLDINGS_SECONDS = 20
MAX_DURATION_SECONDS = 3_650 * 86_400
_DURATION = re.compile(r"([0-9]{1,10})([smhd])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@contextlib.asynccontextmanager
async def open_escrow(deployment: Path | None, rpc: str | None, *, coordinator: str | None = None) -> AsyncIterator[Escrow]:
    """Yields the escrow of a deployment file after it checked that the contract is there.

    A missing default file is fetched from the market's coordinator: the one that is named, or the client's. Raises BadMessage,
    Refusal, Unavailable.
    """
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    loaded = Deployment.load(await _deployment_file(deployment, rpc, coordinator))
    endpoint = Rpc(rpc or loaded.rpc)
    try:
        escrow = Escrow(endpoint, loaded)
        await escrow.check()
        yield escrow
    finally:
        await endpoint.close()


async def _deployment_file(path: Path | None, rpc: str | None, coordinator: str | None) -> Path:
    if coordinator is None:
        if path is not None:
            return deployment_path(path)
        from tallystick.client.config import load_config

        return await ensure_deployment_file(default_deployment_file(), load_config().coordinator, rpc)
    return await ensure_deployment_file(path or default_deployment_file(), coordinator, rpc, named=True)


async def held_by_escrow(deployment: Deployment | None) -> Amount | None:
    """All money in a deployment's escrow, in base units; 0 if its chain no longer has it. None if the chain does not answer."""
    from tallystick.chain.codec import WrongContract
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    if deployment is None:
        return None
    endpoint = Rpc(deployment.rpc)
    try:
        async with asyncio.timeout(HOLDINGS_SECONDS):
            escrow = Escrow(endpoint, deployment)
            await escrow.check()
            return await escrow.token.balance_of(deployment.escrow)
    except WrongContract:
        return Amount(0)
    except (TallyError, TimeoutError):
        return None
    finally:
        await endpoint.close()


async def with_rpc(url: str, act: Callable[[Rpc], Awaitable[None]]) -> None:
    """Runs `act` with a chain's endpoint, which is closed afterwards."""
    from tallystick.chain.endpoint import Rpc

    endpoint = Rpc(url)
    try:
        await act(endpoint)
    finally:
        await endpoint.close()


def chain_option(escrow: Escrow) -> str:
    """What a `tally chain` command needs to act on this escrow's chain: " --rpc URL", or nothing if it does so by default."""
    from tallystick.chain.deployment import Deployment

    try:
        default = Deployment.load(home() / "deployment.json").rpc
    except (BadMessage, OSError):
        default = LOCAL_RPC
    return "" if escrow.rpc.url == default else f" --rpc {escrow.rpc.shown_url}"


async def require_gas(escrow: Escrow, account: Address) -> None:
    """Raises Refusal if an account has no coins of the chain to pay for gas."""
    if await escrow.rpc.balance(account) == 0:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"{account} has no coins of the chain to pay for gas; send it some first (local chain: tally chain fund "
            f"{account}{chain_option(escrow)})",
        )


def parse_account(text: str, field: str) -> Address:
    """The address that `text` is, or that the wallet of this name in the home folder has. Raises BadMessage."""
    if text.startswith(("0x", "0X")):
        return parse_address(text, field)
    path = keystore_path(text)
    if not path.exists():
        raise BadMessage(
            f"{field}: no wallet {text[:100]!r} in the home folder (tally wallet list). Make one with `tally wallet new`, "
            "give an address (0x…), or let `tally start` set everything up"
        )
    return parse_address(keystore_address(path), field)


def dev_account(number: int) -> Signer:
    """One of the funded accounts of a local chain. Raises BadMessage."""
    from tallystick.chain.devnet import dev_accounts

    accounts = dev_accounts()
    if not 0 <= number < len(accounts):
        raise BadMessage(f"--dev-account: expected 0 to {len(accounts) - 1}, got {number}")
    return accounts[number]


def parse_duration(text: str, field: str) -> int:
    """Seconds, from a length of time such as 30s, 5m, 2h or 1d. Raises BadMessage."""
    match = _DURATION.fullmatch(text.strip().lower())
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]] if match else 0
    if not 0 < seconds <= MAX_DURATION_SECONDS:
        raise BadMessage(f"{field}: expected a length of time such as 30s, 5m, 2h or 1d, at most 3650d, got {text[:40]!r}")
    return seconds

"""What the commands that talk to the contracts share: reaching the escrow, naming accounts and lengths of time."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from tallystick.cli.options import deployment_path
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.types import Address, parse_address
from tallystick.runtime.keystore import keystore_address, keystore_path

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow

LOCAL_RPC = "http://127.0.0.1:8545"
LONGEST_WAIT = 3_650 * 86_400
_WAIT = re.compile(r"([0-9]{1,10})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


@contextlib.asynccontextmanager
async def open_escrow(deployment: Path | None, rpc: str | None) -> AsyncIterator[Escrow]:
    """The escrow of a deployment file, once it is sure that it is there. Raises BadMessage, Unavailable and its kinds."""
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    known = Deployment.load(deployment_path(deployment))
    endpoint = Rpc(rpc or known.rpc)
    try:
        escrow = Escrow(endpoint, known)
        await escrow.check()
        yield escrow
    finally:
        await endpoint.close()


async def require_coins(escrow: Escrow, account: Address) -> None:
    """Raises Refusal where an account has nothing to pay for gas."""
    if await escrow.rpc.balance(account) == 0:
        raise Refusal(
            Code.INSUFFICIENT_FUNDS,
            f"{account} has no coins of the chain to pay for gas; send it some first (local chain: tally chain fund {account})",
        )


def account_of(text: str, field: str) -> Address:
    """An account by its address, or by the name of a wallet of the home folder. Raises BadMessage."""
    if text.startswith(("0x", "0X")):
        return parse_address(text, field)
    path = keystore_path(text)
    if not path.exists():
        raise BadMessage(
            f"{field}: there is no wallet {text[:100]!r} in the home folder; make one with `tally wallet new`, or give an "
            "address (0x…); `tally start` does all that a first answer needs"
        )
    return parse_address(keystore_address(path), field)


def parse_wait(text: str, field: str = "time") -> int:
    """Seconds from a length of time such as 30s, 5m, 2h or 1d. Raises BadMessage."""
    match = _WAIT.fullmatch(text.strip().lower())
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= LONGEST_WAIT:
        raise BadMessage(f"{field}: expected a length of time such as 30s, 5m, 2h or 1d, at most 3650d, got {text[:40]!r}")
    return seconds

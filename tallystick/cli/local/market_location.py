"""Where the local market of `tally start` is, and which of the services that answer there belong to it.

An answer on a port proves nothing about who gives it. A chain is this market's if it has the escrow of the deployment file. A
coordinator is this market's if it settles on that escrow. A coordinator that the user named may be joined.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tallystick.cli.local.processes import free_port
from tallystick.cli.local.services import get_json
from tallystick.cli.market_deployment import LOCAL_RPC, deployment_of, is_local
from tallystick.cli.onchain import LOCAL_CHAIN_ID
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.runtime.ports import describe_holder

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.endpoint import Rpc
    from tallystick.client.coordinator.info import CoordinatorInfo

CONNECT_SECONDS = 2
OTHER_COORDINATOR_PORT = 8430


@dataclass(frozen=True, slots=True)
class MarketLocation:
    """Where a market is, by the user's settings: the coordinator's URL and the deployment file."""

    coordinator: str
    deployment: Path
    named: bool = False
    """Whether the user named the coordinator, so that its market may be joined."""

    @property
    def rpc(self) -> str:
        """The chain's URL. Raises BadMessage for a damaged deployment file."""
        loaded = self.load_deployment()
        return LOCAL_RPC if loaded is None else loaded.rpc

    def load_deployment(self) -> Deployment | None:
        """The deployment file's content; None if the file does not exist. Raises BadMessage if it is damaged."""
        from tallystick.chain.deployment import Deployment

        return Deployment.load(self.deployment) if self.deployment.exists() else None

    @property
    def is_local(self) -> bool:
        """Whether the whole market is on this machine with play money, so that it may be started and funded."""
        loaded = self.load_deployment()
        return is_local(self.coordinator) and (loaded is None or (loaded.chain_id == LOCAL_CHAIN_ID and is_local(loaded.rpc)))


@dataclass(frozen=True, slots=True)
class MarketState:
    """What answers at a location now."""

    chain: int | None
    """The id of the chain that answers at the location's URL, whoever runs it."""
    deployment: Deployment | None
    """The market's contracts, which are on that chain; None if it has none of them, and is thus not this market's chain."""
    coordinator: CoordinatorInfo | None
    """The market's coordinator, if it answers."""
    foreign: str | None
    """Another program that serves the coordinator's address, in words."""


def port_of(url: str) -> int:
    """The port of a URL. Raises BadMessage if it is out of range."""
    parts = urlsplit(url)
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise BadMessage(f"expected a URL with a port from 1 to 65535, got {url[:200]!r}") from None


async def chain_id(rpc: Rpc) -> int | None:
    """The chain's id; None if the chain does not answer."""
    try:
        return await rpc.chain_id()
    except TallyError:
        return None


async def inspect_market(rpc: Rpc, location: MarketLocation) -> MarketState:
    """Finds out which services at a location belong to its market. Raises BadMessage for a damaged deployment file."""
    chain, info = await asyncio.gather(chain_id(rpc), coordinator_info(location.coordinator))
    deployment = location.load_deployment()
    if chain is None or deployment is None or chain != deployment.chain_id or not await is_deployed(rpc, deployment):
        deployment = None
    if info is not None and location.named and chain == LOCAL_CHAIN_ID and location.is_local:
        joined = deployment_of(info, rpc.url)
        if joined is not None and (deployment is None or deployment.escrow != joined.escrow) and await is_deployed(rpc, joined):
            deployment = joined
    if info is not None and deployment is not None and info.domain == deployment.domain:
        return MarketState(chain, deployment, info, None)
    foreign = await _foreign_program(location, info) if is_local(location.coordinator) else None
    return MarketState(chain, deployment, None, foreign)


async def is_deployed(rpc: Rpc, deployment: Deployment) -> bool:
    """Whether the chain has this deployment's escrow, which settles in its token. Raises Unavailable."""
    from tallystick.chain.codec import WrongContract
    from tallystick.chain.endpoint import Rpc, WrongChain
    from tallystick.chain.escrow import Escrow

    own = Rpc(rpc.url)  # `Escrow` binds its endpoint to the deployment's chain
    try:
        await Escrow(own, deployment).check()
    except (WrongChain, WrongContract):
        return False
    finally:
        await own.close()
    return True


async def coordinator_info(url: str) -> CoordinatorInfo | None:
    """What the coordinator at a URL says about itself; None if none answers there."""
    from tallystick.client.coordinator.info import CoordinatorInfo

    try:
        return CoordinatorInfo.from_json(await get_json(f"{url}/v1/info"))
    except BadMessage:
        return None


def refuse_foreign(location: MarketLocation, foreign: str) -> Refusal:
    """The error for a coordinator's address that another program serves."""
    other = f"http://127.0.0.1:{free_port(OTHER_COORDINATOR_PORT)}"
    return Refusal(
        Code.PORT_UNAVAILABLE,
        f"{location.coordinator} is taken: {foreign}. Stop that program, or choose another address for the coordinator of this "
        f"market: tally start --coordinator {other} (later commands find it with TALLY_GATEWAY_COORDINATOR={other})",
    )


async def _foreign_program(location: MarketLocation, info: CoordinatorInfo | None) -> str | None:
    parts, port = urlsplit(location.coordinator), port_of(location.coordinator)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError):
        return None
    writer.close()
    holder = describe_holder(port) or "another program"
    if info is None:
        return f"{holder} listens there"
    return f"{holder} is a coordinator that settles on {info.domain.contract}, which is not this market's contract"

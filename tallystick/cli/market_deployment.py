"""The market's deployment file: the one that is there, or one that is made from what the coordinator announces.

What a coordinator announces is believed only as far as the chain confirms it: its contract must have the code of this version's
escrow. The chain's endpoint is the user's own choice, except for a market on this machine.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from tallystick.protocol.errors import BadMessage, Fault, TallyError, Unavailable
from tallystick.runtime.config import home
from tallystick.runtime.plaintext import is_loopback

if TYPE_CHECKING:
    from tallystick.chain.deployment import Deployment
    from tallystick.chain.escrow import EscrowRules
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.info import CoordinatorInfo

LOCAL_RPC = "http://127.0.0.1:8545"


@dataclass(frozen=True, slots=True)
class CheckedDeployment:
    """A deployment that a coordinator announced and the chain confirmed: its rules, and the hash of its code."""

    deployment: Deployment
    rules: EscrowRules
    code_hash: str

    def __str__(self) -> str:
        from tallystick.chain.state_explainer import span

        found, rules = self.deployment, self.rules
        waits = f"{span(rules.thaw)} to thaw, {span(rules.release)} to release, {span(rules.unstake)} to unstake"
        return (
            f"contract {found.escrow} on chain {found.chain_id}, token {found.token}; its code is this version's escrow (hash "
            f"{self.code_hash[:16]}…); waits: {waits}"
        )


def default_deployment_file() -> Path:
    """The deployment file of commands that name none."""
    return home() / "deployment.json"


def is_local(url: str) -> bool:
    """Whether a URL names this machine."""
    return is_loopback(urlsplit(url).hostname or "")


def deployment_of(info: CoordinatorInfo, rpc: str) -> Deployment | None:
    """The deployment that a coordinator announces, unchecked; None if it names no token."""
    from tallystick.chain.deployment import Deployment

    if info.token is None:
        return None
    return Deployment(info.domain.chain_id, info.domain.contract, info.token, info.token_decimals, info.block, rpc)


async def fetch_deployment(coordinator: str, rpc: str | None) -> CheckedDeployment:
    """Asks a coordinator for its deployment and checks it on the chain at `rpc`.

    Raises BadMessage if no endpoint is known, WrongChain, WrongContract, Unavailable.
    """
    from tallystick.chain.code_check import check_code
    from tallystick.chain.endpoint import Rpc
    from tallystick.chain.escrow import Escrow

    info = await _ask_coordinator(coordinator)
    endpoint = rpc or _local_endpoint(coordinator, info)
    if endpoint is None:
        raise BadMessage(
            f"the coordinator {coordinator} settles on contract {info.domain.contract} of chain {info.domain.chain_id}. To check "
            "that, name an RPC endpoint of this chain that you trust, with --rpc or `rpc` in the config"
        )
    deployment = deployment_of(info, endpoint)
    if deployment is None:
        raise BadMessage("info.token: expected the token in which the market settles, got none", fault=Fault.COORDINATOR)
    chain = Rpc(endpoint)
    try:
        escrow = Escrow(chain, deployment)
        rules, code_hash = await check_code(escrow)
        decimals = await escrow.token.decimals()
    finally:
        await chain.close()
    if decimals != deployment.token_decimals:
        raise BadMessage(
            f"info.tokenDecimals: expected {decimals}, which the token {deployment.token} has, got {deployment.token_decimals}",
            fault=Fault.COORDINATOR,
        )
    return CheckedDeployment(deployment, rules, code_hash)


def _local_endpoint(coordinator: str, info: CoordinatorInfo) -> str | None:
    """The endpoint of a market on this machine; None for a market elsewhere, whose coordinator has no say in this."""
    if not is_local(coordinator):
        return None
    return info.rpc if info.rpc is not None and is_local(info.rpc) else LOCAL_RPC


async def ensure_deployment_file(path: Path, coordinator: str, rpc: str | None, *, named: bool = False) -> Path:
    """Returns `path`. If it does not exist, writes the deployment that the coordinator announces, checked on chain.

    Shows what it wrote. For a market elsewhere it asks first, if a person can answer. `named`: the user named this coordinator,
    so a file of another market is refused. Raises TallyError.
    """
    if _exists(path):
        if named:
            await _require_same_market(path, coordinator)
        return path
    try:
        checked = await fetch_deployment(coordinator, rpc)
    except TallyError as error:
        raise BadMessage(
            f"no deployment file at {path}, and none could be fetched from the market's coordinator: {error}. Name the "
            "coordinator with --coordinator, name a file with --deployment, or deploy a market of your own with `tally deploy`"
        ) from error
    text = f"the coordinator {coordinator} settles on {checked}"
    if not is_local(coordinator) and sys.stdin.isatty():
        typer.confirm(f"{text}. Use this market?", default=True, abort=True, err=True)
    checked.deployment.save(path)
    from tallystick.cli.output import step  # not loaded by a daemon that has its file

    step(f"{text}; wrote {path}")
    return path


def _exists(path: Path) -> bool:
    return path.exists()


async def pinned_deployment(config: ClientConfig) -> Path | None:
    """The deployment file to which a gateway is pinned: the config's, else the default one, which is fetched if it is missing.

    None, with a remark, if the default one is of another market or cannot be had now. Raises TallyError for a file that the
    config names.
    """
    from tallystick.cli.output import note

    if config.deployment is not None:
        return await ensure_deployment_file(config.deployment, config.coordinator, config.rpc)
    path = default_deployment_file()
    if not _exists(path):
        try:
            return await ensure_deployment_file(path, config.coordinator, config.rpc)
        except TallyError as error:
            note(f"any contract of the coordinator is accepted: {error}")
            return None
    matches = await matches_coordinator(path, config.coordinator)
    if matches is False:
        note(
            f"{path} is of another market than the coordinator {config.coordinator}, so it is not used: to hold the gateway to "
            "one contract, name its file as `deployment` in the config"
        )
    return path if matches else None


async def matches_coordinator(path: Path, coordinator: str) -> bool | None:
    """Whether a deployment file is of the market of a coordinator; None if that does not answer. Raises BadMessage."""
    from tallystick.chain.deployment import Deployment

    try:
        info = await _ask_coordinator(coordinator)
    except Unavailable:
        return None
    return info.domain == Deployment.load(path).domain


async def _require_same_market(path: Path, coordinator: str) -> None:
    if await matches_coordinator(path, coordinator) is False:
        raise BadMessage(
            f"{path} is of another market than the coordinator {coordinator}; to use that coordinator's market, name a file for "
            "it with --deployment (it is fetched if it does not exist)"
        )


async def _ask_coordinator(coordinator: str) -> CoordinatorInfo:
    from tallystick.client.config import ClientConfig
    from tallystick.client.coordinator.http_client import CoordinatorClient

    async with CoordinatorClient(coordinator, ClientConfig(coordinator=coordinator)) as client:
        return await client.info()

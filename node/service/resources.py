"""Resources of a node: its locked state folder, its store, its chain connection, its engines."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from node.chain.direct_settlement import DirectSettlement
from node.chain.escrow_view import EscrowView
from node.chain.payouts import Payouts, check_policy
from node.domain.tier_prices import TierPrices
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool, discover_engines
from node.storage.state_folder import lock_state
from node.storage.store import SqlStore
from tallystick.chain.chain_health import ChainHealth
from tallystick.chain.deployment import Deployment
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.protocol.eip712 import Domain, Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.sealing import SealingKey
from tallystick.runtime.keystore import load_or_create_secret


@dataclass(frozen=True, slots=True)
class Resources:
    """The opened resources: account and domain, store, chain view, direct settlement, payouts, engines, sealing key, and
    the check of the chain.
    """

    signer: Signer
    domain: Domain
    store: SqlStore
    chain: EscrowView
    settlement: DirectSettlement
    payouts: Payouts
    engine_pool: EnginePool
    sealing_key: SealingKey
    chain_health: ChainHealth
    escrow: Escrow


async def open_resources(config: NodeConfig, signer: Signer, stack: AsyncExitStack, config_file: Path | None = None) -> Resources:
    """Opens the resources; the stack closes them. `config_file` is told to others that look at the state.

    Raises TallyError: another node uses this state, no deployment file, a state of another key, no engine.
    """
    deployment = _deployment(config.deployment)
    check_policy(config.payout, deployment.chain_id)
    stack.enter_context(lock_state(config.state, signer.address, config_file))
    store = SqlStore(config.database, signer.address, deployment.domain)
    await store.start()
    stack.push_async_callback(store.close)
    engine_pool = EnginePool(config.engines or await discover_engines(os.environ), os.environ)
    engine_pool.tier_prices = TierPrices(config.access)
    stack.push_async_callback(engine_pool.close)
    rpc = Rpc(config.rpc or deployment.rpc)
    stack.push_async_callback(rpc.close)
    escrow = Escrow(rpc, deployment)
    chain = EscrowView(escrow, signer.address)
    stack.push_async_callback(chain.close)
    sender = Sender(rpc, signer)
    settlement = DirectSettlement(escrow, sender, store.record_gas)
    payouts = Payouts(escrow, sender, store, config.payout)
    health_rpc = Rpc(config.rpc or deployment.rpc, attempts=1)
    stack.push_async_callback(health_rpc.close)
    health = ChainHealth(health_rpc, deployment, signer.address)
    return Resources(
        signer, deployment.domain, store, chain, settlement, payouts, engine_pool, _sealing_key(config), health, escrow
    )


def _deployment(path: Path) -> Deployment:
    try:
        return Deployment.load(path)
    except OSError as error:
        raise BadMessage(f"deployment file {path}: {error.strerror}; `tally deploy` writes this file") from None


def _sealing_key(config: NodeConfig) -> SealingKey:
    suite = config.sealing_suite
    return SealingKey(suite, load_or_create_secret(config.state / f"sealing-{suite}.key", SealingKey.secret_bytes(suite)))

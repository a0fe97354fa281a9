"""What the coordinator's health consists of: its database, disk, chain and certificate, and what its parts add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from coordinator.config import CoordinatorConfig
from coordinator.storage.store import Store
from tallystick.chain.chain_health import ChainHealth
from tallystick.chain.deployment import Deployment
from tallystick.chain.rpc import Rpc
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.types import Address
from tallystick.runtime.disk_space import check_disk
from tallystick.runtime.health_monitor import Check, HealthMonitor
from tallystick.runtime.peer_probe import check_certificate, probe_peer
from tallystick.runtime.sqlite_backend import sqlite_file

_REMEDIES = {
    "database": "check `db` and the database server",
    "disk": "check the folder of `db`",
    "chain": "check `rpc` and the chain's endpoint",
}


@dataclass(frozen=True, slots=True)
class HealthChecks:
    """The monitor of the coordinator's dependencies, and the endpoint that it asks."""

    monitor: HealthMonitor
    rpc: Rpc

    async def close(self) -> None:
        """Ends the checks."""
        await self.monitor.close()
        await self.rpc.close()


def health_checks(
    config: CoordinatorConfig, deployment: Deployment, account: Address, store: Store, further: Mapping[str, Check]
) -> HealthChecks:
    """Makes the checks; `further`: those of other parts, by name. A check asks the chain once, so an outage shows at once."""
    file, rpc = sqlite_file(store.database.url), Rpc(config.rpc or deployment.rpc, attempts=1)

    async def database() -> dict[str, CheckResult]:
        return {"database": CheckResult(Health.PASS, value=round(1_000 * await store.ping(), 1), unit="ms")}

    async def disk() -> dict[str, CheckResult]:
        return {} if file is None else {"disk": await check_disk(file)}

    checks: dict[str, Check] = {
        "database": database,
        "disk": disk,
        "chain": ChainHealth(rpc, deployment, account).check,
        **further,
        "certificate": partial(_check_certificate, config),
    }
    return HealthChecks(HealthMonitor(checks, _REMEDIES), rpc)


async def _check_certificate(config: CoordinatorConfig) -> dict[str, CheckResult]:
    """The state of `certificate`, if clients reach this coordinator by https."""
    urls = [url for url in config.public_urls if url.startswith("https://")]
    valid = (await probe_peer(urls[0])).certificate if urls else None
    whose, remedy = "this coordinator's", "renew it where TLS ends: in the proxy before this coordinator"
    return {} if valid is None else {"certificate": check_certificate(valid, whose, remedy)}

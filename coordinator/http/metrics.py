"""Prometheus metrics of the coordinator beside those that it shares with the gateway: what its settlements cost."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter

from tallystick.protocol.health import HealthReport
from tallystick.runtime.server_metrics import ServerMetrics

PREFIX = "tallystick_coordinator"


class CoordinatorMetrics(ServerMetrics):
    """The metrics of a coordinator."""

    def __init__(self, last_health: Callable[[], HealthReport | None]) -> None:
        super().__init__(PREFIX, last_health)
        self._claims = Counter(f"{PREFIX}_settled_claims", "Claims settled on chain", registry=self.registry)
        self._gas = Counter(f"{PREFIX}_settlement_gas", "Gas used by settlements", registry=self.registry)
        self._fees = Counter(
            f"{PREFIX}_settlement_fee_wei", "Coins paid for the gas of settlements, in wei", registry=self.registry
        )

    def settled(self, claims: int, gas: int, fee: int) -> None:
        """Counts settled claims, their gas, and its price in wei."""
        self._claims.inc(claims)
        self._gas.inc(gas)
        self._fees.inc(fee)

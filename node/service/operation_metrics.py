"""Metrics of how a node runs, read when somebody asks: slots and queues, running jobs, the state's commits, gas."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from node.domain.gas_totals import GasTotals
from tallystick.runtime.server_metrics import COMMIT_BUCKETS, Times

PREFIX = "tallystick_node"
SLOT_STATES = ("taken", "of", "queue", "free")
"""Jobs at the engine, its slots, the places in its own queue, and the jobs that the node takes now."""


class OperationCollector(Collector):
    """See the module's docstring. `slots` returns the numbers of SLOT_STATES by engine, and `running` the running jobs."""

    def __init__(
        self, slots: Callable[[], Mapping[str, Mapping[str, int]]], running: Callable[[], int], gas: Callable[[], GasTotals]
    ) -> None:
        self._slots, self._running, self._gas = slots, running, gas
        self.commits = Times(COMMIT_BUCKETS)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Slots of each engine: taken, of all, in its own queue, and free for jobs now"
        slots = GaugeMetricFamily(f"{PREFIX}_slots", text, labels=["engine", "state"])
        for engine, counts in self._slots().items():
            for state in SLOT_STATES:
                slots.add_metric([engine, state], counts[state])
        yield slots
        yield GaugeMetricFamily(f"{PREFIX}_jobs_live", "Running jobs", self._running())
        text = "Seconds that a group of writes took to be durable"
        yield self.commits.metric(f"{PREFIX}_database_commit_seconds", text)
        gas = self._gas()
        text = "Transactions of this node's wallet: settlements that no coordinator sent in time, and payouts"
        yield CounterMetricFamily(f"{PREFIX}_transactions", text, gas.transactions)
        yield CounterMetricFamily(f"{PREFIX}_transaction_gas", "Gas used by transactions of this node's wallet", gas.gas)
        text = "Coins paid for the gas of this node's transactions, in wei"
        yield CounterMetricFamily(f"{PREFIX}_transaction_fee_wei", text, gas.fee)

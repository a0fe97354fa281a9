"""Makes what a node shows of itself: its metrics, and the monitor of its dependencies."""

from __future__ import annotations

import asyncio
import time

from node.domain.tabs import Tabs
from node.service.config import NodeConfig
from node.service.health_checks import watch
from node.service.metrics import NodeMetrics, count_gpus
from node.service.operation_metrics import OperationCollector
from node.service.status import StatusSources, slots
from node.storage.store import SqlStore
from tallystick.chain.chain_health import ChainHealth
from tallystick.runtime.health_monitor import HealthMonitor


def make_metrics(config: NodeConfig, tabs: Tabs, engine_suspected: asyncio.Event) -> NodeMetrics:
    """Makes the node's metrics."""
    return NodeMetrics(
        tabs.unsecured_by_payer,
        engine_suspected.set,
        gpus=config.gpus or count_gpus(),
        gpu_hour_cost=config.gpu_hour_cost,
        watts=config.watts,
        credit_summary=lambda: tabs.credit_summary(int(time.time())),
    )


def observe(node: StatusSources, store: SqlStore, chain: ChainHealth) -> HealthMonitor:
    """Adds to a node's metrics what is read of its parts. Returns the monitor of its dependencies."""
    monitor, metrics = watch(node, store, chain), node.metrics
    metrics.watch_health(lambda: monitor.last)
    metrics.watch_integrity(node.ratings.integrity)
    operation = OperationCollector(lambda: slots(node), lambda: node.runner.running, lambda: store.gas_totals)
    store.observe_commits(operation.commits.add)
    metrics.registry.register(operation)
    return monitor

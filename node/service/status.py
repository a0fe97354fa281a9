"""The node's status report: the JSON of /healthz and of `tally node status`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from node.chain.collector import Collector
from node.chain.escrow_view import EscrowView
from node.chain.payouts import Payouts
from node.chain.watcher import ChainWatcher
from node.coordinator.coordinator_links import CoordinatorLinks
from node.coordinator.ratings import Ratings
from node.coordinator.state_recovery import StateRecovery
from node.domain.published_asks import PublishedAsks
from node.domain.tabs import Tabs
from node.jobs.coordinator_credit import CoordinatorCredit
from node.jobs.runner import JobRunner
from node.service.config import NodeConfig
from node.service.engine_pool import EnginePool
from node.service.metrics import NodeMetrics
from tallystick.protocol.criteria import audience
from tallystick.protocol.health import HealthReport
from tallystick.runtime.health_monitor import HealthMonitor


class StatusSources(Protocol):
    """The parts of a running node that the status report reads, as `Node` in daemon.py has them."""

    @property
    def config(self) -> NodeConfig: ...
    @property
    def runner(self) -> JobRunner: ...
    @property
    def state_recovery(self) -> StateRecovery: ...
    @property
    def chain_watcher(self) -> ChainWatcher: ...
    @property
    def links(self) -> CoordinatorLinks: ...
    @property
    def metrics(self) -> NodeMetrics: ...
    @property
    def asks(self) -> PublishedAsks: ...
    @property
    def engine_pool(self) -> EnginePool: ...
    @property
    def chain(self) -> EscrowView: ...
    @property
    def tabs(self) -> Tabs: ...
    @property
    def payouts(self) -> Payouts: ...
    @property
    def config_problem(self) -> str: ...
    @property
    def settings_for_restart(self) -> Sequence[str]: ...
    @property
    def coordinator_credit(self) -> CoordinatorCredit: ...
    @property
    def health(self) -> HealthMonitor: ...
    @property
    def collector(self) -> Collector: ...
    @property
    def ratings(self) -> Ratings: ...


def health(node: StatusSources) -> dict[str, Any]:
    """Returns the JSON of /healthz. `ok`: the node is connected to a coordinator that it serves, and it has something to sell."""
    credit = node.tabs.credit_summary(int(time.time()))
    links, capacities = list(node.links), node.runner.capacities()
    sessions, connected, by_seed = [link.session for link in links], node.links.coordinators(), node.links.status()
    served = any(node.coordinator_credit.serves(session.endpoint) for session in sessions if session)
    problems = (node.state_recovery.problem, *(link.problem for link in links), *node.coordinator_credit.problems())
    engines = node.engine_pool.engines
    return {
        "ok": served and bool(node.asks.current) and not node.state_recovery.problem,
        "provider": node.asks.provider,
        "coordinator": connected[0] if connected else None,
        "coordinators": {seed: next(filter(None, accounts.values()), None) for seed, accounts in by_seed.items()},
        "replicas": {seed: accounts for seed, accounts in by_seed.items() if accounts.keys() - {seed}},
        "trouble": "; ".join(filter(None, problems)),
        "chain_reachable": node.chain.reachable,
        "models": sorted({offer.model for offer in node.asks.offers}),
        "engines": {name: "up" if engine.up else "down" for name, engine in engines.items()},
        "slots": slots(node),
        "running": node.runner.running,
        "free_slots": sum(capacity.free for capacity in capacities.values()),
        "tokens_per_second": max((capacity.tokens_per_second for capacity in capacities.values()), default=0),
        "first_token_ms": min(filter(None, (capacity.first_token_ms for capacity in capacities.values())), default=0),
        "unsecured": str(int(node.tabs.unsecured)),
        **{name: str(amount) for name, amount in credit.items()},
        "fees_bps": {coordinator: node.chain_watcher.rates.get(coordinator) for coordinator in connected},
        "max_fee_bps": node.config.admission.max_fee_bps,
        "coordinator_credit": node.coordinator_credit.status(),
        "payout": node.payouts.status(),
        "config_problem": node.config_problem,
        "settings_for_restart": list(node.settings_for_restart),
        "alarms": node.metrics.alarms,
        "checks": _checks(node.health.peek()),
    }


def slots(node: StatusSources) -> dict[str, dict[str, int]]:
    """By engine: the jobs that it runs, its slots, the places in its own queue, and the jobs that the node takes now."""
    capacities = node.runner.capacities()
    return {
        name: {"taken": engine.assigned, "of": engine.slots, "queue": engine.queue, "free": capacities[engine.number].free}
        for name, engine in node.engine_pool.engines.items()
    }


def _checks(report: HealthReport | None) -> dict[str, dict[str, str]]:
    """The state of each dependency, with what is wrong and what to do."""
    results = {} if report is None else report.results
    return {
        name: {"status": result.status.value, "output": result.output, "remedy": result.remedy}
        for name, result in results.items()
    }


def status(node: StatusSources) -> dict[str, Any]:
    """Returns the JSON that `tally node status` shows: the health report, the asks, and the totals since the start."""
    asks = [
        {
            "model": offer.model,
            "engine": offer.engine,
            "inputPrice": str(offer.prices.input),
            "outputPrice": str(offer.prices.output),
            "contextTokens": offer.context_tokens,
            "evidence": offer.evidence is not None,
            "audience": audience(ask.message),
        }
        for ask, offer in node.asks.listed
    ]
    return health(node) | {"asks": asks} | node.metrics.since_start()

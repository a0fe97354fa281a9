"""Routes for the operator: liveness, readiness and metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from coordinator.http.metrics import CoordinatorMetrics
from coordinator.jobs.market import Market
from tallystick.protocol.health import HEALTH_JSON, LIVENESS_PATH, READINESS_PATH, Health
from tallystick.protocol.wire import dumps
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.version import __version__

_READINESS: dict[int | str, dict[str, Any]] = {
    200: {"description": "All dependencies work, perhaps with warnings.", "content": {HEALTH_JSON: {}}},
    503: {"description": "A dependency fails; `checks` says which one and what to do.", "content": {HEALTH_JSON: {}}},
}
_LIVENESS = {Health.PASS: "ok", Health.WARN: "degraded", Health.FAIL: "failing"}


def add_operations_routes(
    api: FastAPI, market: Market, connected: Callable[[], int], monitor: HealthMonitor, metrics: CoordinatorMetrics
) -> None:
    """Adds liveness, readiness and metrics. `connected` returns the number of connected nodes."""
    gauges = {
        "tallystick_nodes_connected": ("Nodes connected.", connected),
        "tallystick_asks_listed": ("Asks in the ask book.", lambda: market.book.size),
        "tallystick_slots_free": ("Free slots of all engines.", lambda: market.book.free_slots),
        "tallystick_jobs_live": ("Jobs between order and terminal state.", lambda: market.live),
        "tallystick_jobs_waiting": ("Jobs that wait for a free slot.", lambda: market.waiting),
        "tallystick_in_flight_units": ("Caps of all jobs in flight, in base units.", lambda: int(market.exposure.in_flight)),
    }
    for name, (help_text, read) in gauges.items():
        metrics.gauge(name, help_text, read)
    metrics.watch_hedges(lambda: market.hedging.counts)
    metrics.watch_jobs(market.job_totals)
    metrics.watch_reports(lambda: market.audit_reports.counts)

    @api.get("/v1/health", include_in_schema=False)
    @api.get(LIVENESS_PATH)
    async def health() -> dict[str, Any]:
        """Returns that this process serves requests, and its numbers of connected nodes, asks and running jobs.

        `status` is "ok", or "degraded" or "failing" if a dependency is; `checks` has the state of each one. This route always
        answers 200, and is meant for liveness probes. `/readyz` says whether jobs can be served.
        """
        report = monitor.peek()
        counts = {"nodes": connected(), "asks": market.book.size, "jobs": market.live}
        if report is None:
            return {"status": "ok"} | counts
        return {"status": _LIVENESS[report.status]} | counts | {"checks": report.summary}

    @api.get("/v1/ready", include_in_schema=False)
    @api.get(READINESS_PATH, responses=_READINESS)
    async def ready() -> Response:
        """Returns the state of each dependency: database, disk, chain, age of its last block, contract, coins for gas.

        The format is the IETF draft's for health checks (application/health+json). A check has `output` (what is wrong) and
        `remedy` (what the operator does about it). The status is 200, or 503 if a dependency fails. Checks run at most every 5 s.
        """
        report = await monitor.report()
        body = dumps(report.to_json(__version__))
        return Response(body, report.http_status, {"cache-control": "max-age=5"}, HEALTH_JSON)

    @api.get("/metrics", include_in_schema=False)
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

"""What an operator can see: Prometheus metrics at /metrics and a summary at /healthz, on a local port."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.ports import JobReport
from tallystick.protocol.types import format_amount

log = structlog.get_logger()
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOTAL = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

Health = Callable[[], Mapping[str, Any]]
"""The state of the node; `ok` says whether it can earn right now."""


class Monitor:
    """Sees every job that ends (ports.Observer), and shows it."""

    def __init__(self, unsecured: Callable[[], int], suspect: Callable[[], None] = lambda: None) -> None:
        """`unsecured`: what payers could come to owe beyond their reservations, in base units. `suspect` is called when an engine
        failed a job.
        """
        self._suspect = suspect
        self.registry = CollectorRegistry()
        self._jobs = Counter("tally_node_jobs", "Jobs that ended", ["model", "outcome"], registry=self.registry)
        self._tokens = Counter("tally_node_tokens", "Tokens on receipts", ["model", "direction"], registry=self.registry)
        self._revenue = Counter("tally_node_revenue_units", "Cost of all receipts, base units", ["model"], registry=self.registry)
        self._first = Histogram(
            "tally_node_first_output_seconds", "Time to the first output", ["model"], registry=self.registry, buckets=_FIRST
        )
        self._total = Histogram(
            "tally_node_job_seconds", "Time of a whole job", ["model"], registry=self.registry, buckets=_TOTAL
        )
        gauge = Gauge("tally_node_unsecured_units", "Owed beyond reservations at worst, base units", registry=self.registry)
        gauge.set_function(unsecured)

    def ended(self, report: JobReport) -> None:
        """See ports.Observer."""
        outcome = report.outcome.name.lower() if report.outcome is not None else "no_receipt"
        self._jobs.labels(report.model, outcome).inc()
        self._tokens.labels(report.model, "input").inc(report.input_tokens)
        self._tokens.labels(report.model, "output").inc(report.output_tokens)
        self._revenue.labels(report.model).inc(int(report.cost))
        self._total.labels(report.model).observe(report.total_seconds)
        if report.first_seconds is not None:
            self._first.labels(report.model).observe(report.first_seconds)
        if report.engine_fault:
            self._suspect()
        log.info(
            "job ended",
            job=report.job.hex(),
            payer=report.payer,
            model=report.model,
            outcome=outcome,
            reason=report.reason,
            cost=format_amount(report.cost),
            tokens=[report.input_tokens, report.output_tokens],
            seconds=round(report.total_seconds, 3),
        )

    def app(self, health: Health) -> Starlette:
        """The ASGI app over what was seen, and over what `health` says."""

        async def metrics(_request: Request) -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        async def healthz(_request: Request) -> Response:
            said = dict(health())
            return JSONResponse(said, 200 if said.get("ok") else 503)

        return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz)])

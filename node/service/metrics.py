"""Prometheus metrics at /metrics, the node's state at /healthz, its dependencies at /readyz, all on a local port."""

from __future__ import annotations

import importlib
import time
from collections import Counter as PlainCounter
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.ports import DebtAlarm, JobReport
from node.service.job_totals import JobTotals
from tallystick.protocol.health import HEALTH_JSON, LIVENESS_PATH, READINESS_PATH, HealthReport
from tallystick.protocol.types import Address, Amount, format_amount
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.logs import log_frequent
from tallystick.runtime.server_metrics import HealthCollector
from tallystick.version import __version__

log = structlog.get_logger()
_HOUR = 3_600.0
_MAX_ALARMS, _MAX_PAYERS, _MAX_LAST_JOBS = 20, 100, 10

Status = Callable[[], Mapping[str, Any]]
"""Returns the state of the node; `ok` says whether it can earn now."""


class NodeMetrics:
    """Metrics of every job that ends (ports.Observer), and the alarms."""

    def __init__(
        self,
        unsecured_by_payer: Callable[[], Mapping[Address, int]],
        on_engine_fault: Callable[[], None] = lambda: None,
        *,
        gpus: int = 0,
        gpu_hour_cost: Amount | None = None,
        watts: int = 0,
        credit_summary: Callable[[], Mapping[str, int]] = dict,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unsecured_by_payer` returns what each payer could owe beyond its reservation, in base units. `on_engine_fault` is
        called when an engine failed a job. `gpus`: number of GPUs; `gpu_hour_cost`: cost of one GPU per hour, in base units;
        `watts`: the power behind the node, 0 if it is not known.
        `credit_summary` returns named credit totals of all payers, in base units.
        """
        self._on_engine_fault, self._gpus, self._watts, self._tick = on_engine_fault, gpus, watts, tick
        self._recent_revenue: deque[tuple[float, int]] = deque()
        self._started_at = tick()
        self._outcomes: PlainCounter[str] = PlainCounter()
        self._sums = {"inputTokens": 0, "outputTokens": 0, "revenue": 0}
        self._last_jobs: deque[dict[str, Any]] = deque(maxlen=_MAX_LAST_JOBS)
        self.alarms: list[dict[str, str]] = []
        self.registry = CollectorRegistry()
        self._jobs = JobTotals()
        self.registry.register(self._jobs)
        self._unpaid = Counter(
            "tallystick_node_unpaid_units",
            "Cost of jobs that the coordinator left unpaid, in base units",
            ["coordinator"],
            registry=self.registry,
        )
        self._alarms = Counter("tallystick_node_alarms", "Events that the operator should see", ["event"], registry=self.registry)
        self.registry.register(_CreditCollector(unsecured_by_payer, credit_summary))
        self._add_gpu_gauges(gpus, gpu_hour_cost)

    def watch_health(self, last: Callable[[], HealthReport | None]) -> None:
        """Adds the state of each dependency; `last` returns the latest report."""
        self.registry.register(HealthCollector("tallystick_node", last))

    def watch_integrity(self, read: Callable[[], Mapping[tuple[str, str], float]]) -> None:
        """Adds the integrity of each product; `read` returns percentages by model and precision class."""
        self.registry.register(_IntegrityCollector(read))

    def _add_gpu_gauges(self, gpus: int, gpu_hour_cost: Amount | None) -> None:
        if gpus:
            Gauge("tallystick_node_gpus", "Number of GPUs behind this node", registry=self.registry).set(gpus)
            hour = Gauge(
                "tallystick_node_revenue_per_gpu_hour_units",
                "Revenue per GPU in the last hour, in base units",
                registry=self.registry,
            )
            hour.set_function(self.revenue_per_gpu_hour)
        if self._watts:
            text = "Revenue per kWh in the last hour, in base units, had the node drawn its `watts` all the time"
            Gauge("tallystick_node_revenue_per_kwh_units", text, registry=self.registry).set_function(self.revenue_per_kwh)
        if gpu_hour_cost is not None:
            cost = Gauge("tallystick_node_gpu_hour_cost_units", "Cost of one GPU per hour, in base units", registry=self.registry)
            cost.set(int(gpu_hour_cost))

    def job_ended(self, report: JobReport) -> None:
        """See ports.Observer."""
        outcome = report.outcome.name.lower() if report.outcome is not None else "no_receipt"
        self._jobs.add(report, outcome)
        if report.written_off:
            self._unpaid.labels(report.endpoint).inc(int(report.written_off))
        self._add_revenue(int(report.cost))
        self._add_to_summary(report, outcome)
        if report.engine_fault:
            self._on_engine_fault()
        fields = {
            "job": report.job.hex(),
            "payer": report.payer,
            "model": report.model,
            "outcome": outcome,
            "reason": report.reason,
            "cost": format_amount(report.cost),
            "tokens": [report.input_tokens, report.output_tokens],
            "seconds": round(report.total_seconds, 3),
        }
        if report.trace_id:
            fields["trace_id"] = report.trace_id
        log_frequent("info", "job ended", fields)

    def _add_to_summary(self, report: JobReport, outcome: str) -> None:
        """Updates the totals and the last jobs of the status report."""
        self._outcomes[outcome] += 1
        self._sums["inputTokens"] += report.input_tokens
        self._sums["outputTokens"] += report.output_tokens
        self._sums["revenue"] += int(report.cost)
        self._last_jobs.appendleft(
            {
                "job": report.job.hex(),
                "model": report.model,
                "outcome": outcome,
                "cost": str(int(report.cost)),
                "tokens": [report.input_tokens, report.output_tokens],
                "firstMs": None if report.first_seconds is None else round(report.first_seconds * 1_000),
                "seconds": round(report.total_seconds, 3),
            }
        )

    def since_start(self) -> dict[str, Any]:
        """Returns the work of this process: jobs by outcome, tokens, revenue in base units, and its last jobs, newest first."""
        sums = {name: str(value) for name, value in self._sums.items()}
        hour = round(self.revenue_per_gpu_hour() * max(1, self._gpus))
        up = {"upSeconds": round(self._tick() - self._started_at), "revenueLastHour": str(hour)}
        if self._gpus:
            up["revenuePerGpuHour"] = str(round(self.revenue_per_gpu_hour()))
        if self._watts:
            up["revenuePerKwh"] = str(round(self.revenue_per_kwh()))
        return up | sums | {"jobs": dict(self._outcomes), "last": list(self._last_jobs)}

    def _add_revenue(self, cost: int) -> None:
        now = self._tick()
        if cost:
            self._recent_revenue.append((now, cost))
        while self._recent_revenue and self._recent_revenue[0][0] < now - _HOUR:
            self._recent_revenue.popleft()

    def revenue_per_gpu_hour(self) -> float:
        """Returns the revenue per GPU in the last hour, in base units; extrapolated if the process is younger."""
        self._add_revenue(0)
        uptime = min(_HOUR, max(1.0, self._tick() - self._started_at))
        return sum(cost for _, cost in self._recent_revenue) * (_HOUR / uptime) / max(1, self._gpus)

    def revenue_per_kwh(self) -> float:
        """Returns the revenue of the last hour per kWh that the node's `watts` draw in it, in base units."""
        return 1_000 * self.revenue_per_gpu_hour() * max(1, self._gpus) / self._watts

    def alarm(self, event: str, payer: Address, debt: DebtAlarm) -> None:
        """Logs, counts and reports an event that the operator should see."""
        self._alarms.labels(event).inc()
        due = format_amount(Amount(debt.due))
        alarm = {"what": event, "payer": payer, "due": due, "claim_by": str(debt.claim_by), "remedy": debt.remedy}
        self.alarms = [*self.alarms[1 - _MAX_ALARMS :], alarm]
        log.error("alarm", **alarm)

    def coordinator_suspended(self, endpoint: str, cost: Amount) -> None:
        """Raises the alarm that the coordinator at this address is suspended, because it left too much work unpaid."""
        event = "coordinator leaves work unpaid"
        self._alarms.labels(event).inc()
        alarm = {"what": event, "payer": endpoint, "due": format_amount(cost), "claim_by": ""}
        self.alarms = [*self.alarms[1 - _MAX_ALARMS :], alarm]
        log.error("alarm", what=event, coordinator=endpoint, unpaid=format_amount(cost))

    def app(self, status: Status, health: HealthMonitor, pages: Sequence[Route] = ()) -> Starlette:
        """Returns the ASGI app that serves the metrics, the `status`, the state of each dependency, and `pages`."""

        async def metrics(_request: Request) -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        async def healthz(_request: Request) -> Response:
            return JSONResponse(dict(status()))

        async def readyz(_request: Request) -> Response:
            report = await health.report()
            return JSONResponse(report.to_json(__version__), report.http_status, media_type=HEALTH_JSON)

        routes = {"/metrics": metrics, LIVENESS_PATH: healthz, READINESS_PATH: readyz}
        return Starlette(routes=[*(Route(path, serve) for path, serve in routes.items()), *pages])


class _IntegrityCollector(Collector):
    """How coordinators rate what this node sells, by audits."""

    def __init__(self, read: Callable[[], Mapping[tuple[str, str], float]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Integrity by audits, in percent, as the strictest coordinator counts it; models without audits have none"
        integrity = GaugeMetricFamily("tallystick_node_integrity_percent", text, labels=["model", "precision"])
        for product, percent in sorted(self._read().items()):
            integrity.add_metric(product, percent)
        yield integrity


class _CreditCollector(Collector):
    """Credit metrics, computed when they are read: unsecured debt in total and of the payers that owe most, and the credit
    totals.
    """

    def __init__(
        self, unsecured_by_payer: Callable[[], Mapping[Address, int]], credit_summary: Callable[[], Mapping[str, int]]
    ) -> None:
        self._unsecured_by_payer, self._credit_summary = unsecured_by_payer, credit_summary

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        unsecured = self._unsecured_by_payer()
        total = GaugeMetricFamily("tallystick_node_unsecured_units", "Largest possible debt beyond reservations, in base units")
        total.add_metric([], sum(unsecured.values()))
        yield total
        by_payer = GaugeMetricFamily(
            "tallystick_node_payer_unsecured_units",
            "Largest possible debt beyond the reservation, by payer, in base units",
            labels=["payer"],
        )
        for payer, owed in sorted(unsecured.items(), key=lambda entry: -entry[1])[:_MAX_PAYERS]:
            by_payer.add_metric([payer], owed)
        yield by_payer
        for name, amount in self._credit_summary().items():
            yield GaugeMetricFamily(
                f"tallystick_node_{name}_units", f"Credit: {name.replace('_', ' ')}, in base units", value=amount
            )


def count_gpus() -> int:
    """Returns the number of NVIDIA GPUs; 0 if there are none or NVML is missing (pip install nvidia-ml-py)."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetCount())
    except Exception:  # noqa: BLE001 - a broken driver must not stop the node
        return 0

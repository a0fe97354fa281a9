"""What an operator can see: Prometheus metrics at /metrics and a summary at /healthz, on a local port."""

from __future__ import annotations

import importlib
import time
from collections import Counter as PlainCounter
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from node.ports import DebtAlarm, JobReport
from tallystick.protocol.types import Address, Amount, format_amount

log = structlog.get_logger()
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOTAL = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_HOUR = 3_600.0
_ALARMS, _PAYERS, _LAST = 20, 100, 10

Health = Callable[[], Mapping[str, Any]]
"""The state of the node; `ok` says whether it can earn right now."""


class NodeMetrics:
    """Sees every job that ends (ports.Observer), and shows it."""

    def __init__(
        self,
        unsecured_by_payer: Callable[[], Mapping[Address, int]],
        on_engine_fault: Callable[[], None] = lambda: None,
        *,
        gpus: int = 0,
        gpu_hour_cost: Amount | None = None,
        credit_summary: Callable[[], Mapping[str, int]] = dict,
        tick: Callable[[], float] = time.monotonic,
    ) -> None:
        """`exposed`: what each payer could come to owe beyond its reservation, in base units. `suspect` is called when an engine
        failed a job. `gpus`: how many earn it; `gpu_hour_cost`: what one costs an hour, in base units. `trust`: sums over all
        payers in base units, by what they are of.
        """
        self._on_engine_fault, self._gpus, self._tick = on_engine_fault, gpus, tick
        self._recent_revenue: deque[tuple[float, int]] = deque()
        self._started_at = tick()
        self._outcomes: PlainCounter[str] = PlainCounter()
        self._sums = {"inputTokens": 0, "outputTokens": 0, "revenue": 0}
        self._last_jobs: deque[dict[str, Any]] = deque(maxlen=_LAST)
        self.alarms: list[dict[str, str]] = []
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
        self._per_token = Histogram(
            "tally_node_token_seconds",
            "Time of one output token after the first",
            ["model"],
            registry=self.registry,
            buckets=_TOKEN,
        )
        self._unpaid = Counter(
            "tally_node_written_off_units",
            "What jobs would have cost that their coordinator left unpaid, base units",
            ["coordinator"],
            registry=self.registry,
        )
        self._alarms = Counter("tally_node_alarms", "What a person should see", ["what"], registry=self.registry)
        self.registry.register(_CreditCollector(unsecured_by_payer, credit_summary))
        if gpus:
            Gauge("tally_node_gpus", "GPUs that earn this", registry=self.registry).set(gpus)
            hour = Gauge(
                "tally_node_revenue_per_gpu_hour_units", "Revenue of the last hour a GPU, base units", registry=self.registry
            )
            hour.set_function(self.revenue_per_gpu_hour)
        if gpu_hour_cost is not None:
            cost = Gauge("tally_node_gpu_hour_cost_units", "What a GPU costs an hour, base units", registry=self.registry)
            cost.set(int(gpu_hour_cost))

    def job_ended(self, report: JobReport) -> None:
        """See ports.Observer."""
        outcome = report.outcome.name.lower() if report.outcome is not None else "no_receipt"
        self._jobs.labels(report.model, outcome).inc()
        self._tokens.labels(report.model, "input").inc(report.input_tokens)
        self._tokens.labels(report.model, "output").inc(report.output_tokens)
        self._revenue.labels(report.model).inc(int(report.cost))
        if report.written_off:
            self._unpaid.labels(report.endpoint).inc(int(report.written_off))
        self._total.labels(report.model).observe(report.total_seconds)
        if report.first_seconds is not None:
            self._first.labels(report.model).observe(report.first_seconds)
            if report.output_tokens > 1:
                each = (report.total_seconds - report.first_seconds) / (report.output_tokens - 1)
                self._per_token.labels(report.model).observe(each)
        self._add_revenue(int(report.cost))
        self._add_to_summary(report, outcome)
        if report.engine_fault:
            self._on_engine_fault()
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

    def _add_to_summary(self, report: JobReport, outcome: str) -> None:
        """For people who look now and then."""
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
        """What this process has done: jobs by outcome, tokens, revenue in base units, its last jobs, newest first."""
        sums = {name: str(value) for name, value in self._sums.items()}
        hour = round(self.revenue_per_gpu_hour() * max(1, self._gpus))
        up = {"upSeconds": round(self._tick() - self._started_at), "revenueLastHour": str(hour)}
        return up | sums | {"jobs": dict(self._outcomes), "last": list(self._last_jobs)}

    def _add_revenue(self, cost: int) -> None:
        now = self._tick()
        if cost:
            self._recent_revenue.append((now, cost))
        while self._recent_revenue and self._recent_revenue[0][0] < now - _HOUR:
            self._recent_revenue.popleft()

    def revenue_per_gpu_hour(self) -> float:
        """What a GPU brought in the last hour, in base units; of a shorter life, what it would come to."""
        self._add_revenue(0)
        lived = min(_HOUR, max(1.0, self._tick() - self._started_at))
        return sum(cost for _, cost in self._recent_revenue) * (_HOUR / lived) / max(1, self._gpus)

    def alarm(self, what: str, payer: Address, debt: DebtAlarm) -> None:
        """Something that the provider should see: it is logged, counted, and told at /healthz."""
        self._alarms.labels(what).inc()
        due = format_amount(Amount(debt.due))
        told = {"what": what, "payer": payer, "due": due, "claim_by": str(debt.claim_by), "remedy": debt.remedy}
        self.alarms = [*self.alarms[1 - _ALARMS :], told]
        log.error("alarm", **told)

    def coordinator_suspended(self, endpoint: str, cost: Amount) -> None:
        """The coordinator at this address left too much of this node's work unpaid, and is served no more for now."""
        what = "coordinator leaves work unpaid"
        self._alarms.labels(what).inc()
        told = {"what": what, "payer": endpoint, "due": format_amount(cost), "claim_by": ""}
        self.alarms = [*self.alarms[1 - _ALARMS :], told]
        log.error("alarm", what=what, coordinator=endpoint, written_off=format_amount(cost))

    def app(self, health: Health) -> Starlette:
        """The ASGI app over what was seen, and over what `health` says."""

        async def metrics(_request: Request) -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        async def healthz(_request: Request) -> Response:
            said = dict(health())
            return JSONResponse(said, 200 if said.get("ok") else 503)

        return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz)])


class _CreditCollector(Collector):
    """What payers could come to owe beyond their reservations: the largest each, and all of them, and other sums of trust, asked
    when it is read.
    """

    def __init__(self, exposed: Callable[[], Mapping[Address, int]], trust: Callable[[], Mapping[str, int]]) -> None:
        self._exposed, self._trust = exposed, trust

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        found = self._exposed()
        total = GaugeMetricFamily("tally_node_unsecured_units", "Owed beyond reservations at worst, base units")
        total.add_metric([], sum(found.values()))
        yield total
        each = GaugeMetricFamily("tally_node_payer_unsecured_units", "The same, of the payers that owe most", labels=["payer"])
        for payer, owed in sorted(found.items(), key=lambda one: -one[1])[:_PAYERS]:
            each.add_metric([payer], owed)
        yield each
        for name, amount in self._trust().items():
            yield GaugeMetricFamily(f"tally_node_{name}_units", f"Trust: {name.replace('_', ' ')}, base units", value=amount)


def count_gpus() -> int:
    """How many NVIDIA GPUs there are; 0 where there are none, or without NVML (pip install nvidia-ml-py)."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return int(nvml.nvmlDeviceGetCount())
    except Exception:  # noqa: BLE001 - whatever is wrong with a driver, it is not this node's job
        return 0

"""The gateway's routes for its operator: what this is, health, readiness, metrics. Callers without a key learn only its state."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from tallystick.client.audits.audit_health import check_audits
from tallystick.client.audits.auditor import OUTCOMES
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.gateway.auth import ANONYMOUS
from tallystick.client.gateway.key_shares import KeyShareCollector, KeyShares
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market, audit_counts, audits_of, maintenance_of
from tallystick.protocol.errors import Fault, TallyError
from tallystick.protocol.health import HEALTH_JSON, LIVENESS_PATH, READINESS_PATH, CheckResult, Health
from tallystick.protocol.routes import JSON
from tallystick.protocol.types import Amount, format_amount
from tallystick.protocol.wire import dumps
from tallystick.runtime.access_log import Access
from tallystick.runtime.disk_space import check_disk
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.peer_probe import probe_peer
from tallystick.runtime.server_metrics import ServerMetrics
from tallystick.tracing.metrics import SpanCollector
from tallystick.version import __version__
from tallystick.web.rendering import HEADERS
from tallystick.web.static_files import versioned

PREFIX = "tallystick_gateway"
BUDGET_METRIC = f"{PREFIX}_budget_used_ratio"
BUDGET_HEADER = f"# HELP {BUDGET_METRIC} Part of a budget that is spent or reserved today\n# TYPE {BUDGET_METRIC} gauge"
ABOUT = "This is a Tallystick gateway: OpenAI's and Anthropic's API, answered by the providers of a market."
CONNECT_SECONDS, REQUEST_SECONDS = 3.0, 5.0
_LIVENESS = {Health.PASS: "ok", Health.WARN: "degraded", Health.FAIL: "failing"}


class Operations:
    """Health, metrics and the routes that show them, for one market, which must be open when they are used."""

    def __init__(self, market: Market) -> None:
        self._market = market
        remedies = {
            "ledger": "check `ledger_file` and the disk's free space",
            "disk": "check the folder of `ledger_file`",
            "coordinator": "check `coordinator`, or ask its operator",
            "audits": "check the folder of `ledger_file`",
            "purse": "check `rpc` and the chain's endpoint",
        }
        checks = {
            "ledger": self._check_ledger,
            "disk": self._check_disk,
            "coordinator": self._check_coordinator,
            "peer": self._check_peer,
            "audits": self._check_audits,
            "purse": self._check_purse,
        }
        self.health = HealthMonitor(checks, remedies)
        self.metrics = ServerMetrics(PREFIX, lambda: self.health.last)
        self.metrics.gauge(f"{PREFIX}_jobs_live", "Running jobs", lambda: market.running)
        self.metrics.registry.register(_AuditCollector(market))
        self._attempts = _AttemptCollector()
        self.metrics.registry.register(self._attempts)

    def watch_batches(self, count_open: Callable[[], float], count_running: Callable[[], float]) -> None:
        """Adds the metrics of batches: how many run, and how many of their requests do."""
        self.metrics.gauge(f"{PREFIX}_batches_open", "Batches that run", count_open)
        self.metrics.gauge(f"{PREFIX}_batch_requests_live", "Running requests of batches", count_running)

    def watch_keys(self, shares: KeyShares) -> None:
        """Adds the metrics of what each API key runs and waits for."""
        self.metrics.registry.register(KeyShareCollector(PREFIX, shares))

    def watch_traces(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Adds the counts of spans by outcome; `read` returns them."""
        self.metrics.registry.register(SpanCollector(PREFIX, read))

    async def run(self) -> None:
        """Watches the dependencies and the ledger's transactions until cancelled."""
        self._maintenance.ledger.observe_commits(self.metrics.committed)
        try:
            await self.health.run()
        finally:
            await self.health.close()

    @property
    def _maintenance(self) -> Maintenance:
        return maintenance_of(self._market)

    async def _check_ledger(self) -> dict[str, CheckResult]:
        return {"ledger": CheckResult(Health.PASS, value=round(1_000 * await self._maintenance.ledger.ping(), 1), unit="ms")}

    async def _check_disk(self) -> dict[str, CheckResult]:
        return {"disk": await check_disk(self._market.config.ledger_path(self._market.address))}

    async def _check_peer(self) -> dict[str, CheckResult]:
        """The states of `clock` and `certificate`, as far as the coordinator's answer tells them."""
        return (await probe_peer(self._market.config.coordinator)).checks()

    async def _check_coordinator(self) -> dict[str, CheckResult]:
        urls = self._market.coordinator_urls
        config = ClientConfig(connect_seconds=CONNECT_SECONDS, request_seconds=REQUEST_SECONDS, coordinator_urls=urls)
        async with CoordinatorClient(self._market.config.coordinator, config) as coordinator:
            await coordinator.info()
        return {"coordinator": CheckResult(Health.PASS)}

    async def _check_audits(self) -> dict[str, CheckResult]:
        """Nothing if audits are off. A file that cannot be read is a warning: jobs need none."""
        config = self._market.config
        if not config.audits.enabled:
            return {}
        if not config.audits_path(self._market.address).exists():  # nothing was audited yet
            return {"audits": CheckResult(Health.PASS, value=0, unit="audits")}
        try:
            return {"audits": await check_audits(await audits_of(self._market).auditor.store(), int(time.time()))}
        except TallyError:
            text, remedy = "the file of audits cannot be read", "check the folder of `ledger_file`"
            return {"audits": CheckResult(Health.WARN, text, remedy)}

    async def _check_purse(self) -> dict[str, CheckResult]:
        """A purse without free money still pays with reservations, so that is no failure; nor is a chain that does not answer."""
        onchain = self._maintenance.onchain
        if onchain is None:  # no deployment file, or no RPC address that may be used
            return {}
        try:
            purse = await onchain.purse()
        except TallyError:
            return {"purse": CheckResult(Health.WARN, "the chain does not answer", "check `rpc` and the chain's endpoint")}
        free = Amount(max(0, purse.free - purse.thawing))
        if not free:
            return {"purse": CheckResult(Health.WARN, "the purse has no free money", "tally deposit AMOUNT", "0", "dollars")}
        return {"purse": CheckResult(Health.PASS, value=format_amount(free), unit="dollars")}

    def observe(self, access: Access) -> None:
        """Counts an answered request, if it was for a job."""
        if access.method == "POST" and access.fields:
            self.metrics.job_ended(access.outcome, access.seconds, access.first_seconds, access.sent_bytes)
            self._attempts.add(access.fields)

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/", self._show_root),
            *(Route(path, self._show_health) for path in (LIVENESS_PATH, "/health")),
            *(Route(path, self._show_readiness) for path in (READINESS_PATH, "/ready")),
            Route("/metrics", self._show_metrics),
        ]

    async def _show_root(self, request: Request) -> Response:
        """What this is, for browsers as a page. The links are relative, so that they work behind a proxy."""
        url, known = str(request.base_url), not request.scope.get(ANONYMOUS)
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_page(url, known=bool(known)), headers=dict(HEADERS))
        if not known:
            return _json({"message": ABOUT})
        clients = {"OPENAI_BASE_URL": f"{url}v1", "ANTHROPIC_BASE_URL": url.rstrip("/")}
        links = {"models": f"{url}v1/models", "ready": f"{url}readyz", "metrics": f"{url}metrics"}
        return _json({"message": ABOUT, "version": __version__, **links, "clients": clients})

    async def _show_health(self, request: Request) -> Response:
        """Whether this process serves requests; always 200."""
        report = self.health.peek()
        state = {"status": "ok" if report is None else _LIVENESS[report.status]}
        if request.scope.get(ANONYMOUS):
            return _json(state)
        market = self._market
        checks: dict[str, Any] = {} if report is None else {"checks": report.summary}
        about = {"payer": market.address, "coordinator": market.config.coordinator, "jobs": market.running}
        return _json(state | about | checks)

    async def _show_readiness(self, request: Request) -> Response:
        """The state of each dependency: 200, or 503 if one fails."""
        report = await self.health.report()
        body = {"status": report.status.value} if request.scope.get(ANONYMOUS) else report.to_json(__version__)
        return Response(dumps(body), report.http_status, {"cache-control": "max-age=5"}, HEALTH_JSON)

    async def _show_metrics(self, _request: Request) -> Response:
        text = generate_latest(self.metrics.registry) + await self._budget_metrics()
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _budget_metrics(self) -> bytes:
        """The use of each budget today, which is read from the ledger."""
        lines = [BUDGET_HEADER]
        for budget in self._market.config.budgets:
            status = await self._maintenance.ledger.budget_status(budget, int(time.time()))
            label = budget.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f'{BUDGET_METRIC}{{budget="{label}"}} {status.percent / 100}')
        return ("\n".join(lines) + "\n").encode()


def _json(document: object) -> Response:
    return Response(dumps(document), media_type=JSON)


def _page(url: str, *, known: bool) -> str:
    links = (
        '<ul><li><a href="tally/spending">what was spent</a><li><a href="tally/money">where the money is</a>'
        '<li><a href="tally/jobs">jobs</a><li><a href="tally/wallet">a wallet of this browser</a>'
        '<li><a href="tally/receipt">check a receipt</a><li><a href="tally/chat">a chat</a>'
        '<li><a href="v1/models">models on offer</a><li><a href="readyz">state of its dependencies</a>'
        '<li><a href="metrics">metrics</a></ul>'
        f"<p>Base URL for OpenAI's clients: <code>{escape(url)}v1</code>, "
        f"for Anthropic's: <code>{escape(url.rstrip('/'))}</code></p>"
    )
    begin = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Tallystick gateway</title>'
        f'<link rel="stylesheet" href="static/{versioned("site.css")}"><link rel="icon" href="data:,">'
        "<main><h1>Tallystick gateway</h1>"
    )
    return f"{begin}<p>{escape(ABOUT)}</p>{links if known else ''}</main>"


class _AttemptCollector(Collector):
    """Failed jobs by the party at fault, and the further models that requests were sent to."""

    def __init__(self) -> None:
        self._faults: Counter[str] = Counter()
        self._retries = 0

    def add(self, fields: Mapping[str, object]) -> None:
        """Counts what the line of an answered request says."""
        if fault := fields.get("fault"):
            self._faults[str(fault)] += 1
        retries = fields.get("retries", 0)
        self._retries += retries if isinstance(retries, int) else 0

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        failures = CounterMetricFamily(f"{PREFIX}_failed_jobs", "Jobs that failed, by the party at fault", labels=["fault"])
        for fault in Fault:
            failures.add_metric([fault.value], self._faults[fault.value])
        yield failures
        text = "Further models that requests were sent to, after one failed or its answer was not accepted"
        yield CounterMetricFamily(f"{PREFIX}_retries", text, self._retries)


class _AuditCollector(Collector):
    """Audits of providers that this gateway ended."""

    def __init__(self, market: Market) -> None:
        self._market = market

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        counts = audit_counts(self._market)
        text = "Audits of providers that ended, by outcome; failed: for want of a referee, or by an error"
        audits = CounterMetricFamily(f"{PREFIX}_audits", text, labels=["outcome"])
        for outcome in OUTCOMES:
            audits.add_metric([outcome], counts.get(outcome, 0))
        yield audits

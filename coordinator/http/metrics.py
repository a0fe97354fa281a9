"""Prometheus metrics of the coordinator beside those that it shares with the gateway: what its settlements cost, and how jobs
waited, failed over and were hedged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import Counter, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from coordinator.http.replica_view import NOTICE_FAULTS, ReplicaView
from coordinator.jobs.audit_reports import REFUSED, SOURCES
from coordinator.jobs.hedging import RESULTS
from coordinator.jobs.job_totals import JobTotals
from tallystick.protocol.audit_reports import AuditVerdict
from tallystick.protocol.errors import Fault
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

    def watch_hedges(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Adds the counts of hedged jobs, by result; `read` returns them."""
        self.registry.register(_HedgeCollector(read))

    def watch_jobs(self, totals: JobTotals) -> None:
        """Adds what the market counts of ended jobs."""
        self.registry.register(_JobCollector(totals))

    def watch_writes(self, queued: Callable[[], int]) -> None:
        """Adds the number of writes that wait for a transaction."""
        self.gauge(f"{PREFIX}_database_queue", "Writes that wait for a transaction", queued)

    def watch_reports(self, read: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        """Adds the counts of reports of audits; `read` returns them, see `AuditReports.counts`."""
        self.registry.register(_ReportCollector(read))

    def watch_replicas(self, replicas: ReplicaView) -> None:
        """Adds the number of replicas, the state of the bus between them, and the notices that were dropped."""
        count, text = "tallystick_coordinator_replicas", "Replicas that clients may use; 0 for a lone coordinator"
        self.gauge(count, text, lambda: len(replicas.listed))
        bus, text = "tallystick_coordinator_bus_connected", "Whether this replica is connected to NATS"
        self.gauge(bus, text, lambda: replicas.bus_connected)
        trip, text = "tallystick_coordinator_bus_round_trip_seconds", "Time of the last round trip to NATS; 0 without an answer"
        self.gauge(trip, text, lambda: replicas.bus_seconds or 0.0)
        self.registry.register(_NoticeCollector(replicas))

    def settled(self, claims: int, gas: int, fee: int) -> None:
        """Counts settled claims, their gas, and its price in wei."""
        self._claims.inc(claims)
        self._gas.inc(gas)
        self._fees.inc(fee)


class _HedgeCollector(Collector):
    """What became of jobs whose first output was late, as the market counts it."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Jobs given to a second provider (started), won by it (won), or not given to one, by the reason"
        hedges = CounterMetricFamily(f"{PREFIX}_hedges", text, labels=["result"])
        counts = self._read()
        for result in RESULTS:
            hedges.add_metric([result], counts.get(result, 0))
        yield hedges


class _JobCollector(Collector):
    """Waits, failovers, chunks and failures of ended jobs."""

    def __init__(self, totals: JobTotals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        totals = self._totals
        yield totals.waits.metric(f"{PREFIX}_queue_wait_seconds", "Seconds from a job's order to its first dispatch")
        text = "Attempts that began after another provider had failed"
        yield CounterMetricFamily(f"{PREFIX}_failovers", text, totals.failovers)
        yield CounterMetricFamily(f"{PREFIX}_chunks", "Chunks of answers that were relayed", totals.chunks)
        text = "Jobs that failed, by the party at fault"
        failures = CounterMetricFamily(f"{PREFIX}_failed_jobs", text, labels=["fault"])
        for fault in Fault:
            failures.add_metric([fault.value], totals.failures[fault.value])
        yield failures


class _ReportCollector(Collector):
    """Reports of audits, as the market counts them."""

    def __init__(self, read: Callable[[], Mapping[tuple[str, str], int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Reports of audits that were logged, by their verdict and by who audited: a payer, or a probe of this coordinator"
        logged, counts = CounterMetricFamily(f"{PREFIX}_audit_reports", text, labels=["verdict", "source"]), self._read()
        for verdict in AuditVerdict:
            for source in SOURCES:
                logged.add_metric([verdict.name.lower(), source], counts.get((verdict.name.lower(), source), 0))
        yield logged
        text = "Reports of audits that were refused: malformed, replayed, or of a job that was not paid here"
        yield CounterMetricFamily(f"{PREFIX}_audit_reports_refused", text, counts.get(REFUSED, 0))


class _NoticeCollector(Collector):
    """Notices between replicas that were dropped."""

    def __init__(self, replicas: ReplicaView) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        text = "Notices between replicas that were dropped, by the reason"
        dropped = CounterMetricFamily("tallystick_coordinator_notices_dropped", text, labels=["reason"])
        counts = self._replicas.dropped
        for reason in NOTICE_FAULTS:
            dropped.add_metric([reason], counts.get(reason, 0))
        yield dropped

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest

from node.ports import JobReport
from node.service.job_totals import JobTotals
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tests.node.harness import PAYER
from tests.node.service.test_metrics import JOB


def report(model: str = "m", *, first: float | None = None, total: float = 0.0, output: int = 0) -> JobReport:
    """The report of a job."""
    return JobReport(
        job=JOB,
        payer=PAYER.address,
        model=model,
        outcome=Outcome.COMPLETED,
        reason="",
        cost=Amount(3),
        input_tokens=2,
        output_tokens=output,
        first_seconds=first,
        total_seconds=total,
    )


def scraped(totals: JobTotals) -> list[str]:
    """The lines that Prometheus reads."""
    registry = CollectorRegistry()
    registry.register(totals)
    return generate_latest(registry).decode().splitlines()


def test_histograms_are_those_of_prometheus() -> None:
    """A bucket includes its bound, and the last one has all jobs: the lines are those of prometheus_client's own histogram."""
    totals, registry = JobTotals(), CollectorRegistry()
    bounds = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
    name = "tallystick_node_job_seconds"
    usual = Histogram(name, "Seconds from admission to the end of the job", ["model"], registry=registry, buckets=bounds)
    for seconds in (0.0, 0.1, 0.11, 2.5, 2.500001, 600, 601, 10_000):
        totals.add(report(total=seconds), "completed")
        usual.labels("m").observe(seconds)
    expected = [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]
    assert [line for line in scraped(totals) if name in line] == expected


def test_sums_of_each_model() -> None:
    """Models count apart. Time per token needs a first output and a second token."""
    totals = JobTotals()
    totals.add(report(first=1.0, total=3.0, output=5), "completed")
    totals.add(report(first=1.0, total=3.0, output=1), "length")
    totals.add(report(total=3.0, output=5), "completed")
    totals.add(report("other"), "no_receipt")
    lines = scraped(totals)
    for line in (
        'tallystick_node_jobs_total{model="m",outcome="completed"} 2.0',
        'tallystick_node_jobs_total{model="m",outcome="length"} 1.0',
        'tallystick_node_jobs_total{model="other",outcome="no_receipt"} 1.0',
        'tallystick_node_tokens_total{direction="input",model="m"} 6.0',
        'tallystick_node_tokens_total{direction="output",model="m"} 11.0',
        'tallystick_node_revenue_units_total{model="m"} 9.0',
        'tallystick_node_first_output_seconds_count{model="m"} 2.0',
        'tallystick_node_first_output_seconds_bucket{le="0.5",model="m"} 0.0',
        'tallystick_node_first_output_seconds_bucket{le="1.0",model="m"} 2.0',
        'tallystick_node_token_seconds_count{model="m"} 1.0',
        'tallystick_node_token_seconds_sum{model="m"} 0.5',
        'tallystick_node_token_seconds_count{model="other"} 0.0',
    ):
        assert line in lines


def test_no_job_yet() -> None:
    """The metrics are there before the first job."""
    assert "# TYPE tallystick_node_jobs_total counter" in scraped(JobTotals())

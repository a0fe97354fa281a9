from __future__ import annotations

from typing import Any

import aiohttp

from node.ports import DebtAlarm, JobReport
from node.service.metrics import NodeMetrics, count_gpus
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.runtime.health_monitor import HealthMonitor
from tallystick.runtime.serving import serving
from tests.node.harness import PAYER, Client, make_asks, signer

STRANGER = signer("stranger").address
JOB = Client().order(make_asks().current[0]).job


async def test_metrics_and_health() -> None:
    """/metrics counts jobs by outcome, tokens and revenue; /healthz always answers 200, /readyz 503 if a dependency fails."""
    suspected: list[bool] = []
    clock = 0.0
    owed = {PAYER.address: 40, STRANGER: 2}
    suspect = lambda: suspected.append(True)  # noqa: E731
    trust = {"written_off": 7, "newcomers_today": 9}
    metrics = NodeMetrics(
        lambda: owed,
        suspect,
        gpus=2,
        gpu_hour_cost=Amount(900_000),
        watts=450,
        credit_summary=lambda: trust,
        tick=lambda: clock,
    )
    metrics.job_ended(
        JobReport(
            job=JOB,
            payer=PAYER.address,
            model="m",
            outcome=Outcome.COMPLETED,
            reason="the answer ended",
            cost=Amount(70),
            input_tokens=10,
            output_tokens=20,
            first_seconds=0.2,
            total_seconds=1.0,
        )
    )
    metrics.job_ended(
        JobReport(job=JOB, payer=PAYER.address, model="m", outcome=None, reason="engine down", engine_fault=True, fault="engine")
    )
    assert suspected == [True]
    state: dict[str, Any] = {"ok": True}
    results = {"disk": CheckResult(Health.PASS, value=9), "engines": CheckResult(Health.PASS)}

    async def check() -> dict[str, CheckResult]:
        return results

    monitor = HealthMonitor({"all": check}, clock=lambda: clock)
    metrics.watch_health(lambda: monitor.last)
    async with serving(metrics.app(lambda: state, monitor), "127.0.0.1", 0) as port, aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
        for line in (
            'tallystick_node_jobs_total{model="m",outcome="completed"} 1.0',
            'tallystick_node_jobs_total{model="m",outcome="no_receipt"} 1.0',
            'tallystick_node_tokens_total{direction="output",model="m"} 20.0',
            'tallystick_node_revenue_units_total{model="m"} 70.0',
            'tallystick_node_first_output_seconds_count{model="m"} 1.0',
            'tallystick_node_failed_jobs_total{fault="engine"} 1.0',
            'tallystick_node_failed_jobs_total{fault="provider"} 0.0',
            "tallystick_node_unsecured_units 42.0",
            "tallystick_node_written_off_units 7.0",
            "tallystick_node_newcomers_today_units 9.0",
            f'tallystick_node_payer_unsecured_units{{payer="{PAYER.address}"}} 40.0',
            'tallystick_node_token_seconds_count{model="m"} 1.0',
            "tallystick_node_gpus 2.0",
            "tallystick_node_revenue_per_kwh_units ",
            "tallystick_node_gpu_hour_cost_units 900000.0",
        ):
            assert line in text
        for ok, failing, status in ((True, Health.WARN, 200), (False, Health.FAIL, 503)):
            state["ok"], results["engines"], clock = ok, CheckResult(failing, "no answer", "start it"), clock + 60
            async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
                assert (response.status, await response.json()) == (200, {"ok": ok})
            async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
                assert (response.status, response.content_type) == (status, "application/health+json")
                report = await response.json(content_type=None)
            assert report["status"] == failing.value
            (entry,) = report["checks"]["engines"]
            assert (entry["output"], entry["remedy"]) == ("no answer", "start it")
        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
            assert 'tallystick_node_dependency_state{dependency="engines"} 0.0' in await response.text()


def test_revenue_of_an_hour() -> None:
    """Revenue per GPU is that of the last hour; for a younger process it is extrapolated."""
    clock = 0.0
    metrics = NodeMetrics(dict, gpus=2, tick=lambda: clock)
    clock = 360.0
    metrics.job_ended(JobReport(job=JOB, payer=PAYER.address, model="m", outcome=Outcome.COMPLETED, reason="", cost=Amount(100)))
    assert metrics.revenue_per_gpu_hour() == 500
    clock = 3_600.0
    assert metrics.revenue_per_gpu_hour() == 50
    clock = 4_000.0
    assert metrics.revenue_per_gpu_hour() == 0


def test_alarms() -> None:
    """Alarms are counted, and the latest are reported at /healthz."""
    metrics = NodeMetrics(dict)
    for number in range(30):
        metrics.alarm(f"trouble {number}", PAYER.address, DebtAlarm(400, 0))
    assert [alarm["what"] for alarm in metrics.alarms] == [f"trouble {number}" for number in range(10, 30)]
    assert metrics.alarms[0]["due"] == "0.0004"


def test_revenue_per_kwh() -> None:
    """An hour at 500 W is half a kWh. Without `watts` and GPUs nothing is said of either."""
    clock = 0.0
    metrics = NodeMetrics(dict, gpus=2, watts=500, tick=lambda: clock)
    clock = 3_600.0
    metrics.job_ended(JobReport(job=JOB, payer=STRANGER, model="m", outcome=Outcome.COMPLETED, reason="", cost=Amount(800_000)))
    assert metrics.revenue_per_kwh() == 1_600_000
    shown = metrics.since_start()
    assert (shown["revenueLastHour"], shown["revenuePerGpuHour"], shown["revenuePerKwh"]) == ("800000", "400000", "1600000")
    assert not {"revenuePerGpuHour", "revenuePerKwh"} & NodeMetrics(dict, tick=lambda: clock).since_start().keys()


def test_gpus_are_counted_if_nvml_is_available() -> None:
    """Without NVML the count is 0, and nothing fails."""
    assert count_gpus() >= 0

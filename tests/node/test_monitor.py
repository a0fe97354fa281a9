from __future__ import annotations

from typing import Any

import aiohttp

from node.monitor import Monitor
from node.ports import JobReport
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.runtime.serving import serving
from tests.node.world import PAYER, Client, ask_book

JOB = Client().order(ask_book().current[0]).job


async def test_an_operator_can_see_what_happened() -> None:
    """/metrics counts jobs by outcome, tokens and revenue, and /healthz says whether the node can earn."""
    suspected: list[bool] = []
    monitor = Monitor(lambda: 42, lambda: suspected.append(True))
    monitor.ended(
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
    monitor.ended(JobReport(job=JOB, payer=PAYER.address, model="m", outcome=None, reason="engine down", engine_fault=True))
    assert suspected == [True]
    health: dict[str, Any] = {"ok": True}
    async with serving(monitor.app(lambda: health), "127.0.0.1", 0) as port, aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
        for line in (
            'tally_node_jobs_total{model="m",outcome="completed"} 1.0',
            'tally_node_jobs_total{model="m",outcome="no_receipt"} 1.0',
            'tally_node_tokens_total{direction="output",model="m"} 20.0',
            'tally_node_revenue_units_total{model="m"} 70.0',
            'tally_node_first_output_seconds_count{model="m"} 1.0',
            "tally_node_unsecured_units 42.0",
        ):
            assert line in text
        for ok, status in ((True, 200), (False, 503)):
            health["ok"] = ok
            async with session.get(f"http://127.0.0.1:{port}/healthz") as response:
                assert (response.status, await response.json()) == (status, {"ok": ok})

from __future__ import annotations

import asyncio

from scripts.bench_queue import CLIENTS, run_clients
from tests.scripts.measurement import run_measurement


def test_a_quick_run_has_every_figure() -> None:
    """The benchmark runs completely on real processes, and every request is answered."""
    options = ("--engine", "stand-in", "--burst", "12", "--waiting", "100", "--answers", "1", "--rounds", "1", "--json")
    figures = run_measurement("bench_queue", *options)
    loops = {f"closed_loop_{name}_{clients}" for clients in CLIENTS for name in ("ratio", "answers_per_s")}
    bursts = {"waiting_bytes_per_job", "burst_answered_share", "sdk_default_answered_share", "flood_other_wait_ratio"}
    assert figures.keys() == bursts | loops | {"closed_loop_refused"}
    assert (figures["burst_answered_share"], figures["sdk_default_answered_share"]) == (1, 1)
    assert figures["closed_loop_refused"] == 0
    assert figures["waiting_bytes_per_job"] > 0


async def test_each_client_has_one_request_under_way() -> None:
    """So many requests are under way at all times, until the answers that count have come."""
    under_way = most = asked = 0

    async def ask() -> None:
        nonlocal under_way, most, asked
        under_way, asked = under_way + 1, asked + 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    rate, failed = await run_clients(ask, 4, 10)
    assert (most, failed, under_way) == (4, 0, 0)
    assert asked == 13, "ten that count, and three that keep the others company"
    assert rate > 0

"""The reference of metrics: what node, coordinator and gateway register with prometheus_client."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from typing import Any

import httpx
from prometheus_client import generate_latest

from coordinator.http.api import build_control_plane
from docs.generate.empty_coordinator import api_context
from docs.generate.markdown import code, table
from node.domain import tabs
from node.service.metrics import NodeMetrics
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.operations import BUDGET_HEADER, Operations
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.health import CheckResult, Health, HealthReport
from tallystick.protocol.types import Address, Amount

INTRODUCTION = """# Metrics

Node, coordinator and gateway serve [Prometheus](https://prometheus.io) metrics at `/metrics`: the node on `metrics_port`, which
is off by default, the others on their own ports. The gateway's need its API key, if it has one. All names begin with
`tallystick_`; names that end in `_units` are base units: millionths of a dollar. `/readyz` says why a dependency fails and what
to do.
"""


def pages() -> dict[str, str]:
    """The page of metrics."""
    parts = [
        INTRODUCTION,
        "## Node\n",
        table(("metric", "meaning", "type", "labels"), _node()),
        "## Coordinator\n",
        table(("metric", "meaning", "type"), _coordinator()),
        "## Gateway\n",
        table(("metric", "meaning", "type"), _gateway()),
    ]
    return {"metrics.md": "\n".join(parts)}


def _node() -> Iterator[tuple[str, str, str, str]]:
    payer = Address("0x" + "00" * 20)
    monitor = NodeMetrics(lambda: {payer: 0}, gpus=1, gpu_hour_cost=Amount(1), credit_summary=_credit_summary)
    monitor.watch_health(lambda: HealthReport({"disk": CheckResult(Health.PASS)}, 0.0))
    for collector in list(monitor.registry._collector_to_names):  # noqa: SLF001 - prometheus_client names labels nowhere else
        labels = ", ".join(code(name) for name in getattr(collector, "_labelnames", ()))
        for metric in collector.collect():
            kind = "counter" if metric.type == "counter" else metric.type
            name = f"{metric.name}_total" if kind == "counter" else metric.name
            yield code(name), metric.documentation, kind, labels or _sample_labels(metric)


def _sample_labels(metric: Any) -> str:
    names = getattr(metric, "_labelnames", ()) or (metric.samples[0].labels if metric.samples else ())
    return ", ".join(code(name) for name in names)


def _credit_summary() -> dict[str, int]:
    for cls in vars(tabs).values():
        if isinstance(cls, type) and hasattr(cls, "credit_summary"):
            return dict.fromkeys(re.findall(r'"(\w+)":', inspect.getsource(cls.credit_summary)), 0)
    return {}


def _gateway() -> Iterator[tuple[str, str, str]]:
    operations = Operations(Market.of(ClientConfig(), Signer(bytes(31) + b"\1")))
    budgets = BUDGET_HEADER.encode() + b"\n"
    return _scraped((generate_latest(operations.metrics.registry) + budgets).decode())


def _coordinator() -> Iterator[tuple[str, str, str]]:
    return _scraped(asyncio.run(_scrape()))


def _scraped(text: str) -> Iterator[tuple[str, str, str]]:
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE))
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        if name.endswith("_created"):  # when a counter began, which prometheus_client adds
            continue
        yield code(name), helps.get(name, ""), kind


async def _scrape() -> str:
    transport = httpx.ASGITransport(build_control_plane(api_context()))
    async with httpx.AsyncClient(transport=transport, base_url="http://coordinator.example") as client:
        return (await client.get("/metrics")).text

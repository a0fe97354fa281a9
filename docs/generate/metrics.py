"""The reference of metrics: what node, coordinator and gateway register with prometheus_client."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from coordinator.http.api import build_control_plane
from docs.generate.empty_coordinator import api_context
from docs.generate.markdown import code, table
from node.domain import tabs
from node.domain.gas_totals import GasTotals
from node.service.metrics import NodeMetrics
from node.service.operation_metrics import SLOT_STATES, OperationCollector
from tallystick.client.config import ClientConfig
from tallystick.client.gateway.key_shares import KeyShares
from tallystick.client.gateway.operations import BUDGET_HEADER, BUDGET_METRIC, Operations
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.health import CheckResult, Health, HealthReport
from tallystick.protocol.types import Address, Amount
from tallystick.tracing.metrics import SpanCollector

INTRODUCTION = """# Metrics

Node, coordinator and gateway serve [Prometheus](https://prometheus.io) metrics at `/metrics`: the node on `metrics_port`, which
is off by default, the others on their own ports. The gateway's need its API key, if it has one. All names begin with
`tallystick_`; names that end in `_units` are base units: millionths of a dollar. `/readyz` says why a dependency fails and what
to do.
"""


class Exported(NamedTuple):
    """A metric as a scrape has it: counters end in `_total`."""

    name: str
    text: str
    kind: str
    labels: frozenset[str]


def pages() -> dict[str, str]:
    """The page of metrics."""
    parts = [INTRODUCTION]
    for title, metrics in (("Node", _node()), ("Coordinator", _coordinator()), ("Gateway", _gateway())):
        rows = ((code(name), text, kind, ", ".join(map(code, sorted(labels)))) for name, text, kind, labels in metrics)
        parts += [f"## {title}\n", table(("metric", "meaning", "type", "labels"), rows)]
    return {"metrics.md": "\n".join(parts)}


@cache
def exported_metrics() -> Mapping[str, Exported]:
    """All metrics of the three daemons, by name."""
    return {metric.name: metric for metrics in (_node(), _coordinator(), _gateway()) for metric in metrics}


def _exported(registry: CollectorRegistry) -> Iterator[Exported]:
    for collector in list(registry._collector_to_names):  # noqa: SLF001 - prometheus_client names labels nowhere else
        for metric in collector.collect():
            names = getattr(collector, "_labelnames", ()) or getattr(metric, "_labelnames", ())
            labels = frozenset(names or (metric.samples[0].labels if metric.samples else ())) - {"le"}
            name = f"{metric.name}_total" if metric.type == "counter" else metric.name
            yield Exported(name, metric.documentation, metric.type, labels)


def _node() -> Iterator[Exported]:
    payer = Address("0x" + "00" * 20)
    metrics = NodeMetrics(lambda: {payer: 0}, gpus=1, gpu_hour_cost=Amount(1), watts=1, credit_summary=_credit_summary)
    metrics.watch_health(lambda: HealthReport({"disk": CheckResult(Health.PASS)}, 0.0))
    metrics.watch_integrity(lambda: {("model", "q4"): 100.0})
    slots = {"engine": dict.fromkeys(SLOT_STATES, 0)}
    metrics.registry.register(OperationCollector(lambda: slots, lambda: 0, GasTotals))
    metrics.registry.register(SpanCollector("tallystick_node", dict))
    return _exported(metrics.registry)


def _credit_summary() -> dict[str, int]:
    for cls in vars(tabs).values():
        if isinstance(cls, type) and hasattr(cls, "credit_summary"):
            return dict.fromkeys(re.findall(r'"(\w+)":', inspect.getsource(cls.credit_summary)), 0)
    return {}


def _gateway() -> Iterator[Exported]:
    operations = Operations(Market.of(ClientConfig(), Signer(bytes(31) + b"\1")))
    operations.watch_batches(lambda: 0, lambda: 0)
    operations.watch_keys(KeyShares(1, {"label": 1}))
    operations.watch_traces(dict)
    yield from _exported(operations.metrics.registry)
    text, kind = re.findall(r"^# (?:HELP|TYPE) \S+ (.*)$", BUDGET_HEADER, re.MULTILINE)
    yield Exported(BUDGET_METRIC, text, kind, frozenset({"budget"}))


def _coordinator() -> Iterator[Exported]:
    context = api_context()
    build_control_plane(context)
    context.metrics.watch_writes(lambda: 0)
    context.metrics.registry.register(SpanCollector("tallystick_coordinator", dict))
    return _exported(context.metrics.registry)

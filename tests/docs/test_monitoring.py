"""Dashboards and alert rules: every query is valid PromQL, and every metric and label in it exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.http.metrics import CoordinatorMetrics
from coordinator.jobs.hedging import RESULTS
from docs.generate.metrics import exported_metrics
from tallystick.protocol.health import CheckResult, Health, HealthReport

FOLDER = Path(__file__).parents[2] / "docs" / "monitoring"
ROLES = ("coordinator", "gateway", "node")
METRIC = re.compile(r"\btallystick_\w+")
GROUPED = re.compile(r"\bby \(([^)]*)\)|\bon \(([^)]*)\)|([a-z_]+)(?==~?|!=|!~)")
OF_PROMETHEUS = {"instance", "job", "le", ""}
"""Labels that Prometheus adds, and those of histograms."""
VARIABLES = {"$instance": ".*", "$__rate_interval": "5m"}


def _panels(role: str) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads((FOLDER / f"{role}.json").read_text())["panels"]
    return panels


def _queries() -> Iterator[tuple[str, str]]:
    for role in ROLES:
        for panel in _panels(role):
            for target in panel["targets"]:
                yield f"{role}: {panel['title']}", target["expr"]
    for line in (FOLDER / "alerts.yml").read_text().splitlines():
        if line.strip().startswith("expr: "):
            expression: str = json.loads(line.strip().removeprefix("expr: "))
            yield "alerts", expression


QUERIES = dict(enumerate(_queries()))


def _rendered(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


@pytest.mark.parametrize("number", QUERIES)
def test_its_metrics_exist(number: int) -> None:
    """Each metric of a query is one that a daemon exports, and so is each label."""
    where, query = QUERIES[number]
    metrics = exported_metrics()
    names = set(METRIC.findall(query))
    assert names, where
    labels = set[str](OF_PROMETHEUS)
    for name in names:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        known = metrics.get(name, metrics.get(base))
        assert known is not None, f"{where}: no daemon exports {name}"
        assert name == base or known.kind == "histogram", f"{where}: {name} is no histogram"
        assert known.kind != "counter" or re.search(rf"(rate|increase)\({name}\b", query), f"{where}: a counter needs its rate"
        labels |= known.labels
    used = {label.strip() for groups in GROUPED.findall(query) for group in groups for label in group.split(",")}
    assert used <= labels, f"{where}: {used - labels} are no labels of {names}"


@pytest.mark.parametrize("role", ROLES)
def test_every_metric_of_a_role_is_on_its_dashboard(role: str) -> None:
    """A metric that nobody looks at is forgotten."""
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for _, query in _queries() for name in METRIC.findall(query)}
    assert {name for name in exported_metrics() if name.startswith(f"tallystick_{role}_")} <= shown


@pytest.mark.parametrize("role", ROLES)
def test_the_panels(role: str) -> None:
    """Panels have ids, titles and units, and do not overlap; the data source and the instances are variables."""
    document = json.loads((FOLDER / f"{role}.json").read_text())
    assert (document["uid"], type(document["schemaVersion"])) == (f"tallystick-{role}", int)
    assert len({panel["id"] for panel in _panels(role)}) == len(_panels(role))
    assert [variable["name"] for variable in document["templating"]["list"]] == ["datasource", "instance"]
    cells = set[tuple[int, int]]()
    for panel in _panels(role):
        place = panel["gridPos"]
        taken = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert panel["title"]
        assert not cells & taken
        assert max(x for x, _ in taken) < 24
        cells |= taken
        targets = panel["targets"]
        assert all("$instance" in target["expr"] for target in targets)
        assert len({target["refId"] for target in targets}) == len(targets)
        assert all(part["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for part in (panel, *targets))
        assert panel["fieldConfig"]["defaults"]["unit"]


@pytest.mark.skipif(not (shutil.which("promtool") or os.environ.get("TALLYSTICK_REQUIRE_SERVICES")), reason="needs promtool")
def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    """Prometheus's own checker reads the alert rules, and the queries of the dashboards as rules."""
    rules = [{"record": f"query_{number}", "expr": _rendered(query)} for number, (_, query) in QUERIES.items()]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    for checked, count in ((file, len(rules)), (FOLDER / "alerts.yml", 17)):
        done = subprocess.run(
            ["promtool", "check", "rules", str(checked)], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{count} rules found" in done.stdout


def test_what_the_labels_of_a_scrape_are() -> None:
    """The labels of metrics that are counted only when something happened are those that the code gives them."""
    report = HealthReport({"disk": CheckResult(Health.PASS)}, 0.0)
    metrics = CoordinatorMetrics(lambda: report)
    metrics.job_ended("completed", 1.0, 0.5, 10)
    metrics.watch_hedges(dict)
    families = {family.name: family for family in metrics.registry.collect()}
    exported = exported_metrics()
    assert len(families["tallystick_coordinator_hedges"].samples) == len(RESULTS)
    for name, family in families.items():
        for sample in family.samples:
            known = exported.get(f"{name}_total", exported.get(name))
            assert known is not None
            assert set(sample.labels) - {"le"} <= known.labels, sample.name

"""The compose file and the Helm chart of a coordinator's replicas: rendered, checked against Kubernetes' schemas, and against the
settings that the coordinator has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from coordinator.config import ENV_PREFIX, CoordinatorConfig, load_config
from tallystick.protocol.replicas import MAX_REPLICAS
from tallystick.version import __version__

PACKAGING = Path(__file__).parents[2] / "coordinator" / "packaging"
CHART = PACKAGING / "helm" / "tallystick-coordinator"
KUBERNETES = "1.31"
_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*\}\}")


def render(text: str, scope: dict[str, Any]) -> str:
    """Renders the part of Helm's template language that the chart uses."""
    return "".join(_render(iter(text.splitlines(keepends=True)), scope))


def _render(lines: Iterator[str], scope: dict[str, Any]) -> Iterator[str]:
    for line in lines:
        action = _ACTION.fullmatch(line.strip())
        if action is None or not action[1].startswith("range "):
            yield _ACTION.sub(lambda match: _value(match[1], scope), line)
            continue
        names, source = re.fullmatch(r"range ((?:\$\w+,? ?)+):= (.*)", action[1]).groups()  # type: ignore[union-attr]
        body, variables = list(_body(lines)), re.findall(r"\$\w+", names)
        for values in _items(source, scope):
            yield from _render(iter(body), scope | dict(zip(variables, values, strict=True)))


def _body(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if _ACTION.fullmatch(line.strip()) and "end" in line:
            return
        yield line


def _items(source: str, scope: dict[str, Any]) -> list[tuple[Any, ...]]:
    counted = re.fullmatch(r"until \(int (.*)\)", source)
    return [(number,) for number in range(_look_up(counted[1], scope))] if counted else list(_look_up(source, scope).items())


def _look_up(path: str, scope: dict[str, Any]) -> Any:
    if path in scope:
        return scope[path]
    found: Any = scope
    for name in path.removeprefix("$").removeprefix(".").split("."):
        found = found[name]
    return found


def _value(expression: str, scope: dict[str, Any]) -> str:
    source, *filters = (part.strip() for part in expression.split("|"))
    added = re.fullmatch(r"add (\S+) (\d+)", source)
    value = _look_up(added[1], scope) + int(added[2]) if added else _look_up(source, scope)
    assert filters in ([], ["quote"])
    return f'"{value}"' if filters else str(value)


def rendered(**values: Any) -> list[dict[str, Any]]:
    """The objects of the chart with these values."""
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values.keys() <= defaults.keys()
    scope = {"Values": defaults | values, "Release": {"Name": "market"}}
    texts = [render(file.read_text(), scope) for file in sorted((CHART / "templates").glob("*.yaml"))]
    return [entry for text in texts for entry in yaml.safe_load_all(text)]


def _of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in objects if entry["kind"] == kind]


@pytest.mark.parametrize("replicas", [1, 3, 10])
def test_the_chart_meets_the_schemas_of_kubernetes(replicas: int) -> None:
    """Every object is valid, with no member that its schema does not know."""
    for entry in rendered(replicas=replicas):
        kubernetes_validate.validate(entry, KUBERNETES, strict=True)


def test_each_replica_has_a_service_and_a_host_of_its_own() -> None:
    """The host under which the ingress knows a pod is the one that the pod tells clients and nodes."""
    objects = rendered(replicas=4, host="market.example")
    (pods,), (ingress,) = _of_kind(objects, "StatefulSet"), _of_kind(objects, "Ingress")
    environment = {entry["name"]: entry.get("value") for entry in pods["spec"]["template"]["spec"]["containers"][0]["env"]}
    url = environment["TALLY_COORDINATOR_PUBLIC_URLS"]
    names = [f"market-{number}" for number in range(4)]
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == [f"{name}.market.example" for name in names]
    assert [url.replace("$(POD_NAME)", name) for name in names] == [f"https://{name}.market.example" for name in names]
    selected = [service["spec"]["selector"] for service in _of_kind(objects, "Service")[1:]]
    assert selected == [{"statefulset.kubernetes.io/pod-name": name} for name in names]
    assert len(names) <= MAX_REPLICAS


def _environments() -> Iterator[Callable[[], dict[str, str]]]:
    def of_chart() -> dict[str, str]:
        (pods,) = _of_kind(rendered(), "StatefulSet")
        entries = pods["spec"]["template"]["spec"]["containers"][0]["env"]
        secret = {"db": "postgresql://tally@db.example/tally", "bus": "nats://tally:x@nats:4222"}
        refs = {entry["name"]: entry.get("valueFrom", {}).get("secretKeyRef", {}).get("key") for entry in entries}
        assert {key for key in refs.values() if key} == secret.keys(), "no value has a password"
        given = {entry["name"]: entry.get("value") or secret.get(refs[entry["name"]]) for entry in entries}
        return {name: str(value).replace("$(POD_NAME)", "market-0") for name, value in given.items()}

    def of_compose() -> dict[str, str]:
        service = yaml.safe_load((PACKAGING / "docker-compose.yml").read_text())["services"]["replica-2"]
        given = {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in service["environment"].items()}
        return given | {"TALLY_COORDINATOR_DB": "postgresql://tally:x@postgres/tally"}

    yield from (of_chart, of_compose)


@pytest.mark.parametrize("environment", list(_environments()))
def test_a_coordinator_takes_the_environment(environment: Callable[[], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable is a setting, and together they make a replica with a URL of its own that listens beyond loopback."""
    given = environment()
    settings = {f"{ENV_PREFIX}{name.upper()}" for name in CoordinatorConfig.__dataclass_fields__}
    assert {name for name in given if name.startswith(ENV_PREFIX)} <= settings
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(f"{ENV_PREFIX}HOST", "0.0.0.0")  # as the image has it
    config = load_config()
    assert config.bus
    assert config.own_url(config.port) in {"https://market-0.coordinator.example", "http://localhost:8422"}
    assert config.drain_seconds == 120
    behind_ingress = config.own_url(config.port).startswith("https")
    assert config.connection_limits.proxies.trust("10.1.2.3") is behind_ingress, "an ingress is trusted, and nothing by default"


def test_jobs_have_their_time_before_a_stop() -> None:
    """Both give a stopping process longer than `drain_seconds`."""
    (pods,) = _of_kind(rendered(drainSeconds=300), "StatefulSet")
    assert pods["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 330
    compose = yaml.safe_load((PACKAGING / "docker-compose.yml").read_text())
    assert compose["services"]["replica-1"]["stop_grace_period"] == "150s"


def test_the_replicas_of_the_compose_file_differ_in_port_and_url_alone() -> None:
    """Each is reached at the port that it tells."""
    services = yaml.safe_load((PACKAGING / "docker-compose.yml").read_text())["services"]
    names = [name for name in services if name.startswith("replica-")]
    assert len(names) == 3
    for name in names:
        (port,) = services[name].pop("ports")
        assert services[name]["environment"].pop("TALLY_COORDINATOR_PUBLIC_URLS").endswith(f":{port.partition(':')[0]}")
    assert services[names[0]] == services[names[1]] == services[names[2]]


def test_the_chart_is_of_this_version() -> None:
    """Its application is the release of this repository."""
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__

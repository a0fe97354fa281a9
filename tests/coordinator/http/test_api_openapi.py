"""The coordinator against its own OpenAPI document: every response is as documented, and never a 5xx."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from coordinator.app import running
from coordinator.config import CoordinatorConfig
from tallystick.protocol.criteria import Demand
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Amount
from tallystick.protocol.weights import Weights
from tests.coordinator.fake_escrow import DEPLOYMENT
from tests.coordinator.harness import COORDINATOR


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The document of a coordinator that runs in another thread, on its own database."""
    folder: Path = tmp_path_factory.mktemp("openapi")
    DEPLOYMENT.save(folder / "deployment.json")
    config = CoordinatorConfig(deployment=folder / "deployment.json", port=0, db=f"sqlite:///{folder}/coordinator.db")
    loop, over, ready, ports = asyncio.new_event_loop(), asyncio.Event(), threading.Event(), list[int]()

    async def serve() -> None:
        async with running(config, COORDINATOR) as port:
            ports.append(port)
            ready.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(120)
    checks = {"negative_data_rejection": {"expected-statuses": ["4xx"]}}  # its default lacks 413
    rejections = SchemathesisConfig.from_dict({"checks": checks})
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{ports[0]}/openapi.json", config=rejections)
    loop.call_soon_threadsafe(over.set)
    thread.join(30)
    loop.close()


ROUTES = [
    ("GET", "/v1/info"),
    ("GET", "/v1/account"),
    ("GET", "/v1/models"),
    ("GET", "/v1/asks"),
    ("POST", "/v1/explain"),
    ("POST", "/v1/shortlist"),
    ("GET", "/v1/providers/{provider}/why"),
    ("GET", "/v1/jobs/{job}"),
    ("POST", "/v1/jobs/{job}/cancel"),
    ("POST", "/v1/jobs/{job}/orders"),
    ("POST", "/v1/reports"),
    ("POST", "/v1/tabs"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/log/head"),
    ("GET", "/v1/log/inclusion"),
    ("GET", "/v1/log/consistency"),
    ("GET", "/v1/log/proof"),
    ("GET", "/v1/log/entries"),
]


def test_all_routes_are_tried(document: Any) -> None:
    """The list above has every route of the document."""
    documented = [(r.ok().method.upper(), r.ok().path) for r in document.get_all_operations()]
    assert sorted(documented) == sorted(ROUTES)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_it_answers_as_documented(document: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Valid and invalid requests to every route get documented statuses and shapes, no 5xx, in time. Readiness alone may be 503,
    because this coordinator has no chain.
    """
    operation = document[path][method]
    excluded: list[Any] = [not_a_server_error] if path == "/readyz" else []
    # A schema describes neither the binary candidates behind base64, nor which coordinator a report is for.
    if path in ("/v1/jobs/{job}/orders", "/v1/reports"):
        excluded.append(positive_data_acceptance)

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(timeout=60, excluded_checks=excluded)

    try:
        ask()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "a route without parameters cannot be asked wrongly"


def test_the_schema_has_every_criterion(document: Any) -> None:
    """`ShortlistRequest` declares the JSON members that `Demand` writes, no more and no fewer."""
    whole = Demand(
        "m",
        1,
        1,
        frozenset({COORDINATOR.address}),
        frozenset({COORDINATOR.address}),
        "/v1/rerank",
        Requirements(region=("eu",)),
        1,
        1,
        "latency",
        needs=Requirements(features=("tools",)),
        essential=("tools",),
        input_tokens=1,
        likely_tokens=1,
        max_output=1,
        weights=Weights(Amount(1)),
        min_integrity=1,
        concurrent=1,
        batch=True,
    )
    members = document.raw_schema["components"]["schemas"]["ShortlistRequest"]["properties"]
    assert whole.to_json(COORDINATOR.address).keys() == members.keys()

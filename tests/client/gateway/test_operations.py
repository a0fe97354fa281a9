"""The gateway's routes for its operator: readiness, metrics, the first page, and what strangers get to see of them."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace

import httpx
import pytest
from structlog.testing import capture_logs

from tallystick.client.config import Budget, ClientConfig
from tallystick.client.gateway import app as gateway_app
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import Amount
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket
from tests.client.gateway.test_app import gateway, http, url

__all__ = ["http", "url"]
WELL = dict.fromkeys(("ledger", "disk", "coordinator", "clock", "audits"), "pass")


async def test_readiness(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """GET /readyz names each dependency; all of them work."""
    answer = await http.get("/readyz")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/health+json")
    report = answer.json()
    assert report["status"] == "pass"
    assert {name: checks[0]["status"] for name, checks in report["checks"].items()} == WELL
    assert (await http.get("/healthz")).json()["checks"] == WELL
    for former, route in (("/health", "/healthz"), ("/ready", "/readyz")):
        assert (await http.get(former)).json().keys() == (await http.get(route)).json().keys()


async def test_a_coordinator_that_is_down(wallet: Signer, config: ClientConfig) -> None:
    """Without its coordinator the gateway is not ready, and says what to do; its liveness route still answers 200."""
    lost = replace(config, api_key="secret")
    async with (
        Market("http://127.0.0.1:9", wallet, lost) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        key = {"authorization": "Bearer secret"}
        answer = await http.get("/readyz", headers=key, timeout=60)
        assert answer.status_code == 503
        (check,) = answer.json()["checks"]["coordinator"]
        assert (check["status"], "`coordinator`" in check["remedy"]) == ("fail", True)
        stranger = await http.get("/readyz")
        assert (stranger.status_code, stranger.json()) == (503, {"status": "fail"})
        alive = await http.get("/healthz", headers=key)
        assert (alive.status_code, alive.json()["status"]) == (200, "failing")


@pytest.mark.parametrize("proxies", [(), ("127.0.0.1",)])
async def test_only_a_trusted_proxy_names_the_scheme(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch, proxies: tuple[str, ...]
) -> None:
    """The setting reaches the server that `tally gateway` starts."""
    monkeypatch.setattr(gateway_app, "wait_for_stop_signal", asyncio.Event().wait)
    ready = asyncio.get_running_loop().create_future()
    settings = replace(config, coordinator=fake.url, port=0, trusted_proxies=proxies)
    serving_it = asyncio.create_task(gateway_app.run_gateway(settings, wallet, ready=ready.set_result))
    async with asyncio.timeout(60), httpx.AsyncClient() as http:
        about = (await http.get(f"http://127.0.0.1:{await ready}/", headers={"x-forwarded-proto": "https"})).json()
    assert about["clients"]["OPENAI_BASE_URL"].startswith("https://" if proxies else "http://")
    serving_it.cancel()
    await asyncio.gather(serving_it, return_exceptions=True)


async def test_metrics(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Jobs, refusals, budgets and dependencies are counted under one prefix, with a line for each request."""
    budgets = (Budget(per_day=Amount(1_000_000)), Budget(label='a"b', per_day=Amount(10)))
    async with gateway(fake, wallet, replace(config, budgets=budgets)) as url, httpx.AsyncClient(base_url=url) as http:
        with capture_logs() as lines:
            assert (await http.post(CHAT, json=BODY)).status_code == 200
            assert (await http.post(CHAT, json=BODY | {"stream": True})).status_code == 200
            assert (await http.post(CHAT, json={"model": "none"})).status_code >= 400
        await http.get("/readyz")
        text = (await http.get("/metrics")).text
        assert 'tallystick_gateway_audits_total{outcome="unverifiable"} 0.0' in text
    for expected in (
        'tallystick_gateway_jobs_total{outcome="completed"} 2.0',
        "tallystick_gateway_job_seconds_count 3.0",
        'tallystick_gateway_dependency_state{dependency="ledger"} 1.0',
        'tallystick_gateway_budget_used_ratio{budget="',
        "tallystick_gateway_jobs_live 0.0",
        'tallystick_gateway_failed_jobs_total{fault="client"} 1.0',
        'tallystick_gateway_failed_jobs_total{fault="provider"} 0.0',
        "tallystick_gateway_retries_total 0.0",
    ):
        assert expected in text
    assert all(line.startswith("tallystick_gateway_") for line in text.splitlines() if line[0] != "#")
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests][:2] == [200, 200]
    for line in requests[:2]:
        assert (line["model"], line["outcome"], len(line["job"])) == (BODY["model"], "completed", 32)
        assert float(line["cost"]) > 0
    assert str(BODY["messages"]) not in str(lines)


async def test_another_model_is_a_retry(http: httpx.AsyncClient) -> None:
    """A request whose first model nobody sells goes to its next one: one retry, and no failed job."""
    options = {"x-tally-options": json.dumps({"fallbacks": [BODY["model"]]})}
    with capture_logs() as lines:
        assert (await http.post(CHAT, json=BODY | {"model": "none"}, headers=options)).status_code == 200
    text = (await http.get("/metrics")).text
    assert "tallystick_gateway_retries_total 1.0" in text
    assert 'tallystick_gateway_failed_jobs_total{fault="client"} 0.0' in text
    (request,) = [line for line in lines if line["event"] == "request"]
    assert request["retries"] == 1


@pytest.mark.parametrize("path", ["/", "/readyz", "/healthz", "/ready", "/health", "/metrics"])
async def test_strangers_learn_only_the_state(fake: FakeMarket, wallet: Signer, config: ClientConfig, path: str) -> None:
    """Without the key, nothing tells the payer, the coordinator, the models, or any number; /metrics needs the key."""
    async with gateway(fake, wallet, replace(config, api_key="secret")) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.get(path)
        assert answer.status_code == (401 if path == "/metrics" else 200)
        assert set(answer.json()) <= {"status", "message", "error"}
        assert wallet.address not in answer.text
        page = await http.get(path, headers={"accept": "text/html"})
        assert "/v1" not in page.text or path == "/metrics"
        assert (await http.get(path, headers={"authorization": "Bearer secret"})).status_code == 200


async def test_the_first_page(http: httpx.AsyncClient, url: str) -> None:
    """A browser gets a page without scripts or foreign resources, whose links work; other clients get JSON."""
    page = await http.get("/", headers={"accept": "text/html,application/xhtml+xml"})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert f"{url}/v1</code>" in page.text
    links = re.findall(r'href="([a-z][^:"]*)"', page.text)
    assert {"v1/models", "readyz", "metrics", "tally/money", "tally/wallet"} <= set(links)
    for link in links:
        assert (await http.get(f"/{link}")).status_code in ({200, 503} if link.startswith("tally/") else {200})
    assert (await http.get("/")).json()["metrics"] == f"{url}/metrics"

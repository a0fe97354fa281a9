"""The coordinator's prober: an ordinary, pinned job in the shape of the traffic, and a report with the coordinator's seal."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain.integrity_records import ProductKey
from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.client.sdk.market import Market
from tallystick.client.sdk.prober import Prober, seal_report
from tallystick.protocol.audit_reports import AuditVerdict, check_report
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.match_log import draw_of
from tests.client.fake_coordinator import FakeMarket
from tests.client.parties import NOW_S
from tests.coordinator.harness import COORDINATOR, DOMAIN, MODEL, START
from tests.coordinator.jobs.test_audit_reports import paid_job, request
from tests.coordinator.live_server import served


class Offers:
    """What a coordinator lists: one ask that can be probed, and a log without leaves."""

    def __init__(self, fake: FakeMarket) -> None:
        self._fake = fake

    async def models(self) -> list[Any]:
        return [type("Offer", (), {"id": MODEL})]

    async def explain(self, demand: dict[str, Any]) -> list[dict[str, Any]]:
        assert demand["route"] == "/v1/chat/completions"
        return [{"ask": raw["ask"], "free": 1, "audits": 0} for raw in self._fake._asks()]

    async def log_head(self) -> Any:
        return type("Head", (), {"message": type("Message", (), {"size": 0})})

    async def log_entries(self, start: int) -> object:
        assert start == 0
        return {"entries": [{"leaf": "zz"}, {"leaf": None}, 7, {"leaf": "00"}]}


async def test_a_probe_is_a_job_like_any_other(fake: FakeMarket, market: Market) -> None:
    """Its provider alone has an order, and its body says nothing of a probe. An answer that cannot be judged gives no verdict."""
    prober = Prober(market, Offers(fake), COORDINATOR, lambda: NOW_S, os.urandom)  # type: ignore[arg-type]
    with pytest.raises(BadMessage, match="too short for an audit"):
        await prober.probe()
    body = fake.last.request
    assert len(fake.orders()) == 1
    assert set(body) <= {"model", "messages", "max_tokens", "stream", "stream_options", "temperature"}
    assert not any(word in str(body) for word in ("xxx", "audit", "probe"))


async def test_nobody_to_probe(market: Market) -> None:
    """A market without a free slot is probed later."""

    class Nothing(Offers):
        async def explain(self, demand: dict[str, Any]) -> list[dict[str, Any]]:
            return []

    prober = Prober(market, Nothing(FakeMarket()), COORDINATOR, lambda: NOW_S, os.urandom)  # type: ignore[arg-type]
    assert await prober.probe() is None


async def test_a_sealed_report_counts_in_full() -> None:
    """The client seals each report on its way; a seal is of one report, so it cannot be moved to another."""
    async with served() as at:
        at.world.market.matchmaker.draw = draw_of
        await at.world.market.start()
        node = at.world.node("ann")
        asked = request(await paid_job(at.world, node), AuditVerdict.CONFIRMED)
        async with CoordinatorClient(at.url, ClientConfig(coordinator=at.url)) as client:
            client.seal = lambda report, domain: seal_report(report, COORDINATOR, domain)
            await client.report(asked)
        standing = at.world.market.matchmaker.integrity.standing(ProductKey(node.address, MODEL, "unknown"))
        assert standing == (0, 1)
        sealed = seal_report(asked, COORDINATOR, DOMAIN)
        other = request(await paid_job(at.world, node), AuditVerdict.CONFIRMED, salt=1)
        with pytest.raises(BadMessage, match=r"seal\.reportHash"):
            check_report(replace(other, seal=sealed.seal), DOMAIN, COORDINATOR.address, START)
        assert isinstance(sealed.seal, Signed)

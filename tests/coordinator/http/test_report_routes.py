"""POST /v1/reports over real HTTP, from the client's own code, and with bodies that are no report."""

from __future__ import annotations

from typing import Any

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.http_client import CoordinatorClient
from tallystick.protocol.errors import Code, TallyError
from tests.coordinator.jobs.test_audit_reports import paid_job, request, standing
from tests.coordinator.live_server import Served


async def test_a_client_reports_and_gets_a_promise(at: Served) -> None:
    """The promise is checked by the client, and is about the leaf that the log has."""
    await at.world.market.start()
    node = at.world.node("ann")
    asked = request(await paid_job(at.world, node), seals=True)
    async with CoordinatorClient(at.url, ClientConfig()) as client:
        ack = await client.report(asked)
        with pytest.raises(TallyError) as refused:
            await client.report(request((asked.report.message.job, asked.receipt), salt=3))  # type: ignore[arg-type]
    assert refused.value.code is Code.REPORT_REPLAYED
    leaves = await at.world.log_store.log_entries(ack.message.index, ack.message.index + 1)
    assert leaves[0].hashes[:32] == ack.message.leaf_hash
    assert standing(at.world, node).audits == 1


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        (lambda body: body["report"].pop("signature"), 400, "bad_message"),
        (lambda body: body["report"].update(signature="0x" + "11" * 65), 401, "bad_signature"),
        (lambda body: body["report"]["message"].update(verdict=4), 400, "bad_message"),
        (lambda body: body["report"]["message"].update(verdict=0), 401, "bad_signature"),
        (lambda body: body["receipt"]["message"].update(cost="7"), 401, "bad_signature"),
        (lambda body: body.update(more=1), 400, "bad_message"),
        (lambda body: body["seal"]["message"].update(reportHash="0x" + "22" * 32), 400, "bad_message"),
    ],
)
async def test_other_bodies_are_refused_and_change_nothing(at: Served, change: Any, status: int, code: str) -> None:
    """Each is refused with its reason."""
    await at.world.market.start()
    node = at.world.node("ann")
    body = request(await paid_job(at.world, node), seals=True).to_json()
    change(body)
    answer = await at.http.post("/v1/reports", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert standing(at.world, node).audits == 0

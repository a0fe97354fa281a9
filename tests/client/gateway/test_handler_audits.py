"""Who may see a request that came through the gateway because of its audit."""

from __future__ import annotations

import json
from dataclasses import replace

import httpx
import pytest

from tallystick.client.audit_settings import AuditSettings, PromptConsent
from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market, audits_of
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.types import parse_job_id
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket

KEYS = (
    ApiKey(label="open", secret="o" * 16, share_prompts=True),
    ApiKey(label="closed", secret="c" * 16, share_prompts=False),
    ApiKey(label="hr", secret="h" * 16),
)


@pytest.mark.parametrize(
    "case",
    [
        ("o", {}, PromptConsent(may_share=True)),
        ("o", {"share_prompt": False}, PromptConsent()),
        ("o", {"private": True}, PromptConsent(private=True)),
        ("c", {"share_prompt": True}, PromptConsent()),
        ("h", {"share_prompt": True}, PromptConsent(private=True)),
    ],
)
async def test_key_label_and_request(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, case: tuple[str, dict[str, bool], PromptConsent]
) -> None:
    """The strictest of the caller's key, its label and the request decides."""
    key, options, expected = case
    audits = AuditSettings(private_labels=("hr",))
    async with Market(fake.url, wallet, replace(config, api_keys=KEYS, audits=audits)) as market:
        transport = httpx.ASGITransport(app=build_app(market))
        headers = {"authorization": f"Bearer {key * 16}", "x-tally-options": json.dumps(options)}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            response = await http.post(CHAT, json=BODY, headers=headers)
        assert response.status_code == 200, response.text
        job = parse_job_id(response.headers["x-tally-job"])
        kept = await audits_of(market).auditor.kept_jobs.find(job)
    assert kept is not None
    assert kept.consent == expected

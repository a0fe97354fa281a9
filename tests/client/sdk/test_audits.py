from __future__ import annotations

import gc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tallystick.client.audit_settings import AuditSettings, PromptConsent
from tallystick.client.audits.consent_file import write_answer
from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market, audits_of
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tests.client.fake_coordinator import BODY, CHAT, STREAM, FakeMarket, run

KEEPING = AuditSettings()


async def test_jobs_are_kept_for_audits(market: Market) -> None:
    """With the ask that they were sold on; a job that is not to be proved has no proof all the same."""
    async with await market.submit(CHAT, STREAM) as job:
        result = await job.result()
    kept = await audits_of(market).auditor.kept_jobs.find(job.id)
    assert kept is not None
    assert (result.proof, kept.consent, kept.provider) == (None, PromptConsent(), job.provider)
    assert kept.ask is not None
    assert kept.ask.message.provider == kept.provider
    kept.proof.check()
    assert kept.request()[1]["messages"] == STREAM["messages"]


@pytest.mark.parametrize("audits", [AuditSettings(enabled=False), AuditSettings(keep_mib=0)])
async def test_nothing_is_kept_if_the_user_says_so(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, audits: AuditSettings
) -> None:
    """Neither in memory nor on disk."""
    async with Market(fake.url, wallet, replace(config, audits=audits)) as market:
        async with await market.submit(CHAT, BODY) as job:
            await job.result()
        assert await audits_of(market).auditor.kept_jobs.find(job.id) is None
    assert not config.kept_jobs_path(wallet.address).exists()


async def test_a_market_that_cannot_open_leaves_nothing_open(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path
) -> None:
    """A file of thresholds that cannot be read, for example: no session and no ledger stay behind."""
    (tmp_path / "thresholds.json").write_text("[]")
    broken = replace(config, audits=AuditSettings(thresholds=tmp_path / "thresholds.json"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(BadMessage, match="thresholds"):
            await Market(fake.url, wallet, broken).open()
        gc.collect()
    assert [str(warning.message) for warning in caught if issubclass(warning.category, ResourceWarning)] == []
    async with Market(fake.url, wallet, config) as market, await market.submit(CHAT, BODY) as job:
        assert (await job.result()).receipt is not None


async def test_embeddings_and_audits_are_not_kept(market: Market) -> None:
    """What no referee can judge, and what audits themselves place."""
    for path, body, label in (
        ("/v1/embeddings", {"model": BODY["model"], "input": "a"}, None),
        (CHAT, BODY, "audits"),
    ):
        async with await market.submit(path, body, label=label) as job:
            await job.result()
        assert await audits_of(market).auditor.kept_jobs.find(job.id) is None


async def test_a_request_says_who_may_see_it(fake: FakeMarket, wallet: Signer, config: ClientConfig, tmp_path: Path) -> None:
    """So does the user's answer to `tally start`; what is private stays so."""
    write_answer(config.consent_path(wallet.address), share=True, now=1)
    async with Market(fake.url, wallet, config) as market:
        consents = []
        for options in ({}, {"share_prompt": False}, {"private": True}):
            async with await market.submit(CHAT, BODY, **options) as job:  # type: ignore[arg-type]
                await job.result()
            kept = await audits_of(market).auditor.kept_jobs.find(job.id)
            assert kept is not None
            consents.append(kept.consent)
    assert consents == [PromptConsent(may_share=True), PromptConsent(), PromptConsent(private=True)]
    assert tmp_path in config.consent_path(wallet.address).parents


async def test_no_audit_file_without_a_referee(market: Market, config: ClientConfig, wallet: Signer) -> None:
    """Where nobody scores, jobs are kept, and nothing else happens."""
    for _ in range(12):
        await run(market)
    auditor = audits_of(market).auditor
    assert await auditor.work_once() == 0
    assert not config.audits_path(wallet.address).with_suffix(".db").exists() or not await (await auditor.store()).latest(5)

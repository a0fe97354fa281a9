"""Providers that make their answers hard to check: they gain nothing, are named, and are never convicted for it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from tallystick.audit.audit_counts import AuditCounts
from tallystick.audit.verdicts import Verdict
from tallystick.client.audit_settings import PromptConsent
from tallystick.client.audits.conduct import EVIDENCE_ATTEMPTS
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.provider_audits import ProviderAudits
from tallystick.client.audits.schema import AuditKind, AuditState
from tallystick.protocol.audit_reports import AuditVerdict
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.features import EVIDENCE
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow
from tests.client.audits.parties import ALICE, HONEST, REQUEST, SPEC, Referees, sold
from tests.client.audits.test_auditor import World, offer
from tests.client.audits.test_auditor_hostile import answer_of, bare, request_of
from tests.client.audits.test_conduct import COARSER, OTHER_MODEL, honest_market
from tests.client.audits.toy_model import VOCABULARY
from tests.client.parties import DOMAIN, Provider

PROMISING = Provider.make("alice", spec=replace(SPEC, features=(SCORES, EVIDENCE)))
"""Alice, whose ask promises evidence."""


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A world with three honest referees that know the model's vocabulary."""
    market = Referees()
    for number in range(3):
        market.add(f"referee{number}", knows_vocabulary)
    world = World(tmp_path, market)
    await world.open()
    yield world
    await world.close()


def knows_vocabulary(request: ScoreRequest) -> ScoreResponse:
    """An engine that refuses tokens which its model lacks."""
    if not isinstance(request.completion, str) and max(request.completion) >= VOCABULARY:
        raise BadMessage("the engine refused to score this text (400)")
    return HONEST.score(request)


def kept_back() -> KeptJob:
    """Commits to evidence and does not hand it over."""
    return replace(sold(ALICE, COARSER), evidence=b"")


def other_form() -> KeptJob:
    """Calls its answer reasoning, and gives no evidence."""
    return bare(answer_of(b',"reasoning_content":"1 2 3 4 5 6 7 8 9"'))


def unasked_tool_call() -> KeptJob:
    """Calls a tool that the request does not have."""
    return bare(answer_of(b',"tool_calls":[{"id":"1"}]'))


def another_choice() -> KeptJob:
    """Answers with a choice that has another number."""
    return bare(answer_of().replace(b'"index":0', b'"index":1'))


def tokens_of_no_model() -> KeptJob:
    """Commits to tokens that no referee can read."""
    kept = sold(ALICE, COARSER, keep=lambda rows: tuple(EvidenceRow(row.token + 2**20, row.top) for row in rows))
    assert kept.rows
    return kept


def unkept_promise() -> KeptJob:
    """Promises evidence in its ask, and commits to none."""
    return sold(PROMISING, COARSER, evidence=False)


@pytest.mark.parametrize("hide", [kept_back, other_form, unasked_tool_call, another_choice, tokens_of_no_model, unkept_promise])
async def test_who_hides_is_named_and_not_convicted(world: World, hide: Callable[[], KeptJob]) -> None:
    """From the third such answer on: in the counts, in the log, and in reports. No block, no integrity, no conviction."""
    auditor = world.auditor()
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            kept = hide()
            offer(world, auditor, kept)
            await auditor.work_once()
    known = await provider_audits(world)
    assert (known.counts.unverifiable, known.counts.total, known.is_named) == (5, 5, True)
    assert (known.integrity.passes, 0 < known.integrity.failures < 2) == (0, True)
    assert auditor.counts == {"unverifiable": 5}
    assert ALICE.address not in await world.ledger.blocked(DOMAIN)
    named = [entry for entry in logs if entry["event"].startswith("a provider's answers often cannot be checked")]
    assert [(entry["provider"], entry["unverifiable"], entry["log_level"]) for entry in named] == [(ALICE.address, 3, "warning")]
    assert [report.report.message.verdict for report in world.reports] == [AuditVerdict.UNVERIFIABLE] * 3
    audit = await (await auditor.store()).find(kept.job)
    assert audit is not None
    assert (audit.state, audit.verdict, audit.unverifiable) == (AuditState.DONE, Verdict.INCONCLUSIVE, True)
    assert audit.reason


async def provider_audits(world: World) -> ProviderAudits:
    """What is known of Alice."""
    return await (await world.auditors[-1].store()).provider_audits(ALICE.address, REQUEST["model"], "bf16")


@pytest.mark.parametrize("hide", [kept_back, tokens_of_no_model, unkept_promise])
async def test_text_still_accuses_who_hides(world: World, hide: Callable[[], KeptJob]) -> None:
    """What is hidden clears nobody, and another model's text is suspect all the same."""
    auditor = world.auditor()
    kept = sold(PROMISING if hide is unkept_promise else ALICE, OTHER_MODEL, evidence=hide is not unkept_promise, length=128)
    offer(world, auditor, replace(kept, evidence=b"") if hide is kept_back else kept)
    await auditor.work_once()
    audit = await (await auditor.store()).find(kept.job)
    assert audit is not None
    assert (audit.verdict, audit.unverifiable) == (Verdict.SUSPECT, False)


async def test_single_losses_among_good_answers_name_nobody(world: World) -> None:
    """A node that restarts loses what it had not handed over yet."""
    auditor = world.auditor()
    for number in range(16):
        offer(world, auditor, replace(sold(ALICE, HONEST), evidence=b"") if number in (2, 7) else sold(ALICE, HONEST))
        await auditor.work_once()
    known = await provider_audits(world)
    assert known.counts == AuditCounts(passed=14, unverifiable=2)
    assert (known.is_named, known.integrity.failures) == (False, 0)
    assert {report.report.message.verdict for report in world.reports} == {AuditVerdict.PASS}


async def test_a_job_that_is_audited_again_counts_once(world: World) -> None:
    """Otherwise a person who asks three times names a provider by one answer."""
    auditor, kept = world.auditor(), kept_back()
    for _ in range(4):
        await auditor.audit(kept, again=True)
    assert (await provider_audits(world)).counts == AuditCounts(unverifiable=1)


@pytest.mark.parametrize("member", [{"tools": b'[{"type":"function"}]'}, {"modalities": b'["audio"]'}])
async def test_forms_that_the_request_asks_for_count_against_nobody(world: World, member: dict[str, bytes]) -> None:
    """Its caller wanted a tool call, or audio; a made-up request of its shape is audited instead."""
    auditor = world.auditor()
    offer(world, auditor, bare(answer_of(b',"tool_calls":[{"id":"1"}]'), request_of(**member)))
    await auditor._take_drawn()
    (audit,) = await (await auditor.store()).latest(9)
    assert (audit.kind, audit.unverifiable) == (AuditKind.SYNTHETIC, False)


async def test_nobody_has_to_see_what_cannot_be_scored(world: World) -> None:
    """So neither consent nor budget keeps such an answer from being counted."""
    auditor, world.spent = world.auditor(), 0
    kept = replace(other_form(), consent=PromptConsent(private=True))
    offer(world, auditor, kept)
    assert await auditor.work_once() == 1
    assert (world.market.asked, (await provider_audits(world)).counts) == ([], AuditCounts(unverifiable=1))


async def test_short_answers_to_made_up_requests_count(world: World) -> None:
    """They ask for several sentences. A real question may have a short answer."""
    auditor, short = world.auditor(), sold(ALICE, HONEST, length=3)
    with pytest.raises(BadMessage, match="too short"):
        await auditor.audit(short)
    for kept in (short, replace(sold(ALICE, HONEST), consent=PromptConsent())):
        offer(world, auditor, kept)
    await auditor._take_drawn()
    world.now += 3_600
    world.market.served = HONEST
    placed, world.market.place_synthetic = world.market.place_synthetic, _place_short  # type: ignore[assignment,method-assign]
    await auditor.work_once()
    world.market.place_synthetic = placed  # type: ignore[method-assign]
    assert (await provider_audits(world)).counts == AuditCounts(unverifiable=2)


async def _place_short(_path: str, _body: bytes) -> KeptJob:
    return replace(sold(ALICE, HONEST, length=3), synthetic=True)


@pytest.mark.parametrize(
    ("fault", "state", "counts"),
    [
        (Fault.PROVIDER, AuditState.DONE, AuditCounts(unverifiable=1)),
        (Fault.ENGINE, AuditState.DONE, AuditCounts(unverifiable=1)),
        (Fault.COORDINATOR, AuditState.PENDING, AuditCounts()),
        (Fault.NOBODY, AuditState.PENDING, AuditCounts()),
    ],
)
async def test_evidence_that_is_always_for_later_is_withheld(
    world: World, fault: Fault, state: AuditState, counts: AuditCounts
) -> None:
    """A provider that says "not now" every time keeps it back as well. A coordinator that is down says nothing of it."""

    async def later(_job: bytes) -> bytes:
        raise Unavailable(Code.NODE_BUSY, "not now", fault=fault)

    world.market.fetch_evidence = later  # type: ignore[assignment,method-assign]
    auditor, kept = world.auditor(), kept_back()
    offer(world, auditor, kept)
    for _ in range(EVIDENCE_ATTEMPTS):
        await auditor.work_once()
        world.now += 3_600
    audit = await (await auditor.store()).find(kept.job)
    assert audit is not None
    assert (audit.state, (await provider_audits(world)).counts) == (state, counts)


@pytest.mark.parametrize(("rows", "passes"), [(64, 1.0), (48, 0.8125), (32, 0.625), (16, 0.4375)])
async def test_a_pass_by_partial_evidence_counts_in_part(world: World, rows: int, passes: float) -> None:
    """A quarter for the text, and the rest in proportion to the tokens that have rows."""
    auditor = world.auditor()
    offer(world, auditor, sold(ALICE, HONEST, keep=lambda kept: kept[:rows]))
    await auditor.work_once()
    assert (await provider_audits(world)).integrity.passes == passes


async def test_passes_by_partial_evidence_are_reported_in_proportion(world: World) -> None:
    """A report has no weight of its own, and the coordinator sees only that there is a root."""
    auditor, draws = world.auditor(), random.Random(7).randbytes
    for _ in range(40):
        offer(world, auditor, sold(ALICE, HONEST, keep=lambda kept: kept[:16]))
        world.draws = draws
        await auditor.work_once()
    assert (await provider_audits(world)).counts.passed == 40
    assert 8 <= len(world.reports) <= 28  # 17.5 expected; the draws are the same in every run


def test_the_evidence_of_these_tests_fits_its_receipts() -> None:
    """Otherwise they would test something else."""
    kept = tokens_of_no_model()
    assert evidence_root(kept.rows) == kept.proof.receipt.message.evidence_root
    assert pack_evidence(kept.rows) == kept.evidence


async def test_referees_that_are_silent_for_all_name_nobody(tmp_path: Path) -> None:
    """An honest answer that no referee of the market could score."""

    def refuses(_request: ScoreRequest) -> ScoreResponse:
        raise BadMessage("the engine refused to score this text (400)")

    world = World(tmp_path, honest_market())
    world.market.scores = dict.fromkeys(world.market.scores, refuses)
    await world.open()
    try:
        auditor = world.auditor()
        for _ in range(3):
            offer(world, auditor, sold(ALICE, HONEST))
            await auditor.work_once()
        assert (await provider_audits(world)).counts == AuditCounts(inconclusive=3)
    finally:
        await world.close()


def splits_otherwise(request: ScoreRequest) -> ScoreResponse:
    """A referee that passes every text, with tokens of its own, so that no evidence can be compared."""
    response = HONEST.score(request)
    if not isinstance(request.completion, str):
        return response
    rows = [
        row and ScoreRow(row.position, None if row.token is None else row.token + 100, row.logprob, _moved(row.top))
        for row in response.rows
    ]
    return replace(response, tokens=tuple(token + 100 for token in response.tokens), rows=tuple(rows))


def _moved(top: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    return tuple((token + 100, value) for token, value in top)


@pytest.mark.parametrize("honest", [0, 2])
async def test_one_referee_cannot_get_a_rival_named(tmp_path: Path, honest: int) -> None:
    """Another one is asked; if there is none, the audit is inconclusive and says nothing of the provider."""
    market = honest_market(honest)
    market.add("rival", splits_otherwise)
    world = World(tmp_path, market)
    await world.open()
    try:
        auditor, draws = world.auditor(), random.Random(5).randbytes
        for _ in range(16):
            offer(world, auditor, sold(ALICE, HONEST))
            world.draws = draws
            await auditor.work_once()
        counts = (await provider_audits(world)).counts
        assert (counts.unverifiable, counts.suspect, counts.total) == (0, 0, 16)
        assert counts.inconclusive == 0 if honest else counts.inconclusive > 0
        assert not (await (await auditor.store()).all_provider_audits())[0].is_named
    finally:
        await world.close()

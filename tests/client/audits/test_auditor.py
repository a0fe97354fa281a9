from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tallystick.audit.verdicts import Verdict
from tallystick.client.audit_settings import AuditSettings, PromptConsent
from tallystick.client.audits.auditor import Auditor, AuditorPorts
from tallystick.client.audits.consent_file import write_answer
from tallystick.client.audits.evidence_file import read_audit_evidence
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.records import AuditEnd, NewAudit
from tallystick.client.audits.schema import AuditKind, AuditState, Origin
from tallystick.client.config import Budget, ClientConfig
from tallystick.client.ledger.ledger import Ledger
from tallystick.protocol.audit_reports import AuditVerdict, ReportRequest, check_report
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.messages import ReportAck
from tallystick.protocol.types import ZERO_HASH, Address, Amount
from tests.client.audits.parties import ALICE, HONEST, SHARED, Referees, sold
from tests.client.audits.test_conduct import OTHER_MODEL, honest_market
from tests.client.fake_coordinator import eventually
from tests.client.parties import COORDINATOR, DOMAIN, NOW_S, PAYER, take

ALWAYS, NEVER = bytes(8), b"\xff" * 8


def _chance() -> Callable[[int], bytes]:
    return random.Random(7).randbytes  # the same in every run


class World:
    """An auditor with a ledger, in a folder. `spent`: what the wallet paid for jobs, in base units."""

    def __init__(self, folder: Path, market: Referees, **settings: Any) -> None:
        self.market, self.now, self.spent, self.jobs = market, NOW_S, 10**9, 0
        self.reports: list[ReportRequest] = []
        self.report_error: TallyError | None = None
        self.draws: Callable[[int], bytes] = _chance()
        budgets = settings.pop("budgets", ())
        audits = AuditSettings(**({"planted_percent": 0.0} | settings))
        self.config = ClientConfig(ledger_file=folder / "client.db", audits=audits, budgets=budgets)
        self.auditors: list[Auditor] = []

    async def open(self) -> None:
        """Opens the ledger."""
        self.ledger = await Ledger.open(self.config.ledger_path(PAYER.address), PAYER.address)
        await take(self.ledger, ALICE)  # a tab with Alice

    async def close(self) -> None:
        """Closes everything."""
        for auditor in self.auditors:
            await auditor.close()
        await self.ledger.close()

    def auditor(self) -> Auditor:
        """A process's auditor."""
        ports = AuditorPorts(
            self.market,
            _Ledger(self),  # type: ignore[arg-type]
            self._coordinator,
            self._send,
            lambda: self.now,
            self._random,
        )
        auditor = Auditor(self.config, PAYER, ports)
        self.auditors.append(auditor)
        return auditor

    def _random(self, size: int) -> bytes:
        return self.draws(size)

    async def _coordinator(self) -> Address:
        return COORDINATOR

    async def _send(self, request: ReportRequest) -> Signed[ReportAck]:
        if self.report_error is not None:
            raise self.report_error
        self.reports.append(request)
        ack = ReportAck(
            coordinator=COORDINATOR,
            report_hash=request.report.message.digest(DOMAIN),
            index=len(self.reports),
            leaf_hash=ZERO_HASH,
            accepted_at=self.now,
        )
        return Signed(ack, bytes(65))  # nothing here checks it


class _Ledger:
    """The ledger, with the spending that a test names."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.block, self.budget_status = world.ledger.block, world.ledger.budget_status

    async def spent_on_jobs(self, _since: int) -> Amount:
        return Amount(self._world.spent)

    async def jobs_of(self, _provider: Address) -> int:
        return self._world.jobs


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A world with three honest referees."""
    world = World(tmp_path, honest_market())
    await world.open()
    yield world
    await world.close()


def offer(world: World, auditor: Auditor, kept: KeptJob, number: bytes = ALWAYS) -> None:
    """Offers a job whose draw is this number; what is drawn after that is random."""
    draws, chance = [number], _chance()
    world.draws = lambda size: draws.pop() if draws else chance(size)
    auditor.offer(kept)


async def test_a_drawn_job_is_audited_and_reported(world: World) -> None:
    """The report is bound to the paid receipt, names no prompt, and is one that the coordinator accepts."""
    auditor = world.auditor()
    kept = sold(ALICE, HONEST)
    offer(world, auditor, kept)
    assert await auditor.work_once() == 1
    audit = await (await auditor.store()).find(kept.job)
    assert audit is not None
    assert (audit.state, audit.verdict) == (AuditState.DONE, Verdict.PASS)
    request = ReportRequest.from_json(world.reports[0].to_json())
    checked = check_report(request, DOMAIN, COORDINATOR, NOW_S)
    assert (checked.verdict, checked.report.message.job) == (AuditVerdict.PASS, kept.job)
    assert b"tally" not in repr(world.reports[0].to_json()).encode().replace(b"Tallystick", b"")
    assert await (await auditor.store()).report_state(audit.id) == "sent"
    (promise,) = await (await auditor.store()).promises()
    assert promise.message.report_hash == world.reports[0].report.message.digest(DOMAIN)


async def test_audits_are_counted_by_outcome(world: World) -> None:
    """Each once, also one that nobody can judge; checks of referees are none of a provider."""
    auditor = world.auditor()
    for model in (HONEST, OTHER_MODEL):
        offer(world, auditor, sold(ALICE, model))
        await auditor.work_once()
    lonely = sold(ALICE, HONEST, consent=PromptConsent(private=True))
    with pytest.raises(Refusal, match="private"):
        await auditor.audit(lonely)
    assert auditor.counts == {"pass": 1, "suspect": 1, "failed": 1}


async def test_the_worker_does_it_by_itself(world: World) -> None:
    """Nobody has to ask."""
    auditor = world.auditor()
    offer(world, auditor, sold(ALICE, HONEST))
    await eventually(lambda: len(world.reports) == 1)


async def test_a_job_above_the_rate_is_not_audited(world: World) -> None:
    """Nor is anything opened for it."""
    auditor = world.auditor()
    offer(world, auditor, sold(ALICE, HONEST), NEVER)
    await auditor.kept_jobs.flush()
    assert not world.config.audits_path(PAYER.address).exists()


async def test_a_confirmed_provider_is_blocked_with_evidence(world: World) -> None:
    """The ledger refuses it, the file convinces others, and the report names the file's digest."""
    auditor = world.auditor()
    for _ in range(2):
        offer(world, auditor, sold(ALICE, OTHER_MODEL))
        await auditor.work_once()
    assert ALICE.address in await world.ledger.blocked(DOMAIN)
    file = next((world.config.ledger_path(PAYER.address).parent / "evidence").glob("audit-*.json"))
    read_audit_evidence(file.read_bytes()).check()
    assert [AuditVerdict(report.report.message.verdict) for report in world.reports] == [
        AuditVerdict.SUSPECT,
        AuditVerdict.CONFIRMED,
    ]
    assert any(world.reports[-1].report.message.evidence_hash)
    await (await auditor.store()).pardon(ALICE.address)
    await world.ledger.unblock(ALICE.address, NOW_S)
    offer(world, auditor, sold(ALICE, OTHER_MODEL))
    await auditor.work_once()
    assert ALICE.address not in await world.ledger.blocked(DOMAIN)


@pytest.mark.parametrize(
    ("consent", "kind"),
    [(SHARED, AuditKind.JOB), (PromptConsent(), AuditKind.SYNTHETIC), (PromptConsent(private=True), AuditKind.SYNTHETIC)],
)
async def test_what_may_not_be_shown_is_made_up(world: World, consent: PromptConsent, kind: AuditKind) -> None:
    """The audit is of the same provider; no referee sees a word of the real request."""
    auditor = world.auditor()
    offer(world, auditor, sold(ALICE, HONEST, consent=consent))
    await auditor.work_once()
    world.now += 600
    await auditor.work_once()
    (audit,) = await (await auditor.store()).latest(5)
    assert (audit.kind, audit.state) == (kind, AuditState.DONE)
    shown = repr([request.to_json() for _, request in world.market.asked])
    assert ("What is a tally?" in shown) is (kind is AuditKind.JOB)


async def test_an_empty_budget_stops_audits(world: World) -> None:
    """They wait; jobs are kept all the same, and what a person asks for is done."""
    world.spent = 0
    auditor = world.auditor()
    kept = sold(ALICE, HONEST)
    offer(world, auditor, kept)
    assert await auditor.work_once() == 0
    assert world.market.asked == []
    assert "budget_percent): it costs about 0.0" in (await (await auditor.store()).latest(1))[0].reason
    conclusion = await auditor.audit(kept)
    assert conclusion.verdict is Verdict.PASS
    known = await (await auditor.store()).find(kept.job)
    assert known is not None
    assert known.verdict is Verdict.PASS
    world.spent = 10**9
    assert await auditor.work_once() == 0, "it was paid for already"
    other = sold(ALICE, HONEST)
    offer(world, auditor, other)
    assert await auditor.work_once() == 1


async def test_the_budget_is_a_share_of_the_spending(world: World) -> None:
    """3 percent of 1,000,000 base units, less what audits cost."""
    world.spent = 1_000_000
    auditor = world.auditor()
    assert await auditor.allowance() == 30_000
    offer(world, auditor, sold(ALICE, HONEST))
    await auditor.work_once()
    cost = (await (await auditor.store()).latest(1))[0].cost
    assert cost > 0
    assert await auditor.allowance() == 30_000 - cost


async def test_the_users_own_budgets_are_left_to_jobs(tmp_path: Path) -> None:
    """Once a budget is nearly used up, audits wait."""
    world = World(tmp_path, honest_market(), budgets=(Budget(per_day=Amount(1)),))
    await world.open()
    try:
        auditor = world.auditor()
        offer(world, auditor, sold(ALICE, HONEST))
        assert await auditor.work_once() == 0
        assert world.market.asked == []
        assert "[[budgets]] is nearly used up" in (await (await auditor.store()).latest(1))[0].reason
    finally:
        await world.close()


async def test_what_was_drawn_survives_the_process(world: World) -> None:
    """SIGTERM writes what waits; the next process audits it, and keeps what could be audited by hand."""
    first = world.auditor()
    kept = sold(ALICE, HONEST)
    offer(world, first, kept)
    await first.close()
    second = world.auditor()
    assert await second.kept_jobs.find(kept.job) == kept
    assert await second.work_once() == 1


async def test_one_process_audits_at_a_time(world: World) -> None:
    """Two processes of a wallet do not pay for the same audit."""
    first, second = world.auditor(), world.auditor()
    await first.work_once()
    offer(world, second, sold(ALICE, HONEST))
    assert await second.work_once() == 0
    assert world.market.asked == []
    await second.close()
    assert await first.work_once() == 1


async def test_a_market_that_is_down_postpones(world: World) -> None:
    """The audit is done later, and nothing is lost."""
    auditor = world.auditor()
    offer(world, auditor, sold(ALICE, HONEST))
    await auditor._take_drawn()
    world.market.failure = Unavailable(Code.COORDINATOR_UNAVAILABLE, "down")
    assert await auditor.work_once() == 0
    world.market.failure = None
    assert await auditor.work_once() == 0
    world.now += 3_600
    assert await auditor.work_once() == 1


async def test_a_coordinator_that_takes_no_report_changes_nothing(world: World) -> None:
    """One that is down gets it later; one that refuses it does not."""
    auditor = world.auditor()
    world.report_error = Unavailable(Code.COORDINATOR_UNAVAILABLE, "down")
    offer(world, auditor, sold(ALICE, HONEST))
    assert await auditor.work_once() == 1
    world.report_error, world.now = None, world.now + 600
    await auditor.work_once()
    assert len(world.reports) == 1
    world.report_error = Refusal(Code.BAD_MESSAGE, "no")
    kept = sold(ALICE, HONEST)
    offer(world, auditor, kept)
    await auditor.work_once()
    store = await auditor.store()
    audit = await store.find(kept.job)
    assert audit is not None
    assert await store.report_state(audit.id) == "refused: no"


async def test_a_no_counts_at_once(world: World) -> None:
    """Audits that wait show nothing any more; one that a person asks for is that person's word."""
    auditor = world.auditor()
    kept = sold(ALICE, HONEST)
    world.spent = 0
    offer(world, auditor, kept)
    await auditor.work_once()
    write_answer(world.config.consent_path(PAYER.address), share=False, now=1)
    world.spent = 10**9
    assert await auditor.work_once() == 0
    assert world.market.asked == []
    await auditor.audit(kept)
    assert len(world.market.asked) == 1


async def test_by_hand_says_why_not(world: World) -> None:
    """Before anything is paid."""
    auditor = world.auditor()
    short = sold(ALICE, HONEST, length=3)
    with pytest.raises(BadMessage, match="too short"):
        await auditor.audit(short)
    forged = replace(sold(ALICE, HONEST), evidence=sold(ALICE, HONEST).evidence)
    with pytest.raises(BadMessage, match="not that of the receipt"):
        await auditor.audit(forged)
    assert world.market.asked == []


async def test_a_try_in_vain_hides_no_verdict(world: World) -> None:
    """Of several audits of a job, the one that ended with a verdict is shown."""
    auditor, kept = world.auditor(), sold(ALICE, HONEST)
    await auditor.audit(kept)
    store = await auditor.store()
    number = await store.add(NewAudit(AuditKind.JOB, Origin.ASKED, kept.provider, kept.model, kept.precision, kept.job.hex()), 0)
    assert number is not None
    await store.fail(number, "nobody can judge it", 0)
    known = await store.find(kept.job)
    assert known is not None
    assert (known.state, known.verdict) == (AuditState.DONE, Verdict.PASS)


async def test_a_paid_audit_is_not_paid_twice_without_a_word(world: World) -> None:
    """By whomever it was asked for, and while it waits. A word pays again; a free audit and a failed one need none."""
    auditor, kept = world.auditor(), sold(ALICE, HONEST)
    await auditor.audit(kept)
    asked = len(world.market.asked)
    with pytest.raises(Refusal, match=r"was audited before, as audit 1, for 0\.[0-9]+ dollars: pass.*--again"):
        await auditor.audit(kept)
    assert len(world.market.asked) == asked
    assert (await auditor.audit(kept, again=True)).verdict is Verdict.PASS
    assert len(world.market.asked) == asked + 1


async def test_an_audit_that_waits_is_done_at_once_if_a_person_asks(world: World) -> None:
    """And not once more in its turn. One that another command is doing is not done twice."""
    auditor, drawn = world.auditor(), sold(ALICE, HONEST)
    offer(world, auditor, drawn)
    await auditor._take_drawn()
    assert (await auditor.audit(drawn)).audit.id == 2
    assert await auditor.work_once() == 0
    assert len(world.market.asked) == 1
    asked = sold(ALICE, HONEST)
    new = NewAudit(
        AuditKind.JOB, Origin.ASKED, asked.provider, asked.model, asked.precision, asked.job.hex(), asked.pack(), 3_600
    )
    assert await (await auditor.store()).add(new, NOW_S) == 3
    with pytest.raises(Refusal, match=r"is being audited by another command, as audit 3.*--again"):
        await auditor.audit(asked)


async def test_an_audit_that_cost_nothing_needs_no_word(world: World) -> None:
    """An engine of the user's own judges as often as it is asked; so does anybody after a try that failed."""
    auditor, kept = world.auditor(), sold(ALICE, HONEST)
    store = await auditor.store()
    new = NewAudit(AuditKind.JOB, Origin.ASKED, kept.provider, kept.model, kept.precision, kept.job.hex())
    for end in (store.finish, None):
        number = await store.add(new, NOW_S)
        assert number is not None
        if end is None:
            await store.fail(number, "nobody can judge it", NOW_S)
        else:
            await end(number, AuditEnd(Verdict.PASS, ""), NOW_S)
        await auditor.check_unpaid(kept.job)


async def test_a_report_waits_for_a_random_time(tmp_path: Path) -> None:
    """At most as long as the config says, in the background and by hand, also over a restart."""
    world = World(tmp_path, honest_market(), report_delay=900)
    await world.open()
    try:
        sent_at = list[int]()
        for number in range(12):
            auditor = world.auditor()
            if number % 2:
                await auditor.audit(sold(ALICE, HONEST))
            else:
                offer(world, auditor, sold(ALICE, HONEST))
                await auditor.work_once()
            world.draws = random.Random(number).randbytes
            assert len(world.reports) == number, "nothing was sent yet"
            await auditor.close()
            began, auditor = world.now, world.auditor()
            while len(world.reports) == number:
                world.now += 60
                assert world.now <= began + 960
                await auditor.work_once()
            sent_at.append(world.now - began)
            await auditor.close()
        assert len(set(sent_at)) > 2
    finally:
        await world.close()

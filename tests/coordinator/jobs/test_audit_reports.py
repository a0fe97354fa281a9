"""Reports of audits: bound to a job that was paid here, logged once, counted by weight, and there after a restart."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import generate_latest

from coordinator.domain.ask_book import AskBook
from coordinator.domain.integrity_records import (
    DAILY_EFFECT,
    DAY_SECONDS,
    HALF_WEIGHT,
    UNAUDITED,
    ProductKey,
    RecordChange,
    Standing,
)
from coordinator.domain.job_aliases import JobAliases
from coordinator.domain.log_check import LogReplay
from coordinator.http.metrics import CoordinatorMetrics
from coordinator.jobs.audit_reports import REPORTS_BURST
from coordinator.jobs.report_store import MemoryReportStore, StoredReport
from tallystick.protocol.audit_reports import AuditVerdict, ReportRequest, build_report
from tallystick.protocol.eip712 import Signed, Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError, Unavailable
from tallystick.protocol.log_leaves import ReportLeaf
from tallystick.protocol.match_log import MatchLeaf, draw_of, load_leaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.messages import ProbeSeal, Receipt, ReportAck, Spec
from tallystick.protocol.types import Address, Amount, Hash, JobId
from tests.coordinator.harness import COORDINATOR, DOMAIN, MODEL, PAYER, FakeNode, World, person, quiet

PASS, SUSPECT, CONFIRMED, UNVERIFIABLE = AuditVerdict
Paid = tuple[JobId, Verified[Receipt]]


async def paid_job(world: World, node: FakeNode) -> Paid:
    """A job that ended with a receipt."""
    client = await world.place(node)
    await quiet()
    node.accept(client.job.id)
    await quiet()
    receipt = node.complete(client.job.id)
    await quiet()
    return client.job.id, receipt


def request(paid: Paid, verdict: AuditVerdict = SUSPECT, *, seals: bool = False, salt: int = 0, **changes: Any) -> ReportRequest:
    """A report on a paid job; changes are signed too."""
    job, receipt = paid
    report = build_report(
        receipt,
        COORDINATOR.address,
        job,
        (MODEL, "unknown"),
        verdict,
        reported_at=receipt.message.finished_at,
        random=lambda size: bytes((salt,)) * size,
    )
    signed = PAYER.sign(replace(report, **changes), DOMAIN)
    seal = ProbeSeal(coordinator=COORDINATOR.address, report_hash=signed.digest)
    return ReportRequest(signed, receipt, COORDINATOR.sign(seal, DOMAIN) if seals else None)


def pay(world: World, provider: Address, amount: int = HALF_WEIGHT) -> None:
    """Notes that the payer settled this much with a provider."""
    assert isinstance(world.report_store, MemoryReportStore)
    world.report_store.settled[PAYER.address] = {provider: Amount(amount)}


def standing(world: World, node: FakeNode) -> Standing:
    """The standing of a node's product."""
    return world.market.matchmaker.integrity.standing(ProductKey(node.address, MODEL, "unknown"))


async def report_leaves(world: World) -> list[ReportLeaf]:
    """The reports in the log."""
    await world.market.match_log.flush()
    leaves = [load_leaf(row.leaf or b"") for row in await world.log_store.log_entries(0, 999)]
    return [leaf for leaf in leaves if isinstance(leaf, ReportLeaf)]


async def test_a_report_is_logged_counted_and_acknowledged(world: World) -> None:
    """The acknowledgement names the leaf, the leaf names neither payer nor prompt, and the ask's standing follows at once."""
    await world.market.start()
    node = world.node("ann")
    asked = request(await paid_job(world, node))
    pay(world, person("bob").address)
    ack = await world.market.audit_reports.accept(asked)
    (leaf,) = await report_leaves(world)
    row = (await world.log_store.log_entries(ack.message.index, ack.message.index + 1))[0]
    assert row.leaf == leaf.dumps()
    assert leaf_hash(row.leaf) == ack.message.leaf_hash
    assert ack.message.report_hash == asked.report.message.digest(DOMAIN) == leaf.report_hash
    assert (leaf.provider, leaf.verdict, leaf.weight, leaf.is_probe) == (node.address, SUSPECT, 5_000, False)
    assert bytes.fromhex(PAYER.address[2:]) not in row.leaf
    assert standing(world, node) == (15, 1)
    listed_ask = world.market.book.of_provider(node.address)[0]
    assert (listed_ask.integrity, listed_ask.audits) == (15, 1)


async def test_a_leaf_does_not_say_which_job_was_audited(world: World) -> None:
    """A provider that knows the payers of its jobs learns from the log neither the prober nor who else audits."""
    await world.market.start()
    node = world.node("ann")
    paid = [await paid_job(world, node) for _ in range(2)]
    for entry in paid:
        await world.market.audit_reports.accept(request(entry, PASS, seals=True))
    await world.market.audit_reports.accept(request(paid[0], CONFIRMED, seals=True))
    leaves = await report_leaves(world)
    assert leaves[0].job_alias == leaves[2].job_alias != leaves[1].job_alias  # an audit that counts twice shows
    rows = await world.log_store.log_entries(0, 999)
    matches = [leaf for row in rows if isinstance(leaf := load_leaf(row.leaf or b""), MatchLeaf)]
    seen = [bytes.fromhex(PAYER.address[2:])]
    for (job, receipt), match in zip(paid, matches, strict=True):
        seen += [job, receipt.digest, receipt.message.order_hash, match.commitment, match.chosen.ask]
    for leaf in leaves:
        assert not [known for known in seen if known in leaf.dumps()]
        shared = {name for name, value in leaf.to_json().items() if any(value == match.to_json().get(name) for match in matches)}
        assert shared <= {"at", "epoch", "model"}
    strangers = JobAliases(person("eve").secret)
    assert {strangers.alias_of(job) for job, _ in paid}.isdisjoint(leaf.job_alias for leaf in leaves)


async def test_the_same_report_counts_once(world: World) -> None:
    """Sent again it gets the same answer; another report of the same job is refused by name."""
    await world.market.start()
    node = world.node("ann")
    paid = await paid_job(world, node)
    first = await world.market.audit_reports.accept(request(paid))
    again = await asyncio.gather(*(world.market.audit_reports.accept(request(paid)) for _ in range(5)))
    assert {ack.signature for ack in again} == {first.signature}
    with pytest.raises(Refusal) as refused:
        await world.market.audit_reports.accept(request(paid, PASS, salt=1))
    assert refused.value.code is Code.REPORT_REPLAYED
    await world.market.audit_reports.accept(request(paid, CONFIRMED))
    assert [leaf.verdict for leaf in await report_leaves(world)] == [SUSPECT, CONFIRMED]
    assert standing(world, node).audits == 0  # this payer settled nothing


async def refusal(world: World, asked: ReportRequest) -> TallyError:
    """The error of a report, which left no trace."""
    before = await report_leaves(world)
    with pytest.raises(TallyError) as refused:
        await world.market.audit_reports.accept(asked)
    assert await report_leaves(world) == before
    return refused.value


async def test_reports_that_are_bound_to_no_paid_job_have_no_effect(world: World) -> None:
    """A job that is unknown here, of another payer, with another receipt, or of another product is named."""
    await world.market.start()
    node, other = world.node("ann"), world.node("bob")
    pay(world, other.address)
    paid, of_other = await paid_job(world, node), await paid_job(world, other)
    unknown = await refusal(world, request(paid, job=JobId(b"\xee" * 16)))
    assert unknown.code is Code.UNKNOWN_JOB
    assert (await refusal(world, request((of_other[0], paid[1])))).code is Code.UNKNOWN_JOB
    made_up = node.signer.sign(replace(paid[1].message, seq=9, cumulative_cost=Amount(999)), DOMAIN)
    assert "receipt: expected the one" in str(await refusal(world, request((paid[0], made_up))))
    assert "report.model" in str(await refusal(world, request(paid, model="another")))
    assert "report.precision" in str(await refusal(world, request(paid, precision="fp8")))
    assert standing(world, node) == UNAUDITED


async def test_a_job_without_a_receipt_yet_cannot_be_reported(world: World) -> None:
    """A provider that signs receipts for a payer of its own cannot praise itself with jobs that never ended here."""
    await world.market.start()
    node = world.node("ann")
    client = await world.place(node)
    await quiet()
    node.accept(client.job.id)
    await quiet()
    error = await refusal(world, request((client.job.id, node.receipt(client.job.id))))
    assert isinstance(error, BadMessage)
    assert "none yet" in str(error)


async def test_a_flood_of_reports_is_bounded(world: World) -> None:
    """A payer has a burst, and then one a second; others are not held up."""
    await world.market.start()
    node = world.node("ann")
    asked = request(await paid_job(world, node))
    for _ in range(REPORTS_BURST):
        await world.market.audit_reports.accept(asked)
    with pytest.raises(Unavailable, match=PAYER.address) as refused:
        await world.market.audit_reports.accept(asked)
    assert refused.value.code is Code.RATE_LIMITED
    world.clock.seconds += 2
    await world.market.audit_reports.accept(asked)
    assert len(await report_leaves(world)) == 1


async def test_a_probe_of_the_coordinator_counts_in_full(world: World) -> None:
    """A sealed report needs no payments, and convicts by itself: the provider comes last."""
    await world.market.start()
    node = world.node("ann")
    await world.market.audit_reports.accept(request(await paid_job(world, node), CONFIRMED, seals=True))
    (leaf,) = await report_leaves(world)
    assert (leaf.is_probe, leaf.weight) == (True, 10_000)
    assert standing(world, node) == (0, 1)


async def test_reports_survive_a_restart(world: World) -> None:
    """Integrity is as before, the acknowledgement too, and the whole log replays without a fault."""
    world.market.matchmaker.draw = draw_of
    await world.market.start()
    node = world.node("ann")
    pay(world, person("bob").address)
    asked = request(await paid_job(world, node))
    ack, before = await world.market.audit_reports.accept(asked), standing(world, node)
    await world.restart()
    world.market.matchmaker.draw = draw_of
    assert standing(world, node) == before
    assert (await world.market.audit_reports.accept(asked)).message == ack.message
    await paid_job(world, node)
    await world.market.match_log.flush()
    replay = LogReplay()
    rows = await world.log_store.log_entries(0, 999)
    assert [fault for row in rows for fault in replay.add(leaf_hash(row.leaf or b""), row.leaf)] == []
    assert (replay.reports, replay.matches) == (1, 2)


class BrokenStore(MemoryReportStore):
    """A database that fails after the leaf was written."""

    broken = True

    async def put_report(self, report: StoredReport, change: Any, since: int) -> None:
        if self.broken:
            raise Unavailable(Code.DATABASE_UNAVAILABLE, "the disk is full")
        await super().put_report(report, change, since)


@pytest.mark.parametrize("restarts", [True, False])
async def test_a_report_whose_record_was_lost_is_counted_from_the_log(restarts: bool) -> None:
    """Whether the process dies or the database comes back: one leaf, one count, and the same acknowledgement as ever."""
    store = BrokenStore()
    world = World(report_store=store)
    await world.market.start()
    node = world.node("ann")
    pay(world, person("bob").address)
    asked = request(await paid_job(world, node))
    with pytest.raises(Unavailable):
        await world.market.audit_reports.accept(asked)
    store.broken = False
    if restarts:
        await world.restart()
        assert standing(world, node).audits == 1
    ack = await world.market.audit_reports.accept(asked)
    assert standing(world, node).audits == 1
    assert len(await report_leaves(world)) == 1
    assert store.reports[(asked.report.message.job, node.address, False)].payer == PAYER.address
    assert isinstance(ack.message, ReportAck)


async def test_one_payer_counts_less_with_each_report(world: World) -> None:
    """The second report on the same product counts half as much as the first."""
    await world.market.start()
    node = world.node("ann")
    pay(world, person("bob").address)
    for _ in range(3):
        await world.market.audit_reports.accept(request(await paid_job(world, node)))
    assert [leaf.weight for leaf in await report_leaves(world)] == [5_000, 2_500, 1_666]


async def test_an_ask_that_is_gone_must_come_with_the_report(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its ask is withdrawn, a provider's own payer can choose no product: neither an invented one nor another real one."""
    await world.market.start()
    node = world.node("ann")
    pay(world, person("bob").address)
    paid = [await paid_job(world, node) for _ in range(3)]
    await world.market.audit_reports.accept(request(paid[0], CONFIRMED, seals=True))
    (listed_ask,) = world.market.book.of_provider(node.address)
    sold = Signed(listed_ask.message, listed_ask.signature)
    other = node.signer.sign(replace(sold.message, spec=Spec(precision="fp8")), DOMAIN)
    forged = Signed(sold.message, other.signature)
    monkeypatch.setattr(AskBook, "find", lambda _book, _digest: None)
    for precision in ("made-up", "fp8", "unknown"):
        assert "ask: expected the job's ask in the request" in str(
            await refusal(world, request(paid[1], PASS, precision=precision))
        )
    wrong = replace(request(paid[1], PASS, precision="fp8"), ask=other)
    assert "ask: expected the one that the job's terms name" in str(await refusal(world, wrong))
    assert "report.precision" in str(await refusal(world, replace(request(paid[1], PASS, precision="fp8"), ask=sold)))
    assert (await refusal(world, replace(request(paid[1]), ask=forged))).code is Code.BAD_SIGNATURE
    await world.market.audit_reports.accept(replace(request(paid[1], SUSPECT), ask=sold))
    await world.market.audit_reports.accept(request(paid[2], SUSPECT, seals=True))  # the coordinator believes itself
    assert standing(world, node) == (0, 3)


async def test_a_report_that_counts_nothing_begins_no_record(world: World) -> None:
    """It is logged and acknowledged, and stays without effect after a restart."""
    await world.market.start()
    node = world.node("ann")
    asked = request(await paid_job(world, node), PASS)
    first = await world.market.audit_reports.accept(asked)
    await world.restart()
    assert (await world.market.audit_reports.accept(asked)).message == first.message
    assert [leaf.weight for leaf in await report_leaves(world)] == [0]
    assert isinstance(world.report_store, MemoryReportStore)
    assert world.report_store.records == {}


@pytest.mark.parametrize("verdict", [PASS, SUSPECT])
async def test_all_payers_together_are_bounded_in_a_day(world: World, verdict: AuditVerdict) -> None:
    """Coins that go round lend weight to key after key: the day's bound is kept over restarts, and not shared with probes."""
    await world.market.start()
    node = world.node("ann")
    pay(world, person("bob").address, HALF_WEIGHT * 99)
    paid = [await paid_job(world, node) for _ in range(6)]
    earlier = StoredReport(
        (JobId(b"\xaa" * 16), node.address, False),
        person("eve").address,
        ProductKey(node.address, MODEL, "unknown"),
        int(world.clock.now()),
        0,
        Hash(bytes(32)),
        Hash(bytes(32)),
        praises=verdict is PASS,
        effect=DAILY_EFFECT - 1_000,
    )
    await world.report_store.put_report(earlier, RecordChange(earlier.product, None), 0)
    await world.market.audit_reports.accept(request(paid[0], verdict, seals=True))
    for entry in paid[1:3]:
        await world.market.audit_reports.accept(request(entry, verdict))
    await world.restart()
    await world.market.audit_reports.accept(request(paid[3], verdict))
    other = SUSPECT if verdict is PASS else PASS
    await world.market.audit_reports.accept(request(paid[4], other))
    world.clock.seconds += DAY_SECONDS + 1
    await world.market.audit_reports.accept(request(paid[5], verdict))
    weights = [leaf.weight for leaf in await report_leaves(world)]
    assert weights[0] == (2_500 if verdict is PASS else 10_000)
    assert weights[1:4] == [1_000, 0, 0]
    assert weights[4] > 0
    assert weights[5] > 0


def test_strangers_cannot_seal() -> None:
    """Only this coordinator's key makes a report a probe."""
    stranger = Signer(b"\x07" * 32)
    with pytest.raises(ValueError, match="does not name this key"):
        stranger.sign(ProbeSeal(coordinator=COORDINATOR.address, report_hash=Hash(bytes(32))), DOMAIN)


async def test_reports_are_counted_in_metrics(world: World) -> None:
    """By verdict and by who audited; one that is sent again counts once, and a refused one apart."""
    await world.market.start()
    node = world.node("ann")
    paid = [await paid_job(world, node) for _ in range(3)]
    reports = world.market.audit_reports
    await reports.accept(request(paid[0], PASS, seals=True))
    await reports.accept(request(paid[0], PASS, seals=True))
    for entry in paid[1:]:
        await reports.accept(request(entry, UNVERIFIABLE))
    for changes in ({"model": "other"}, {"job": bytes(16)}):
        with pytest.raises((BadMessage, Refusal)):
            await reports.accept(request(paid[0], **changes))
    metrics = CoordinatorMetrics(lambda: None)
    metrics.watch_reports(lambda: reports.counts)
    text = generate_latest(metrics.registry).decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tallystick_coordinator_audit_reports"))
    counted = {name.removeprefix("tallystick_coordinator_audit_reports"): float(value) for name, value in lines if float(value)}
    assert {name: value for name, value in counted.items() if "created" not in name} == {
        '_total{source="probe",verdict="pass"}': 1,
        '_total{source="payer",verdict="unverifiable"}': 2,
        "_refused_total": 2,
    }

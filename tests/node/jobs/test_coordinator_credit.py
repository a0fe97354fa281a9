"""What a coordinator can make a node work for nothing: bounded, counted, and the end of the service to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from node.domain.admission_rules import AdmissionRules
from node.jobs.coordinator_credit import HOUR, HOURS, CoordinatorCredit
from node.jobs.deadlines import Deadlines
from node.ports import CoordinatorHour, ResponseEnd, ResponsePart, ResponseStart
from node.testing.memory import MemoryLink, MemoryStore, ScriptedEngine
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.types import Amount
from tallystick.protocol.usage_reports import ReportedUsage
from tallystick.protocol.wire import CancelReason, Kind
from tests.node.harness import COORDINATOR, NOW, PAYER, PRICES, Client, PlacedJob, RunnerHarness, signer

HEAD = ResponseStart(200, "text/event-stream")
ONE = ResponsePart(b"one.", has_output=True, text_bytes=4)
END = ResponseEnd(b"done", usage=ReportedUsage(20, 5, 10))
HERE = "coordinator.example:443"


def hang() -> Awaitable[object]:
    """Returns a step of an engine that never continues."""
    return asyncio.Event().wait()


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def make_credit(clock: Clock, store: MemoryStore | None = None, *, floor: int = 100, percent: int = 5) -> CoordinatorCredit:
    """Returns coordinator credit without a history."""
    rules = AdmissionRules(max_unpaid=Amount(floor), max_unpaid_percent=percent)
    return CoordinatorCredit(store or MemoryStore(), rules, now=clock)


def test_a_coordinator_is_suspended_beyond_the_limit() -> None:
    """At the limit a coordinator is still served; one base unit more suspends it, with the amounts in the reason."""
    credit = make_credit(Clock())
    credit.record_unpaid(HERE, Amount(100))
    credit.require_served(HERE)
    credit.record_unpaid(HERE, Amount(1))
    with pytest.raises(Unavailable, match=r"left 0\.000101 dollars of this provider's work unpaid") as caught:
        credit.require_served(HERE)
    assert (caught.value.code, caught.value.fault) == (Code.NODE_BUSY, Fault.COORDINATOR)
    credit.require_served("another.example:443")


def test_the_limit_grows_with_earnings() -> None:
    """Beyond the minimum, the limit is a share of the day's earnings through the same coordinator."""
    credit = make_credit(Clock())
    credit.record_earned(HERE, Amount(10_000))
    credit.record_earned("another.example:443", Amount(10**9))
    credit.record_unpaid(HERE, Amount(500))
    assert credit.serves(HERE)
    credit.record_unpaid(HERE, Amount(1))
    assert not credit.serves(HERE)


async def test_a_day_later_it_is_served_again() -> None:
    """Unpaid work counts for 24 to 25 hours; then the coordinator is served again, without a restart."""
    clock, changes = Clock(), list[str]()
    credit = make_credit(clock)
    credit.on_change = lambda: changes.append("changed")
    credit.record_unpaid(HERE, Amount(101))
    assert changes == ["changed"]
    clock.now += HOURS * HOUR
    await credit.refresh()
    assert not credit.serves(HERE)
    clock.now += HOUR
    await credit.refresh()
    assert credit.serves(HERE)
    assert (changes, credit.status()) == (["changed", "changed"], {})


async def test_a_restart_keeps_the_totals() -> None:
    """Unpaid work and earnings are known to the next process."""
    clock, store = Clock(), MemoryStore()
    credit = make_credit(clock, store)
    credit.record_earned(HERE, Amount(7))
    credit.record_unpaid(HERE, Amount(101))
    await credit.save()
    again = CoordinatorCredit(store, credit.rules, await store.coordinator_hours(NOW // HOUR - HOURS), now=clock)
    assert not again.serves(HERE)
    assert again.status() == {HERE: {"served": False, "earned": "7", "writtenOff": "101"}}


async def test_a_full_disk_only_delays_saving() -> None:
    """Totals that cannot be saved still count, and are saved with the next."""
    clock, store = Clock(), MemoryStore()
    credit = make_credit(clock, store)
    store.fault = Unavailable(Code.PROVIDER_FAILED, "disk full")
    credit.record_unpaid(HERE, Amount(101))
    await credit.save()
    assert not credit.serves(HERE)
    store.fault = None
    await credit.save()
    assert await store.coordinator_hours(0) == [CoordinatorHour(HERE, NOW // HOUR, Amount(0), Amount(101))]


async def test_totals_older_than_a_day_are_dropped() -> None:
    """One row is kept for each coordinator and hour of a day."""
    clock = Clock()
    credit = make_credit(clock)
    for _ in range(100):
        credit.record_earned(HERE, Amount(1))
        clock.now += HOUR
        await credit.refresh()
    assert len(credit._hours) <= HOURS + 1
    assert credit.totals(HERE)[0] <= HOURS + 1


Trick = Callable[[RunnerHarness, PlacedJob], None]


def drop_the_link(harness: RunnerHarness, _placed: PlacedJob) -> None:
    """Loses the connection."""
    harness.link.disconnect()
    harness.runner.link_lost(harness.link)


def cancel_for_timeout(harness: RunnerHarness, placed: PlacedJob) -> None:
    """Sends CANCEL with the reason timed out."""
    harness.runner.cancel(harness.link, placed.job, CancelReason.TIMED_OUT)


def cancel_by_coordinator(harness: RunnerHarness, placed: PlacedJob) -> None:
    """Sends CANCEL with the coordinator's own reason."""
    harness.runner.cancel(harness.link, placed.job, CancelReason.COORDINATOR)


def cancel_for_another_provider(harness: RunnerHarness, placed: PlacedJob) -> None:
    """Sends CANCEL because another provider was faster."""
    harness.runner.cancel(harness.link, placed.job, CancelReason.HEDGED)


TRICKS = [drop_the_link, cancel_for_timeout, cancel_by_coordinator, cancel_for_another_provider]


@pytest.mark.parametrize("trick", TRICKS)
async def test_a_response_cut_by_its_coordinator_is_unpaid_work(trick: Trick) -> None:
    """A job stopped in mid-response charges nothing and sends no last chunk; its cost so far counts as unpaid."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 10, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 11)
    trick(harness, placed)
    await harness.ended()
    receipt = harness.store.receipt_records[0].receipt.message
    assert receipt.cost == 0
    assert receipt.outcome in (Outcome.PROVIDER_ERROR, Outcome.TIMED_OUT, Outcome.REFUSED)
    assert not harness.answer(placed)[3]
    input_tokens, output_tokens = (len(placed.body) + 3) // 4, 10
    due = (input_tokens * PRICES.input + output_tokens * PRICES.output + 999_999) // 1_000_000
    assert harness.coordinator_credit.totals(HERE) == (0, due)
    assert harness.observer.reports[0].written_off == due


@pytest.mark.parametrize("trick", TRICKS)
async def test_no_last_chunk_leaves_after_a_stop(trick: Trick) -> None:
    """A coordinator that confirmed output and stops the job while its receipt is stored does not get the last chunk."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, END))
    harness.link.on_first_chunk = lambda _job: None
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    for _ in range(20):
        await asyncio.sleep(0)
    trick(harness, placed)
    harness.runner.grant_credit(harness.link, placed.job, bytes(4))
    await harness.ended()
    assert harness.store.receipt_records[0].receipt.message.cost == 0
    assert harness.answer(placed)[1] == b"one."
    assert not harness.answer(placed)[3]
    assert harness.coordinator_credit.totals(HERE)[1] == 5, "all of the work counts, what was held back too"


@pytest.mark.parametrize("trick", TRICKS)
async def test_unused_input_is_unpaid_work(trick: Trick) -> None:
    """A job stopped by its coordinator before any output costs the input once the engine has it."""
    harness = RunnerHarness(engine := ScriptedEngine(HEAD, hang))
    placed = harness.dispatch()
    await engine.called.wait()
    trick(harness, placed)
    await harness.ended()
    tokens = (len(placed.body) + 3) // 4
    assert harness.coordinator_credit.totals(HERE)[1] == (tokens * PRICES.input + 999_999) // 1_000_000


@pytest.mark.parametrize(
    "steps",
    [
        (HEAD, ONE, Unavailable(Code.ENGINE_UNAVAILABLE, "down", fault=Fault.ENGINE)),
        (HEAD, ONE, ZeroDivisionError()),
        (HEAD, ONE, hang),
    ],
    ids=["the engine failed", "the node failed", "the engine fell silent"],
)
async def test_own_failures_do_not_count_against_a_coordinator(steps: tuple[ResponseStart | ResponsePart, ...]) -> None:
    """A failure of this node or its engine is the provider's own loss."""
    harness = RunnerHarness(ScriptedEngine(*steps), deadlines=Deadlines(between_tokens=0.05))
    assert (await harness.receipt(harness.dispatch())).cost == 0
    await harness.ended()
    assert harness.coordinator_credit.totals(HERE) == (0, 0)


async def test_a_shutdown_does_not_count_against_a_coordinator() -> None:
    """Jobs that the node itself stops do not count."""
    harness = RunnerHarness(ScriptedEngine(HEAD, ONE, hang))
    placed = harness.dispatch()
    await harness.link.until(Kind.CHUNK, placed.job, 2)
    await harness.runner.drain(0)
    assert harness.coordinator_credit.totals(HERE) == (0, 0)


async def test_jobs_of_a_suspended_coordinator_are_refused() -> None:
    """They are refused with the reason and a receipt at no cost, under any account; other coordinators are served."""
    harness = RunnerHarness(ScriptedEngine(HEAD, *[ONE] * 10, hang), rules=AdmissionRules(max_unpaid=Amount(20)))
    for n in range(10):
        harness.client = Client(signer(f"payer {n}"))
        placed = harness.dispatch()
        if harness.link.payloads(placed.job, Kind.FAIL) or not harness.coordinator_credit.serves(HERE):
            break
        await harness.link.until(Kind.CHUNK, placed.job, 11)
        cancel_by_coordinator(harness, placed)
        await harness.ended()
    error = await harness.failure(placed)
    assert (error["code"], error["fault"], error["retry"]) == ("node_busy", "coordinator", True)
    assert "served again" in error["message"]
    assert (await harness.refusal_receipt(placed)).outcome == Outcome.REFUSED
    # Every job costs 6 here: the bound, and the one that went beyond it.
    assert 20 < harness.coordinator_credit.totals(HERE)[1] <= 20 + 6
    other = signer("another account of the same coordinator")
    harness.link = MemoryLink(other.address)
    harness.link.on_first_chunk = lambda job: harness.runner.grant_credit(harness.link, job, bytes(4))
    again = harness.client.order(harness.asks.current[0], coordinator=other)
    harness.dispatch_again(again)
    assert (await harness.failure(again))["fault"] == "coordinator"
    harness.link = MemoryLink(COORDINATOR.address, "another.example:443")
    harness.link.on_first_chunk = lambda job: harness.runner.grant_credit(harness.link, job, bytes(4))
    harness.engine.engine = ScriptedEngine(HEAD, ONE, END)
    harness.client = Client(PAYER)
    assert (await harness.receipt(harness.dispatch())).outcome == Outcome.COMPLETED
    assert harness.coordinator_credit.totals("another.example:443") == (5, 0)


async def test_queued_jobs_of_a_suspended_coordinator_do_not_start() -> None:
    """A coordinator gets beyond the limit only the jobs running at that moment and those that took their slots at once; no queued
    job starts.
    """
    engine = ScriptedEngine(HEAD, *[ONE] * 10, hang)
    harness = RunnerHarness(engine, slots=3, rules=AdmissionRules(max_unpaid=Amount(1)), deadlines=Deadlines(queue=3_600))
    placed = [harness.dispatch() for _ in range(6)]
    for placed_job in placed[:3]:
        await harness.link.until(Kind.CHUNK, placed_job.job, 11)
    cancel_by_coordinator(harness, placed[0])
    for placed_job in placed[4:]:
        assert (await harness.failure(placed_job))["fault"] == "coordinator"
        assert (await harness.refusal_receipt(placed_job)).outcome == Outcome.REFUSED
    for placed_job in placed[1:4]:
        cancel_by_coordinator(harness, placed_job)
    await harness.ended()
    assert len(engine.requests) <= 4
    assert 0 < harness.coordinator_credit.totals(HERE)[1] <= 4 * placed[0].terms.max_cost

"""Health checks: one at a time for all who ask, each within its deadline, and an alarm for each change."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from tallystick.protocol.health import CheckResult, Health, HealthReport
from tallystick.runtime.health_monitor import CHECK_SECONDS, FRESH_SECONDS, Check, HealthMonitor
from tests.virtual_time import on_virtual_time

GOOD, LOW, BAD = (
    CheckResult(Health.PASS),
    CheckResult(Health.WARN, "low", "fill it"),
    CheckResult(Health.FAIL, "gone", "start it"),
)


class Dependency:
    """A dependency whose state a test sets. It counts how often it is asked."""

    def __init__(self, result: CheckResult = GOOD) -> None:
        self.result, self.asked = result, 0

    async def check(self) -> dict[str, CheckResult]:
        """Returns the state."""
        self.asked += 1
        await asyncio.sleep(0)
        return {"part": self.result}


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


async def test_strangers_cause_no_load() -> None:
    """Any number of requests cause one check per FRESH_SECONDS, whether they come together or one after another."""
    dependency, clock = Dependency(), Clock()
    monitor = HealthMonitor({"part": dependency.check}, clock=clock)
    reports = await asyncio.gather(*(monitor.report() for _ in range(100)))
    assert {report.status for report in reports} == {Health.PASS}
    for _ in range(100):
        await monitor.report()
        assert monitor.peek() is monitor.last
    assert dependency.asked == 1
    clock.time += FRESH_SECONDS
    dependency.result = BAD
    assert monitor.peek() is reports[0], "liveness does not wait"
    assert (await monitor.report()).status is Health.FAIL
    assert dependency.asked == 2
    await monitor.close()


async def test_a_check_that_hangs_or_fails() -> None:
    """A check that raises or takes too long fails under its own name, with its remedy; the others are reported."""

    async def hang() -> dict[str, CheckResult]:
        await asyncio.Event().wait()
        return {}

    async def fail() -> dict[str, CheckResult]:
        raise ValueError("postgresql://user:s3cret@host/db")

    checks = {"hangs": hang, "fails": fail, "part": Dependency().check}
    monitor = HealthMonitor(checks, {"hangs": "wake it", "fails": "mend it"}, deadline=0.01)
    report = await monitor.report()
    assert report.results["part"] == GOOD
    assert report.results["hangs"] == CheckResult(Health.FAIL, "no answer in time", "wake it")
    assert report.results["fails"] == CheckResult(Health.FAIL, "it does not answer", "mend it")
    assert "s3cret" not in str(report.to_json("1"))
    assert report.http_status == 503


async def test_an_alarm_for_each_change() -> None:
    """Each change of a state is logged once, with what to do; a state that stays is not logged again."""
    dependency, clock = Dependency(LOW), Clock()
    monitor = HealthMonitor({"part": dependency.check}, clock=clock)
    with capture_logs() as lines:
        for result in (LOW, LOW, BAD, BAD, GOOD, GOOD):
            dependency.result = result
            await monitor.report()
            clock.time += FRESH_SECONDS
    logged = [(line["log_level"], line["event"], line.get("problem"), line.get("do")) for line in lines]
    assert logged == [
        ("warning", "alarm", "low", "fill it"),
        ("error", "alarm", "gone", "start it"),
        ("info", "dependency works again", None, None),
    ]


async def test_it_checks_without_being_asked() -> None:
    """The background loop checks at once, so that a warning comes at the start."""
    monitor = HealthMonitor({"part": Dependency(BAD).check})
    running = asyncio.create_task(monitor.run())
    while monitor.last is None:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    running.cancel()
    assert monitor.last.results == {"part": BAD}


@on_virtual_time
async def test_a_failure_is_soon_checked_again() -> None:
    """What failed for a moment, as at a daemon's start, is not shown as failing for CHECK_SECONDS. A warning can wait."""
    dependency, loop = Dependency(BAD), asyncio.get_running_loop()
    monitor = HealthMonitor({"part": dependency.check}, clock=loop.time)
    running = asyncio.create_task(monitor.run())
    start = loop.time()
    await asyncio.sleep(FRESH_SECONDS / 2)
    dependency.result = LOW
    await asyncio.sleep(FRESH_SECONDS)
    assert (monitor.last and monitor.last.results, dependency.asked) == ({"part": LOW}, 2)
    await asyncio.sleep(CHECK_SECONDS / 2)
    assert (dependency.asked, loop.time() - start < CHECK_SECONDS) == (2, True)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.mark.parametrize("names", ["ab", "ba"])
async def test_two_checks_of_one_dependency(names: str) -> None:
    """Two checks may tell of one dependency, such as of the clock: the worse state counts, in whatever order they come."""
    results = {"a": {"clock": GOOD}, "b": {"clock": LOW}}

    def check_of(name: str) -> Check:
        async def check() -> dict[str, CheckResult]:
            return results[name]

        return check

    report = await HealthMonitor({name: check_of(name) for name in names}).report()
    assert report.results == {"clock": LOW}


def test_the_format() -> None:
    """A report has the draft's members; the worst state decides, and only a failure gives 503."""
    results = {"a": CheckResult(Health.PASS, value=0, unit="ms"), "b": LOW}
    report = HealthReport(results, 0)
    assert report.to_json("9") == {
        "status": "warn",
        "version": "9",
        "checks": {
            "a": [{"status": "pass", "time": "1970-01-01T00:00:00+00:00", "observedValue": 0, "observedUnit": "ms"}],
            "b": [{"status": "warn", "time": "1970-01-01T00:00:00+00:00", "output": "low", "remedy": "fill it"}],
        },
    }
    assert report.http_status == 200
    assert HealthReport(results | {"c": BAD}, 0).http_status == 503
    assert HealthReport({"a": GOOD}, 0).status is Health.PASS
    assert report.summary == {"a": "pass", "b": "warn"}

"""Watches the dependencies of a daemon: checks them in the background, caches the report, and raises alarms.

Requests read the cached report. If it is older than FRESH_SECONDS, one check runs for all who ask, so that strangers cannot make
a daemon ask its database or its chain more often than that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

import structlog

from tallystick.protocol.health import CheckResult, Health, HealthReport

FRESH_SECONDS = 5.0
CHECK_SECONDS = 30.0
"""The time between two checks if nobody asks."""
DEADLINE_SECONDS = 8.0
"""How long one check may take."""

Check = Callable[[], Awaitable[Mapping[str, CheckResult]]]
"""Returns the states of one or several dependencies, by name. May raise anything: then the check's own name fails."""
log = structlog.get_logger()
_SEVERITY = {Health.PASS: 0, Health.WARN: 1, Health.FAIL: 2}


class HealthMonitor:
    """The health of one daemon. Call `run` in the background; `report` works without it."""

    def __init__(
        self,
        checks: Mapping[str, Check],
        remedies: Mapping[str, str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        deadline: float = DEADLINE_SECONDS,
    ) -> None:
        """`remedies`: what to do if a check gives no result, by its name."""
        self._remedies = remedies or {}
        self._checks, self._clock, self._now, self._deadline = checks, clock, now, deadline
        self._running: asyncio.Task[HealthReport] | None = None
        self._last: HealthReport | None = None
        self._last_at = 0.0
        self._alarmed: dict[str, Health] = {}

    @property
    def last(self) -> HealthReport | None:
        """The latest report; None before the first check has ended."""
        return self._last

    def peek(self) -> HealthReport | None:
        """The latest report, without waiting. If it is old, a check begins."""
        self._refresh()
        return self._last

    async def report(self) -> HealthReport:
        """A report that is at most FRESH_SECONDS old."""
        running = self._refresh()
        if running is not None:
            return await asyncio.shield(running)
        if self._last is None:
            raise RuntimeError("a fresh report exists, or a check runs")
        return self._last

    def _refresh(self) -> asyncio.Task[HealthReport] | None:
        """The running check, which is started if the report is old; None if the report is fresh."""
        if self._running is None and (self._last is None or self._clock() - self._last_at >= FRESH_SECONDS):
            self._running = asyncio.create_task(self._check_all(), name="health-check")
        return self._running

    async def run(self) -> None:
        """Checks until cancelled, so that alarms are raised without a request. What fails is soon checked again: much fails only
        for a second, at a daemon's start.
        """
        while True:
            report = await self.report()
            await asyncio.sleep(FRESH_SECONDS if report.status is Health.FAIL else CHECK_SECONDS)

    async def close(self) -> None:
        """Ends a check that still runs."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _check_all(self) -> HealthReport:
        try:
            groups = await asyncio.gather(*(self._check_one(name, check) for name, check in self._checks.items()))
            results: dict[str, CheckResult] = {}
            for name, result in (named for group in groups for named in group.items()):
                if name not in results or _SEVERITY[result.status] > _SEVERITY[results[name].status]:
                    results[name] = result  # two checks may tell of one dependency, such as of the clock: the worse counts
            self._last, self._last_at = HealthReport(results, self._now()), self._clock()
            self._raise_alarms(results)
            return self._last
        finally:
            self._running = None

    async def _check_one(self, name: str, check: Check) -> Mapping[str, CheckResult]:
        try:
            async with asyncio.timeout(self._deadline):
                return await check()
        except TimeoutError:
            return {name: CheckResult(Health.FAIL, "no answer in time", self._remedies.get(name, ""))}
        except Exception as error:  # noqa: BLE001 - a dependency may fail in any way, and the report says so
            log.info("health check failed", check=name, reason=str(error))
            return {name: CheckResult(Health.FAIL, "it does not answer", self._remedies.get(name, ""))}

    def _raise_alarms(self, results: Mapping[str, CheckResult]) -> None:
        """Logs each state that differs from the one before, with what to do."""
        for name, result in results.items():
            before = self._alarmed.get(name, Health.PASS)
            self._alarmed[name] = result.status
            if result.status is before:
                continue
            if result.status is Health.PASS:
                log.info("dependency works again", dependency=name)
                continue
            write = log.error if result.status is Health.FAIL else log.warning
            write("alarm", dependency=name, problem=result.output, do=result.remedy)

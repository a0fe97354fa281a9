"""What each coordinator costs this node: work that it left unpaid, held against what was earned through it.

A coordinator stands between, so it can take a part of an answer and see to it that none of it is ever charged: it grants no
credit, cancels for want of time, drops the link. Each such job is written off at what it would have cost, and a coordinator whose
write-offs of the last day exceed the rules' bound is served no more until the day has moved on. Counted by the address that was
dialled: an account costs nothing to make anew.

So a coordinator takes in a day at most max(max_write_off, write_off_percent of what was earned there), and the caps of the jobs
that it has under way when it goes beyond that: two for each slot, the one that runs there and the next, which may get the slot
before the first is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from node.domain.order_admission import AdmissionRules
from node.ports import CoordinatorCreditStore, CoordinatorHour
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.types import Amount, format_amount

log = structlog.get_logger()
HOUR = 3_600
HOURS = 24
_LOOK_SECONDS = 30.0


class CoordinatorCredit:
    """See the module's docstring. `rows`: what the store remembers; `changed` is called when a coordinator is served no more,
    or again; `alarm` with its address and its write-offs when it is served no more. `now` gives Unix seconds.
    """

    def __init__(
        self,
        store: CoordinatorCreditStore,
        rules: AdmissionRules,
        hours: Iterable[CoordinatorHour] = (),
        *,
        on_change: Callable[[], None] = lambda: None,
        alarm: Callable[[str, Amount], None] = lambda _endpoint, _cost: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self.rules, self.on_change, self._alarm, self._now = store, rules, on_change, alarm, now
        self._hours: dict[tuple[str, int], CoordinatorHour] = {(row.endpoint, row.hour): row for row in hours}
        self._unsaved: set[tuple[str, int]] = set()
        self._suspended = {endpoint for endpoint, _ in self._hours if not self._within_limit(endpoint)}

    def record_earned(self, endpoint: str, cost: Amount) -> None:
        """A receipt over `cost` base units was booked for a job that came from there."""
        if cost:
            self._add(endpoint, cost, Amount(0))

    def record_unpaid(self, endpoint: str, cost: Amount) -> None:
        """A job that came from there would have cost so much, and was left unpaid."""
        if not cost:
            return
        self._add(endpoint, Amount(0), cost)
        log.warning("a job was left unpaid", coordinator=endpoint, cost=format_amount(cost))
        self._update(endpoint)

    def require_served(self, endpoint: str) -> None:
        """Raises Unavailable (node_busy, the coordinator's fault) if jobs from there are not taken now."""
        if not self.serves(endpoint):
            raise Unavailable(Code.NODE_BUSY, f"this coordinator {self._reason(endpoint)}", fault=Fault.COORDINATOR)

    def problems(self) -> list[str]:
        """For people: the coordinators that are served no more for now, and why."""
        return [f"the coordinator at {endpoint} {self._reason(endpoint)}" for endpoint in sorted(self._suspended)]

    def _reason(self, endpoint: str) -> str:
        earned, lost = self.totals(endpoint)
        return (
            f"left {format_amount(lost)} of this provider's work unpaid within {HOURS} h, beside {format_amount(earned)} earned; "
            f"it is served again when no more than {format_amount(self._limit(earned))} is"
        )

    def serves(self, endpoint: str) -> bool:
        """Whether jobs from there are taken now."""
        return endpoint not in self._suspended

    def totals(self, endpoint: str) -> tuple[Amount, Amount]:
        """What was earned through this coordinator and written off, within the last 24 hours and the one under way."""
        oldest = self._current_hour() - HOURS
        rows = [row for (at, hour), row in self._hours.items() if at == endpoint and hour >= oldest]
        return sum((row.earned for row in rows), Amount(0)), sum((row.written_off for row in rows), Amount(0))

    def status(self) -> dict[str, dict[str, str | bool]]:
        """For people: by address, whether it is served, and the last day's earnings and write-offs in base units."""
        found: dict[str, dict[str, str | bool]] = {}
        for endpoint in sorted({endpoint for endpoint, _ in self._hours}):
            earned, lost = self.totals(endpoint)
            found[endpoint] = {"served": self.serves(endpoint), "earned": str(int(earned)), "writtenOff": str(int(lost))}
        return found

    async def run(self) -> None:
        """Writes down what has changed, and takes up again whom the day has passed, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """One round of `run`."""
        oldest = self._current_hour() - HOURS
        self._hours = {key: row for key, row in self._hours.items() if row.hour >= oldest}
        for endpoint in {*self._suspended, *(endpoint for endpoint, _ in self._hours)}:
            self._update(endpoint)
        await self.save()

    async def save(self) -> None:
        """Writes down what has changed. What cannot be written is tried again with the next."""
        unnoted, self._unsaved = self._unsaved, set()
        for key in unnoted & self._hours.keys():
            try:
                await self._store.record_coordinator_hour(self._hours[key])
            except TallyError as error:
                self._unsaved.add(key)
                log.warning("write-offs not written down", coordinator=key[0], error=str(error))

    def _add(self, endpoint: str, earned: Amount, lost: Amount) -> None:
        key = endpoint, self._current_hour()
        row = self._hours.get(key) or CoordinatorHour(*key, Amount(0), Amount(0))
        self._hours[key] = CoordinatorHour(*key, row.earned + earned, row.written_off + lost)
        self._unsaved.add(key)

    def _update(self, endpoint: str) -> None:
        bearable = self._within_limit(endpoint)
        if bearable == self.serves(endpoint):
            return
        _, lost = self.totals(endpoint)
        if bearable:
            self._suspended.discard(endpoint)
            log.info("this coordinator is served again", coordinator=endpoint)
        else:
            self._suspended.add(endpoint)
            log.error("this coordinator is served no more for now", coordinator=endpoint, written_off=format_amount(lost))
            self._alarm(endpoint, lost)
        self.on_change()

    def _within_limit(self, endpoint: str) -> bool:
        earned, lost = self.totals(endpoint)
        return lost <= self._limit(earned)

    def _limit(self, earned: Amount) -> Amount:
        return max(self.rules.max_unpaid, Amount(earned * self.rules.max_unpaid_percent // 100))

    def _current_hour(self) -> int:
        return int(self._now()) // HOUR

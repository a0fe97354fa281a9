"""Coordinator credit: how much unpaid work each coordinator may cause before this node stops serving it.

A coordinator could take part of a response and prevent every charge for it: it grants no credit, cancels for lack of time or
in favour of another provider that has the job too, or drops the link. Each such job is recorded as unpaid at what it would
have cost. A coordinator whose unpaid work of the last day exceeds the limit is not served until the day has moved on. The
records are kept by dialled address, because a new account costs nothing.

A coordinator can therefore take at most max(max_unpaid, max_unpaid_percent of the earnings through it) in a day, plus the caps of
the jobs under way when it exceeds that limit. Those are two for each slot: the running job, and the next one, which may get the
slot before the first is counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from node.domain.admission_rules import AdmissionRules
from node.ports import CoordinatorCreditStore, CoordinatorHour
from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable
from tallystick.protocol.types import Amount, format_amount

log = structlog.get_logger()
HOUR = 3_600
HOURS = 24
_REFRESH_SECONDS = 30.0


class CoordinatorCredit:
    """See the module's docstring.

    `hours`: the stored totals; `on_change` is called when a coordinator is suspended or served again; `alarm` is called with
    address and unpaid amount when one is suspended; `now` returns Unix seconds.
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
        """Records a receipt over `cost` base units for a job from this coordinator."""
        if cost:
            self._add(endpoint, cost, Amount(0))

    def record_unpaid(self, endpoint: str, cost: Amount) -> None:
        """Records a job that this coordinator left unpaid and that would have cost `cost` base units."""
        if not cost:
            return
        self._add(endpoint, Amount(0), cost)
        log.warning("coordinator left a job unpaid", coordinator=endpoint, cost=format_amount(cost))
        self._update(endpoint)

    def require_served(self, endpoint: str) -> None:
        """Raises Unavailable (`node_busy`, the coordinator's fault) if the coordinator is suspended."""
        if not self.serves(endpoint):
            raise Unavailable(Code.NODE_BUSY, f"this coordinator {self._reason(endpoint)}", fault=Fault.COORDINATOR)

    def problems(self) -> list[str]:
        """Returns one sentence for each suspended coordinator."""
        return [f"the coordinator at {endpoint} {self._reason(endpoint)}" for endpoint in sorted(self._suspended)]

    def _reason(self, endpoint: str) -> str:
        earned, unpaid = self.totals(endpoint)
        return (
            f"left {format_amount(unpaid)} dollars of this provider's work unpaid within {HOURS} h and paid for "
            f"{format_amount(earned)}; it is served again once at most {format_amount(self._limit(earned))} dollars are unpaid"
        )

    def serves(self, endpoint: str) -> bool:
        """Whether the coordinator is served now."""
        return endpoint not in self._suspended

    def totals(self, endpoint: str) -> tuple[Amount, Amount]:
        """Returns earnings and unpaid work of the last 24 hours and the current hour, in base units."""
        oldest = self._current_hour() - HOURS
        rows = [row for (at, hour), row in self._hours.items() if at == endpoint and hour >= oldest]
        return sum((row.earned for row in rows), Amount(0)), sum((row.written_off for row in rows), Amount(0))

    def status(self) -> dict[str, dict[str, str | bool]]:
        """Returns the status report: by address, whether it is served, and the last day's earnings and unpaid work in base
        units.
        """
        report: dict[str, dict[str, str | bool]] = {}
        for endpoint in sorted({endpoint for endpoint, _ in self._hours}):
            earned, unpaid = self.totals(endpoint)
            report[endpoint] = {"served": self.serves(endpoint), "earned": str(int(earned)), "writtenOff": str(int(unpaid))}
        return report

    async def run(self) -> None:
        """Saves changes and serves suspended coordinators again when their day has passed, until cancelled."""
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            await self.refresh()

    async def refresh(self) -> None:
        """Runs one round of `run`."""
        oldest = self._current_hour() - HOURS
        self._hours = {key: row for key, row in self._hours.items() if row.hour >= oldest}
        for endpoint in {*self._suspended, *(endpoint for endpoint, _ in self._hours)}:
            self._update(endpoint)
        await self.save()

    async def save(self) -> None:
        """Saves changed totals. A failed write is repeated with the next call."""
        unnoted, self._unsaved = self._unsaved, set()
        for key in unnoted & self._hours.keys():
            try:
                await self._store.record_coordinator_hour(self._hours[key])
            except TallyError as error:
                self._unsaved.add(key)
                log.warning("unpaid work not saved", coordinator=key[0], error=str(error))

    def _add(self, endpoint: str, earned: Amount, unpaid: Amount) -> None:
        key = endpoint, self._current_hour()
        row = self._hours.get(key) or CoordinatorHour(*key, Amount(0), Amount(0))
        self._hours[key] = CoordinatorHour(*key, row.earned + earned, row.written_off + unpaid)
        self._unsaved.add(key)

    def _update(self, endpoint: str) -> None:
        within_limit = self._within_limit(endpoint)
        if within_limit == self.serves(endpoint):
            return
        _, unpaid = self.totals(endpoint)
        if within_limit:
            self._suspended.discard(endpoint)
            log.info("coordinator is served again", coordinator=endpoint)
        else:
            self._suspended.add(endpoint)
            log.error("coordinator suspended", coordinator=endpoint, unpaid=format_amount(unpaid))
            self._alarm(endpoint, unpaid)
        self.on_change()

    def _within_limit(self, endpoint: str) -> bool:
        earned, unpaid = self.totals(endpoint)
        return unpaid <= self._limit(earned)

    def _limit(self, earned: Amount) -> Amount:
        return max(self.rules.max_unpaid, Amount(earned * self.rules.max_unpaid_percent // 100))

    def _current_hour(self) -> int:
        return int(self._now()) // HOUR

"""The other replicas, as the parts of this one see them: the list, and the notices in both directions."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import structlog

from coordinator.jobs.market import Market
from coordinator.jobs.market_load import Load, MarketLoad
from coordinator.jobs.payer_totals import LoadTotals
from coordinator.replicas.membership import Membership
from coordinator.replicas.notices import CancelNotice, MembersNotice, Notice, TabNotice, pack_notice, read_notice
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.health import CheckResult, Health
from tallystick.protocol.replicas import Replica
from tallystick.protocol.types import Address, Amount, JobId

log = structlog.get_logger()
LOAD_SECONDS = 1.0
START_SECONDS = 5.0
"""How long a process may take to its first connection to NATS before that is reported."""


class NoticeBus(Protocol):
    """Carries messages by topic to the other replicas, at most once."""

    on_message: Callable[[str, bytes], None]
    on_connected: Callable[[], None]

    @property
    def connected(self) -> bool:
        """Whether messages reach anybody now."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of messages that were dropped, by reason."""
        ...

    def publish(self, topic: str, payload: bytes) -> None:
        """Sends a message, or drops it."""

    async def round_trip(self) -> float | None:
        """Returns the seconds until the bus answers; None if it does not."""
        ...

    async def run(self) -> None:
        """Keeps the connection until cancelled."""


class ReplicaSet:
    """See the module's docstring."""

    def __init__(
        self,
        membership: Membership,
        bus: NoticeBus,
        market: Market,
        load_totals: LoadTotals,
        tick: Callable[[], float],
        *,
        load: MarketLoad,
    ) -> None:
        """`tick` is a monotonic clock in seconds. `load`: the jobs of all replicas, which is kept current."""
        self.membership, self._bus, self._market, self._tick = membership, bus, market, tick
        self._began, self._load = tick(), load
        load.members = lambda: {replica.id for replica in membership.known} - {membership.id}
        self.bus_seconds: float | None = None
        self._malformed: Counter[str] = Counter()
        bus.on_message, bus.on_connected = self._receive, self._connected
        market.share_totals(load_totals, self._total_rose)

    @property
    def loops(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """What runs in the background while this replica serves."""
        return self._bus.run, self.membership.run, self._tell_load

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of notices that were dropped, by reason."""
        return MappingProxyType(dict(self._bus.dropped) | self._malformed)

    @property
    def listed(self) -> tuple[Replica, ...]:
        """The replicas that clients may use, by id."""
        return self.membership.listed

    @property
    def alone(self) -> bool:
        """Whether no other replica lives."""
        return len(self.membership.known) <= 1

    @property
    def bus_connected(self) -> bool:
        """Whether notices reach the other replicas now."""
        return self._bus.connected

    async def join(self, url: str) -> None:
        """Puts this replica on the list. Raises Unavailable."""
        await self.membership.join(url)
        self._publish(MembersNotice())

    async def leave(self) -> None:
        """Takes this replica off the list, and tells the others to look."""
        await self.membership.leave()
        self._publish(MembersNotice())

    def cancel(self, job: JobId, payer: Address) -> None:
        """Passes on a cancel of a job that this replica does not run, also if the list has no other one: it may miss one."""
        self._publish(CancelNotice(job, payer))

    def _total_rose(self, payer: Address, provider: Address, total: Amount) -> None:
        self._publish(TabNotice(payer, provider, total))

    def _publish(self, notice: Notice) -> None:
        if not self.alone or isinstance(notice, MembersNotice | CancelNotice):
            self._bus.publish(*pack_notice(notice, self.membership.id))

    async def _tell_load(self) -> None:
        """Tells the other replicas once a second how many jobs this one has."""
        while True:
            await asyncio.sleep(LOAD_SECONDS)
            self.tell_load()

    def tell_load(self) -> None:
        """Tells the other replicas what changed of this one's load."""
        for load in self._load.news():
            self._publish(load)

    def _connected(self) -> None:
        """Announces this replica. Totals that rose while there was no connection are read again from the database."""
        self._market.forget_loaded_totals()
        self.membership.look()
        self._publish(MembersNotice())

    def _receive(self, topic: str, payload: bytes) -> None:
        try:
            sender, notice = read_notice(topic, payload)
        except BadMessage as error:
            self._malformed["malformed"] += 1
            log.debug("notice dropped", topic=topic[:40], reason=str(error))
            return
        if sender == self.membership.id:
            return
        if isinstance(notice, CancelNotice):
            if self._market.payer_of(notice.job) == notice.payer:
                self._market.cancel(notice.job)
        elif isinstance(notice, TabNotice):
            tab = self._market.exposure.known(notice.payer, notice.provider)
            if tab is None or tab.cumulative < notice.total:
                self._market.forget_loaded_totals(notice.payer)
        elif isinstance(notice, Load):
            self._load.note(sender, notice)
        else:
            self.membership.look()

    # Health

    async def check_bus(self) -> dict[str, CheckResult]:
        """Returns the state of the bus. Without it jobs go on, so it is a warning."""
        self.bus_seconds = await self._bus.round_trip()
        if self.bus_seconds is not None:
            return {"bus": CheckResult(Health.PASS, value=round(1_000 * self.bus_seconds, 1), unit="ms")}
        if self._bus.connected or self._tick() - self._began < START_SECONDS:
            return {"bus": CheckResult(Health.PASS)}
        text = "no connection to NATS: cancels and tab totals do not reach the other replicas; jobs go on"
        return {"bus": CheckResult(Health.WARN, text, "check `bus` and the NATS server")}

    async def check_replicas(self) -> dict[str, CheckResult]:
        """Returns whether the list of replicas is current."""
        count = len(self.membership.known)
        if self.membership.clash is not None:
            text = "another live process has this replica's URL, so clients reach one of the two only"
            return {"replicas": CheckResult(Health.WARN, text, "give each replica its own `replica_url`", count)}
        if self.membership.joined and not self.membership.answered:
            text = "the list of replicas cannot be read; the last known one stays"
            return {"replicas": CheckResult(Health.WARN, text, "check `db` and the database server", count)}
        return {"replicas": CheckResult(Health.PASS, value=count)}

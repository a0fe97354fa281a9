"""Applies one fault to one process, at the moment that the watch has noticed its phase, and measures what clients see of it."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field

from scripts.faults.clients import Clients
from scripts.faults.launch import write_offset
from scripts.faults.packet_loss import deliver, drop
from scripts.faults.proxy import Proxy
from scripts.faults.schedule import Entry, Fault, Phase, Process
from scripts.faults.site import NODES, POLL_SECONDS, Site, kill, until
from scripts.faults.watching import Seen

PHASE_SECONDS = 300.0
"""How long a phase may take to come, and a client without an answer after a fault."""


@dataclass(slots=True)
class Struck:
    """A fault that struck. `name`: the process. `outage`: seconds from the fault until every client had its next whole
    answer, which includes the time that an answer takes.
    """

    entry: Entry
    name: str
    outage: float


class PhaseMissing(Exception):
    """A phase did not come in time, so the market does not work."""


@dataclass(slots=True)
class Striker:
    """Applies the entries of one schedule, one after the other."""

    site: Site
    clients: Clients
    chance: random.Random
    _name: str = ""
    _at: float = 0.0
    _ends: set[asyncio.Task[None]] = field(default_factory=set)

    async def strike(self, entry: Entry) -> Struck:
        """Waits for the phase, applies the fault, and waits until the process serves again and a client has an answer.

        Raises PhaseMissing, or NotReady if the process does not come back.
        """

        async def hit(seen: Seen, pass_on: Awaitable[None] | None) -> None:
            if pass_on is not None and not entry.before:
                await pass_on
            self._name, self._at = self._process(entry, seen), time.monotonic()
            await self._apply(entry, self._name)
            if pass_on is not None and entry.before:
                await pass_on

        watch = self.site.watch
        watch.arm(entry.phase, hit)
        try:
            async with asyncio.timeout(PHASE_SECONDS):
                if entry.phase is Phase.ANSWER_KEPT:
                    await self._watch_kept_answers()
                await watch.struck.wait()
        except TimeoutError:
            watch.disarm()
            raise PhaseMissing(f"{entry.phase.value}: not within {PHASE_SECONDS:g} s") from None
        await asyncio.gather(*self._ends)
        try:
            outage = await self.clients.outage(self._at, PHASE_SECONDS)
        except TimeoutError:
            raise PhaseMissing(f"not every client had an answer within {PHASE_SECONDS:g} s after {entry}") from None
        name = self._name
        await until(lambda: self.site.serves(name), f"{name} serves again")
        return Struck(entry, name, outage)

    def _process(self, entry: Entry, seen: Seen) -> str:
        if entry.process is Process.NODE:
            return seen.node or self.chance.choice(NODES)
        if entry.process is Process.COORDINATOR:
            return seen.coordinator or self.chance.choice(self.site.coordinators)
        return str(entry.process.value)

    def _cut(self, name: str) -> list[Proxy]:
        """The proxies between a process and the others."""
        if name in self.site.proxies:
            return [self.site.proxies[name]]
        if name in self.site.coordinators:
            return [self.site.proxies[link] for link in self.site.links]
        return []

    async def _watch_kept_answers(self) -> None:
        """Polls for a new kept answer of the coordinator: no message marks it."""
        query = "SELECT max(number) FROM responses"

        async def newest() -> int:
            rows = await until(lambda: self.site.rows("coordinator", query), "kept answers", PHASE_SECONDS)
            return int(rows[0][0] or 0)

        before = await newest()
        while await newest() <= before:  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(POLL_SECONDS / 5)
        hold = self.site.watch.reached(Phase.ANSWER_KEPT, Seen())
        if hold is not None:
            await hold(_nothing())

    async def _apply(self, entry: Entry, name: str) -> None:
        if entry.fault is Fault.KILL and name != "rpc":
            kill(self.site, name)
            return
        if entry.fault in {Fault.RESET, Fault.CRASH}:
            for proxy in self._cut(name):
                proxy.reset()
            if entry.fault is Fault.CRASH:
                kill(self.site, name)
            return
        begin, end = self._begin, self._end
        await begin(entry, name)

        async def later() -> None:
            try:
                await asyncio.sleep(entry.seconds)
            finally:
                await end(entry, name)

        ending = asyncio.create_task(later())
        self._ends.add(ending)
        ending.add_done_callback(self._ends.discard)

    async def _begin(self, entry: Entry, name: str) -> None:
        site = self.site
        if entry.fault is Fault.KILL:
            site.proxies[name].close_soon()
        elif entry.fault is Fault.PAUSE:
            site.processes["chain" if name == "rpc" else name].signal(signal.SIGSTOP)
        elif entry.fault is Fault.PARTITION:
            for proxy in self._cut(name):
                proxy.lose()
        elif entry.fault is Fault.PACKET_LOSS:
            for proxy in self._cut(name):
                drop(proxy.port, proxy.source)
        elif entry.fault is Fault.CLOCK:
            write_offset(site.clock(name), entry.shift)
        else:
            site.disks[name].fill()

    async def _end(self, entry: Entry, name: str) -> None:
        site = self.site
        if entry.fault is Fault.KILL:
            await site.proxies[name].open()
        elif entry.fault is Fault.PAUSE:
            site.processes["chain" if name == "rpc" else name].signal(signal.SIGCONT)
        elif entry.fault is Fault.PARTITION:
            for proxy in self._cut(name):
                proxy.heal()
        elif entry.fault is Fault.PACKET_LOSS:
            for proxy in self._cut(name):
                deliver(proxy.port, proxy.source)
        elif entry.fault is Fault.CLOCK:
            write_offset(site.clock(name), 0.0)
        else:
            site.disks[name].empty()


async def _nothing() -> None:
    """Passes nothing on: no message was held."""

"""Watches the match log of one coordinator in the background, and keeps what it learnt and what it can prove in a folder.

Files: COORDINATOR-CHAIN.json has the newest head and the matches that wait for their check; evidence-ID.json is evidence against
the coordinator, which `tally log verify FILE` judges. Several processes may use one folder: each compares the head of the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import PeerError, TallyError
from tallystick.protocol.json_members import read_count, read_items, read_members, read_text
from tallystick.protocol.log_evidence import LogEvidence, read_hex
from tallystick.protocol.log_monitor import MAX_PENDING, LogMonitor, LogQuestion, PendingMatch
from tallystick.protocol.match_log import Match, pack_head, unpack_head
from tallystick.protocol.messages import LogHead, Order
from tallystick.protocol.types import Address
from tallystick.protocol.wire import dumps, loads
from tallystick.runtime.keystore import write_private

log = structlog.get_logger()
CHECK_SECONDS = 2.0
SAVE_SECONDS = 30.0
"""How often a newer head is written at most, with the matches that wait. Any head that was seen serves the comparison."""
MAX_EVIDENCE = 100
"""Files of evidence in one folder."""
MAX_PASSED_ON = 8
"""Heads of other parties that wait to be read. More than these replace others at random, so no party can keep others out."""
_CHANCE = random.SystemRandom().random
Ask = Callable[[LogQuestion], Awaitable[object]]
"""Asks the coordinator GET /v1/log/proof and returns the JSON of its answer. Raises TallyError."""


class LogWatch:
    """See the module's docstring. `folder`: None keeps nothing. `now`: Unix time in seconds."""

    def __init__(
        self,
        domain: Domain,
        coordinator: Address,
        folder: Path | None,
        ask: Ask,
        *,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = _CHANCE,
    ) -> None:
        self.monitor = LogMonitor(domain, coordinator, chance)
        self._folder, self._ask, self._now, self._chance = folder, ask, now, chance
        self._passed_on: list[bytes] = []
        self._passed_on_count = 0
        self._packed: tuple[Verified[LogHead] | None, bytes] = (None, b"")
        self._task: asyncio.Task[None] | None = None
        self._problem = ""
        self._saved: tuple[int, bytes] | None = None
        self._save_at = float("-inf")

    @property
    def packed_head(self) -> bytes:
        """The newest head, as it is passed on to others; empty if none is known."""
        head = self.monitor.head
        if head is not None and head is not self._packed[0]:
            self._packed = (head, pack_head(head))
        return self._packed[1]

    def add_match(self, match: Match, order: Signed[Order]) -> None:
        """Takes a match whose `check` passed, and sees that the log is checked. Never waits."""
        self.monitor.add_match(match, order, int(self._now()))
        self.start()

    def add_head(self, packed: bytes) -> None:
        """Takes a head that another party passed on, for the next check. Never waits, and checks no signature yet."""
        if not packed or packed == self.packed_head or packed in self._passed_on:
            return
        self._passed_on_count += 1
        if len(self._passed_on) < MAX_PASSED_ON:
            self._passed_on.append(packed)
        elif (place := int(self._chance() * self._passed_on_count)) < MAX_PASSED_ON:
            self._passed_on[place] = packed
        self.start()

    def _read_passed_on(self) -> None:
        """Compares the heads that others passed on. What is no head of this coordinator is ignored, since it proves nothing."""
        passed_on, self._passed_on, self._passed_on_count = self._passed_on, [], 0
        for packed in passed_on:
            try:
                evidence = self.monitor.add_head(unpack_head(packed, self.monitor.coordinator), int(self._now()))
            except PeerError as error:
                log.debug("foreign head ignored", reason=str(error))
            else:
                self._report([] if evidence is None else [evidence])

    def start(self) -> None:
        """Begins to watch, with what earlier processes kept. The first match or head starts it too."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="match log")

    async def _run(self) -> None:
        await self._load()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Reads the heads that others passed on, and asks the coordinator once, if there is anything to ask."""
        self._read_passed_on()
        question = self.monitor.question(int(self._now()))
        if question is None:
            return
        try:
            answer = await self._ask(question)
            evidence = self.monitor.answer(question, answer, int(self._now()))
        except TallyError as error:
            if str(error) != self._problem:
                log.warning("match log not checked", coordinator=self.monitor.coordinator, reason=str(error))
            self._problem = str(error)
            return
        self._problem = ""
        self._report(evidence)
        head = self.monitor.head
        if head is not None and self._saved != (head.message.size, head.message.root) and self._now() >= self._save_at:
            await self._save()

    async def close(self) -> None:
        """Stops checking, and keeps what waits for the next process."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            await self._save()

    # Files

    @property
    def _file(self) -> Path | None:
        monitor = self.monitor
        return None if self._folder is None else self._folder / f"{monitor.coordinator}-{monitor.domain.chain_id}.json"

    async def _load(self) -> None:
        if self._file is None:
            return
        try:
            state = loads(await asyncio.to_thread(self._file.read_bytes), "match log")
            head, pending = read_members(state, "match log", "head", "pending")
            for raw in read_items(pending, "match log.pending", MAX_PENDING):
                waiting = _read_pending(raw)
                self.monitor.add_match(waiting.match, waiting.order, waiting.received_at)
            if head is not None:
                self._take_kept(read_signed(LogHead, head, "match log.head"))
        except FileNotFoundError:
            return
        except (OSError, TallyError) as error:
            log.warning("kept state of the match log not read", path=str(self._file), reason=str(error))

    def _take_kept(self, head: Signed[LogHead]) -> None:
        """Takes the head of an earlier process, or of another one beside this one."""
        monitor = self.monitor
        if monitor.head is None and head.message.coordinator == monitor.coordinator:
            monitor.head = head.verify(monitor.domain)
        else:
            evidence = monitor.add_head(head, int(self._now()))
            self._report([] if evidence is None else [evidence])

    async def _save(self) -> None:
        head, file = self.monitor.head, self._file
        if file is None:
            return
        state = {
            "head": None if head is None else head.to_json(),
            "pending": [_pending_json(pending) for pending in self.monitor.pending],
        }
        try:
            other = loads(await asyncio.to_thread(file.read_bytes), "match log").get("head")
            if other is not None:
                self._take_kept(read_signed(LogHead, other, "match log.head"))
        except (OSError, AttributeError, TallyError):
            pass  # there is none, or it is replaced now
        try:
            await asyncio.to_thread(write_private, file, dumps(state))
        except OSError as error:
            log.warning("state of the match log not kept", path=str(file), reason=str(error))
            return
        self._saved = None if head is None else (head.message.size, head.message.root)
        self._save_at = self._now() + SAVE_SECONDS

    def _report(self, found: Iterable[LogEvidence]) -> None:
        for evidence in found:
            path = None if self._folder is None else _write_evidence(self._folder, evidence)
            log.error(
                "the coordinator's match log is broken",
                coordinator=evidence.coordinator,
                reason=evidence.fraud.value,
                evidence=None if path is None else str(path),
                next="tally log verify FILE",
            )


def _write_evidence(folder: Path, evidence: LogEvidence) -> Path | None:
    """Writes a file of evidence; None if the folder is full or cannot be written. A file is small, and there is rarely one."""
    data = evidence.dumps()
    path = folder / f"evidence-{hashlib.sha256(data).hexdigest()[:16]}.json"
    try:
        if folder.is_dir() and sum(1 for _ in folder.glob("evidence-*.json")) >= MAX_EVIDENCE:
            return None
        write_private(path, data)
    except OSError as error:
        log.warning("evidence not kept", path=str(path), reason=str(error))
        return None
    return path


def _pending_json(pending: PendingMatch) -> dict[str, Any]:
    return {"match": pending.match.dumps().hex(), "order": pending.order.to_json(), "receivedAt": pending.received_at}


def _read_pending(raw: object) -> PendingMatch:
    match, order, received_at = read_members(raw, "match log.pending", "match", "order", "receivedAt")
    data = read_hex(read_text(match, "match log.match", 16_384), "match log.match")
    received = read_count(received_at, "match log.receivedAt", high=(1 << 63) - 1)
    return PendingMatch(Match.loads(data), read_signed(Order, order, "match log.order"), received)

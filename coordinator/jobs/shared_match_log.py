"""The match log of a coordinator's replicas, as one of them writes and reads it.

The numbers of leaves come from the transactions that write them, so a match is dispatched after its leaf is on disk. A head is
signed by whichever replica first finds that the newest one has not changed for `head_seconds`. Each replica has a RestartLeaf of
its own, which its leaves name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.jobs.match_log import MatchDraft, MatchLog
from coordinator.jobs.shared_store import SharedStore
from coordinator.ports import JobRecord, LogRow
from tallystick.protocol import merkle
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.log_leaves import ReportLeaf, RestartLeaf
from tallystick.protocol.match_log import SECRET_SIZE, Match
from tallystick.protocol.messages import LogHead, Order
from tallystick.protocol.types import JobId

PLACE_SECONDS = 10.0
"""How long a match may wait for its transaction."""


@dataclass
class SharedMatchLog(MatchLog):
    """See the module's docstring."""

    shared: SharedStore = field(kw_only=True)

    async def start(self) -> None:
        """See MatchLog."""
        await self._load()
        row = await self.shared.append(int(self.now()), lambda at: RestartLeaf(at).dumps())
        self.epoch = row.number
        await self.sign_head()

    async def place(self, record: JobRecord, order: Verified[Order], draft: MatchDraft) -> Match:
        """Stores a job with its newest attempt, and appends the match of that, before it is dispatched.

        Raises Refusal (order_replayed) for a job that was placed before at any replica, and Unavailable.
        """
        secret = self.random(SECRET_SIZE)
        attempt = len(record.attempts) - 1
        leaf = self.make_leaf(0, record.job, attempt, order=order, draft=draft, secret=secret)
        try:
            async with asyncio.timeout(PLACE_SECONDS):
                row = await self.shared.place(record, int(self.now()), lambda at: replace(leaf, at=at).dumps())
        except TimeoutError:
            text = f"the database did not take the match within {PLACE_SECONDS:g} s"
            raise Unavailable(Code.DATABASE_UNAVAILABLE, text) from None
        self._note(row)
        return Match(row.number, secret, order.digest, row.leaf or b"", replace(leaf, at=row.at))

    def append(self, job: JobId, attempt: int, order: Verified[Order], draft: MatchDraft) -> Match:  # noqa: ARG002 - MatchLog has it
        """A replica has no numbers to give: see `place`."""
        raise RuntimeError("the leaf of a replica's match is appended by `place`")

    def append_report(self, leaf: ReportLeaf) -> tuple[int, ReportLeaf]:  # noqa: ARG002 - MatchLog has it
        """A replica has no numbers to give: see SharedStore.log_report."""
        raise RuntimeError("the leaf of a report at a replica is appended by `SharedStore.log_report`")

    def _note(self, row: LogRow) -> None:
        self._recent.add_older({row.number: row.hashes})

    # Heads

    async def sign_head(self) -> None:
        """Signs a head for all leaves unless there is one. Raises Unavailable."""
        if not self.conflict:
            self._adopt(await self.shared.sign_head(self._make_head))

    async def next_head(self) -> None:
        """Takes the newest head of any replica, or signs one if it is the same as at the last call. Raises Unavailable."""
        head, size = await self.shared.log_state()
        if not self._adopt(head) and (head is None or head.message.size < size):
            await self.sign_head()

    def _adopt(self, head: Signed[LogHead] | None) -> bool:
        """Takes a head of any replica if it is newer than the one of this process."""
        if head is None or (self.head is not None and head.message.size <= self.head.message.size):
            return False
        self.head = head.verify(self.domain)
        return True

    async def _cover(self, size: int) -> None:
        """Takes the newest head of any replica, if the one of this process is of less than `size` leaves. Raises Unavailable."""
        if self.head is not None and size > self.head.message.size:
            self._adopt((await self.shared.log_state())[0])

    async def _is_own(self, head: LogHead) -> bool:
        await self._cover(head.size)  # another replica may have signed it just now
        return await super()._is_own(head)

    async def proof(
        self, since: Sequence[int], indexes: Sequence[int], size: int | None = None, span: merkle.Range | None = None
    ) -> dict[str, Any]:
        """See MatchLog. Leaves and sizes under a newer head of another replica are not beyond the head."""
        await self._cover(max((*since, *(index + 1 for index in indexes), size or 0, 0 if span is None else span[1])))
        return await super().proof(since, indexes, size, span)

    async def entries(self, start: int, limit: int) -> dict[str, Any]:
        """See MatchLog."""
        await self._cover(start + limit)
        return await super().entries(start, limit)

"""The port to what the replicas of a coordinator share, beyond the other ports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from coordinator.domain.integrity_records import IntegrityRecord, ProductKey
from coordinator.domain.reputation import ProviderRecord, RecordChange
from coordinator.domain.speeds import Key, SpeedRecord
from coordinator.jobs.report_store import ReportDraft, StoredReport
from coordinator.ports import JobRecord, LogRow
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Address, Hash, JobId

MakeLeaf = Callable[[int], bytes]
"""Returns the bytes of a leaf, given its time in Unix seconds. It may be called again, for another time."""
MakeHead = Callable[[int, Hash, int, Signed[LogHead] | None], Signed[LogHead]]
"""Signs a head, given the number of leaves, their root, the time of the last one, and the newest head so far."""


class SharedStore(Protocol):
    """What a replica shares with the others of its coordinator, beyond the other ports: it decides in transactions what a lone
    coordinator knows by itself.
    """

    async def place(self, record: JobRecord, at: int, make: MakeLeaf) -> LogRow:
        """Stores a job with its newest attempt, and the leaf of that match, before it is dispatched. Both are synced on return.

        Raises Refusal (order_replayed) for a first attempt at a job that was placed before at any replica, and Unavailable, also
        for a further attempt at a job that another replica ended meanwhile.
        """
        ...

    async def append(self, at: int, make: MakeLeaf) -> LogRow:
        """Appends a leaf to the match log of all replicas. Raises Unavailable."""
        ...

    async def sign_head(self, make: MakeHead) -> Signed[LogHead] | None:
        """Stores a head of all leaves unless there is one, and returns the newest. Raises Unavailable."""
        ...

    async def log_state(self) -> tuple[Signed[LogHead] | None, int]:
        """Returns the newest head of any replica, and the number of leaves. Raises Unavailable."""
        ...

    async def change_records(
        self, changes: Mapping[Address, RecordChange], speeds: Mapping[Key, SpeedRecord]
    ) -> Mapping[Address, ProviderRecord]:
        """Changes the reputation records of providers, and returns them: other replicas changed them too. Stores speeds, of which
        the last ones stay. Raises Unavailable.
        """
        ...

    async def log_report(self, draft: ReportDraft, at: int, keep_seconds: int) -> tuple[StoredReport, bool]:
        """Weighs, logs, counts and stores a report in one transaction. Returns it, and whether it is new: another replica may
        have stored one on the same finding. Deletes reports that are older than `keep_seconds`. Raises Unavailable.
        """
        ...

    async def integrity_since(self, leaf: int) -> list[tuple[ProductKey, IntegrityRecord]]:
        """Returns the integrity records that the report with this leaf, or a later one, changed last. Raises Unavailable."""
        ...

    async def is_placed(self, job: JobId) -> bool:
        """Whether any replica placed this job. Raises Unavailable."""
        ...

    async def end_lost(self, job: JobId, replica: str, *, cancelled: bool = False) -> bool:
        """Ends a job that another replica ran, if that one is gone. Returns whether it did. Raises Unavailable.

        It has to be gone for some seconds, in which questions come again and again; unless the payer cancels the job.
        """
        ...

"""The port to the database of reports and integrity, and an implementation in memory for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from coordinator.domain.integrity_records import IntegrityRecord, ProductKey, RecordChange
from tallystick.protocol.log_leaves import ReportLeaf
from tallystick.protocol.types import Address, Amount, Hash, JobId

Finding = tuple[JobId, Address, bool]
"""A job, its provider, and whether the report convicts the provider: what is reported once."""


@dataclass(frozen=True, slots=True)
class StoredReport:
    """An accepted report. `index`, `leaf_hash`: of its leaf in the match log; `at`: Unix seconds; `payer`: who reported.

    `praises`: whether it found the answer good; `effect`: what a payer's report added to the product's passes or failures, of
    WEIGHT_ONE, and 0 for a probe.
    """

    finding: Finding
    payer: Address
    product: ProductKey
    at: int
    index: int
    report_hash: Hash
    leaf_hash: Hash
    praises: bool = False
    effect: int = 0


class ReportFacts(NamedTuple):
    """What the weight of a report depends on. `settled`: base units that its payer settled on chain, by provider; `earlier`: its
    reports on the product so far; `day_effect`: what payers' reports of the same direction added to the product in a day.
    """

    settled: Mapping[Address, Amount]
    earlier: int
    day_effect: int


@dataclass(frozen=True, slots=True)
class ReportDraft:
    """A checked report before it is logged. `make` returns its leaf, without time and epoch; `store` how it is stored, given its
    leaf and the number of that; `epoch`: of its leaf; `praises`: whether it found the answer good.
    """

    finding: Finding
    payer: Address
    product: ProductKey
    praises: bool
    epoch: int
    make: Callable[[ReportFacts], ReportLeaf]
    store: Callable[[ReportLeaf, int], StoredReport]


class ReportStore(Protocol):
    """Stores reports and the integrity that they make. Writes survive the process when their coroutine returns."""

    async def put_report(self, report: StoredReport, change: RecordChange, since: int) -> None:
        """Stores a report and what it changed, and deletes reports before `since`. Idempotent. Raises Unavailable."""

    async def report(self, finding: Finding) -> StoredReport | None:
        """Returns what was reported, or None. Raises Unavailable."""
        ...

    async def count_reports(self, payer: Address, product: ProductKey) -> int:
        """Returns the number of stored reports of a payer on a product. Raises Unavailable."""
        ...

    async def sum_effects(self, product: ProductKey, since: int, *, praises: bool) -> int:
        """Returns what payers' reports since then added to the passes of a product, or to its failures. Raises Unavailable."""
        ...

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """Returns what a payer settled on chain, by provider, in base units. Raises Unavailable."""
        ...

    async def integrity(self) -> list[tuple[ProductKey, IntegrityRecord]]:
        """Returns all records, those with the oldest reports first. Raises Unavailable."""
        ...


@dataclass
class MemoryReportStore:
    """Implements ReportStore. Nothing outlives the process."""

    reports: dict[Finding, StoredReport] = field(default_factory=dict)
    records: dict[ProductKey, IntegrityRecord] = field(default_factory=dict)
    settled: dict[Address, dict[Address, Amount]] = field(default_factory=dict)

    async def put_report(self, report: StoredReport, change: RecordChange, since: int) -> None:
        """See ReportStore."""
        self.reports = {finding: kept for finding, kept in self.reports.items() if kept.at >= since}
        self.reports[report.finding] = report
        if change.record is not None:
            self.records[change.product] = change.record
        for product in change.forgotten:
            self.records.pop(product, None)

    async def report(self, finding: Finding) -> StoredReport | None:
        """See ReportStore."""
        return self.reports.get(finding)

    async def count_reports(self, payer: Address, product: ProductKey) -> int:
        """See ReportStore."""
        return sum((report.payer, report.product) == (payer, product) for report in self.reports.values())

    async def sum_effects(self, product: ProductKey, since: int, *, praises: bool) -> int:
        """See ReportStore."""
        same = (kept for kept in self.reports.values() if (kept.product, kept.praises) == (product, praises))
        return sum(kept.effect for kept in same if kept.at >= since)

    async def settled_by(self, payer: Address) -> Mapping[Address, Amount]:
        """See ReportStore."""
        return self.settled.get(payer, {})

    async def integrity(self) -> list[tuple[ProductKey, IntegrityRecord]]:
        """See ReportStore."""
        return sorted(self.records.items(), key=lambda entry: entry[1].leaf)

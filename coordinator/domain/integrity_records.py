"""Integrity of what providers sell, from reports of audits, by provider, model and precision. Pure.

Each is a Beta posterior (tallystick/audit/integrity.py) that the leaves of reports in the match log change, one after the other,
so anybody who replays the log finds the same. Matching uses its lower quantile, in INTEGRITY_STEPS.

A report counts by what its payer settled on chain: `report_weight`. Several reports of one payer on one product count less and
less, and payments to a provider do not lend weight to praise of it. Weight costs less than was paid: whoever sells under a second
account pays itself, for the fee and the gas. So what all payers together add to a product in a day is bounded: DAILY_EFFECT.
A pass of an answer without evidence counts less, because its text alone does not show a quantization.
Reports of payers bring a provider down to where a stranger is. Only the coordinator's own audits exclude it further: its value is
0 then, for all that it sells.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tallystick.audit.audit_counts import UNVERIFIABLE_WEIGHT
from tallystick.audit.integrity import WEIGHTS, Integrity, weight_of
from tallystick.audit.verdicts import Verdict
from tallystick.protocol.audit_reports import AuditVerdict
from tallystick.protocol.log_facts import INTEGRITY_STEPS
from tallystick.protocol.log_leaves import WEIGHT_ONE, ReportLeaf
from tallystick.protocol.messages import Ask
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address, Amount

MAX_REMEMBERED = 100_000
"""Products. Those whose last report is the longest ago are forgotten first, and those that the coordinator found false last."""
MAX_PRODUCTS = 64
"""Products of one provider. Those with the least weight of audits are forgotten first, by the same exception."""
HALF_WEIGHT = Amount(10_000_000)
"""Base units that a payer settled on chain for its first report on a product to count half."""
DAILY_EFFECT = 5 * WEIGHT_ONE
"""What the reports of all payers add to the passes of a product in DAY_SECONDS, and to its failures, of WEIGHT_ONE."""
DAY_SECONDS = 86_400
CONFIRMED_PART = 10
"""A payer's word that a provider is confirmed counts one part in so many of what the coordinator's own finding counts."""
DISTRUSTED = 10
"""The integrity, in INTEGRITY_STEPS, below which a provider that the coordinator itself found cheating is excluded."""
_VERDICTS = {
    AuditVerdict.PASS: Verdict.PASS,
    AuditVerdict.SUSPECT: Verdict.SUSPECT,
    AuditVerdict.CONFIRMED: Verdict.CONFIRMED,
    AuditVerdict.UNVERIFIABLE: Verdict.SUSPECT,
}
_FAILURES = AuditVerdict.SUSPECT, AuditVerdict.CONFIRMED
"""What the coordinator itself excludes for. An answer that could not be checked proves nothing."""


class ProductKey(NamedTuple):
    """What a provider sells, as far as audits tell it apart."""

    provider: Address
    model: str
    precision: str


class Standing(NamedTuple):
    """What matching knows of an ask's product: its integrity in INTEGRITY_STEPS, and the number of audits behind it."""

    integrity: int
    audits: int


@dataclass(frozen=True, slots=True)
class IntegrityRecord:
    """The audits of a product. `probe_failures`: what the coordinator itself found against it; `leaf`: of the last report."""

    integrity: Integrity = field(default_factory=Integrity)
    probe_failures: int = 0
    leaf: int = 0

    def after(self, leaf: ReportLeaf, index: int) -> IntegrityRecord:
        """With the report that the match log has as leaf `index`. A verdict of an unknown number changes nothing."""
        verdict = _VERDICTS.get(AuditVerdict(leaf.verdict)) if leaf.verdict in tuple(AuditVerdict) else None
        integrity = self.integrity if verdict is None else self.integrity.after(verdict, weight=leaf.weight / WEIGHT_ONE)
        failed = leaf.is_probe and leaf.verdict in _FAILURES
        return IntegrityRecord(integrity, self.probe_failures + failed, index)

    @property
    def weight(self) -> tuple[int, float]:
        """What forgetting it would lose: what the coordinator itself found, and then the audits as they count now."""
        return self.probe_failures, self.integrity.passes + self.integrity.failures

    @property
    def standing(self) -> Standing:
        """Its standing by itself."""
        steps = max(1, round(self.integrity.lower * INTEGRITY_STEPS))
        return Standing(0 if self.probe_failures and steps < DISTRUSTED else steps, self.integrity.audits)


class RecordChange(NamedTuple):
    """What a report changed. `record`: the product's new one, None if it has none; `forgotten`: products that made way for it."""

    product: ProductKey
    record: IntegrityRecord | None
    forgotten: tuple[ProductKey, ...] = ()


UNAUDITED = IntegrityRecord().standing


def product_key(ask: Ask) -> ProductKey:
    """What an ask sells."""
    return ProductKey(ask.provider, ask.model, precision_class(ask.spec.precision))


def effect_of(verdict: AuditVerdict, weight: int) -> int:
    """What a report adds to the passes or the failures of its product, of WEIGHT_ONE."""
    return weight * round(max(WEIGHTS[_VERDICTS[verdict]]))


def report_weight(
    verdict: AuditVerdict,
    provider: Address,
    settled: Mapping[Address, Amount],
    earlier: int,
    *,
    is_probe: bool,
    has_evidence: bool = True,
    day_effect: int = 0,
) -> int:
    """The weight of a report, of WEIGHT_ONE. `settled`: base units that its payer settled on chain, by provider; `earlier`: its
    earlier reports on the same product; `has_evidence`: whether the job's receipt commits to evidence; `day_effect`: what
    payers' reports of the same direction added to the product in the last DAY_SECONDS.
    """
    whole = round(WEIGHT_ONE * weight_of(_VERDICTS[verdict], 1.0 if has_evidence else 0.0))
    if verdict is AuditVerdict.UNVERIFIABLE:
        whole = round(whole * UNVERIFIABLE_WEIGHT)
    if is_probe:
        return whole
    paid = sum(amount for payee, amount in settled.items() if verdict is not AuditVerdict.PASS or payee != provider)
    part = CONFIRMED_PART if verdict is AuditVerdict.CONFIRMED else 1
    weight = whole * paid // ((paid + HALF_WEIGHT) * (1 + earlier) * part)
    return min(weight, max(DAILY_EFFECT - day_effect, 0) // effect_of(verdict, 1))


def _ignore(_provider: Address) -> None:
    pass


@dataclass(slots=True)
class IntegrityRecords:
    """The records of all audited products. `on_change` is called with each provider whose standing may have changed."""

    on_change: Callable[[Address], None] = _ignore
    _records: OrderedDict[ProductKey, IntegrityRecord] = field(default_factory=OrderedDict)
    _products: dict[Address, list[ProductKey]] = field(default_factory=dict)

    def standing(self, key: ProductKey) -> Standing:
        """The standing of a product. Integrity is 0 for all products of a provider that is excluded for one of them."""
        products = self._products.get(key.provider)
        if products is None:
            return UNAUDITED
        record = self._records.get(key)
        standing = UNAUDITED if record is None else record.standing
        if any(not self._records[product].standing.integrity for product in products):
            return Standing(0, standing.audits)
        return standing

    def standings(self, provider: Address) -> dict[ProductKey, Standing]:
        """The standings of all audited products of a provider."""
        return {key: self.standing(key) for key in self._products.get(provider, ())}

    def best(self, provider: Address) -> int:
        """The highest integrity that any product of a provider can have, in INTEGRITY_STEPS."""
        return max((standing.integrity for standing in self.standings(provider).values()), default=UNAUDITED.integrity)

    def record(self, key: ProductKey) -> IntegrityRecord:
        """The record of a product, an empty one without audits."""
        return self._records.get(key, IntegrityRecord())

    def apply(self, leaf: ReportLeaf, index: int) -> RecordChange:
        """Counts the report that the match log has as leaf `index`. A report that counts nothing begins no record."""
        key = ProductKey(leaf.provider, leaf.model, leaf.precision)
        known = self._records.get(key)
        record = (known or IntegrityRecord()).after(leaf, index)
        if known is None and not record.integrity.audits:
            return RecordChange(key, None)
        return RecordChange(key, record, self._put(key, record))

    def restore(self, records: Iterable[tuple[ProductKey, IntegrityRecord]]) -> None:
        """Adds the records that a former process stored, those with the oldest reports first."""
        for key, record in records:
            self._put(key, record)

    def _put(self, key: ProductKey, record: IntegrityRecord) -> tuple[ProductKey, ...]:
        """Sets a record. Returns the products that were forgotten for it."""
        forgotten: list[ProductKey] = []
        if key not in self._records:
            products = self._products.setdefault(key.provider, [])
            products.append(key)
            if len(products) > MAX_PRODUCTS:
                forgotten.append(
                    min(products[:-1], key=lambda product: (*self._records[product].weight, self._records[product].leaf))
                )
        self._records[key] = record
        self._records.move_to_end(key)
        if len(self._records) - len(forgotten) > MAX_REMEMBERED:
            forgotten.append(self._oldest())
        for product in forgotten:
            self._forget(product)
        for provider in {key.provider, *(product.provider for product in forgotten)}:
            self.on_change(provider)
        return tuple(forgotten)

    def _oldest(self) -> ProductKey:
        """The product whose last report is the longest ago, passing over those that the coordinator itself found false."""
        for _ in range(len(self._records)):
            oldest = next(iter(self._records))
            if not self._records[oldest].probe_failures:
                break
            self._records.move_to_end(oldest)
        return next(iter(self._records))

    def _forget(self, product: ProductKey) -> None:
        del self._records[product]
        products = self._products[product.provider]
        products.remove(product)
        if not products:
            del self._products[product.provider]

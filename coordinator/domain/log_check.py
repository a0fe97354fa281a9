"""Replays a match log from its first leaf: computes its root, and names each leaf that broke the coordinator's own rule. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from coordinator.domain.integrity_records import (
    DAILY_EFFECT,
    DAY_SECONDS,
    UNAUDITED,
    IntegrityRecords,
    ProductKey,
    Standing,
    effect_of,
)
from coordinator.domain.match_leaf import check_leaf
from tallystick.protocol.audit_reports import AuditVerdict
from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.log_facts import INTEGRITY_STEPS, AskFacts
from tallystick.protocol.log_leaves import WEIGHT_ONE, ReportLeaf, RestartLeaf
from tallystick.protocol.match_log import MERGE_SECONDS, MatchLeaf, load_leaf
from tallystick.protocol.merkle import Edge, leaf_hash
from tallystick.protocol.messages import Ask, LogHead, ReportAck
from tallystick.protocol.precisions import precision_class
from tallystick.protocol.types import Address, Hash, JobId

_REMEMBERED_JOBS = 100_000
"""Jobs whose earlier attempts are remembered, to check which providers had them."""
_REMEMBERED_ASKS = 100_000
"""Asks whose facts are remembered, to compare them with the signed asks."""
_CLAIMS_AN_ASK = 8
_FORMER_STANDINGS = 256
_MAX_TIME = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one leaf."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class AskClaim:
    """What leaves say of a signed ask. Prices are base units per 1,000,000 tokens, times are Unix seconds."""

    provider: Address
    model: str
    input_price: int
    cached_input_price: int
    output_price: int
    valid_from: int
    valid_until: int
    precision: str | None
    """None if a leaf does not say it."""

    @classmethod
    def of_leaf(cls, leaf: MatchLeaf, provider: Address, facts: AskFacts) -> AskClaim:
        """What a leaf says."""
        prices = facts.input_price, facts.cached_input_price, facts.output_price
        precision = facts.precision if leaf.audited else None
        return cls(provider, leaf.model, *prices, facts.valid_from, facts.valid_until, precision)

    @classmethod
    def of_ask(cls, ask: Ask) -> AskClaim:
        """What the provider signed, as a leaf has it."""
        prices = ask.input_price, ask.cached_input_price, ask.output_price
        validity = min(ask.valid_from, _MAX_TIME), min(ask.valid_until, _MAX_TIME)
        return cls(ask.provider, ask.model, *prices, *validity, precision_class(ask.spec.precision))


@dataclass(slots=True)
class LogReplay:
    """Takes the leaves of a log in order. `matches`, `restarts`, `reports`, `forgotten`: what was counted so far."""

    edge: Edge = field(default_factory=Edge)
    promises: Mapping[int, ReportAck] = field(default_factory=dict)
    """The coordinator's promises to log reports, by the number of the leaf."""
    matches: int = 0
    restarts: int = 0
    reports: int = 0
    forgotten: int = 0
    """Leaves whose contents the coordinator has deleted; only their hashes were checked."""
    integrity: IntegrityRecords = field(default_factory=IntegrityRecords)
    """What the reports so far make of each product."""
    _at: int = 0
    _epochs: set[int] = field(default_factory=set)
    """The leaves that are restarts."""
    _tried: OrderedDict[JobId, list[Address]] = field(default_factory=OrderedDict)
    _reported: OrderedDict[tuple[bytes, Address, bool], None] = field(default_factory=OrderedDict)
    _report_hashes: OrderedDict[Hash, None] = field(default_factory=OrderedDict)
    _effects: deque[tuple[int, tuple[ProductKey, bool], int]] = field(default_factory=deque)
    """What each of payers' latest reports added to a product, with the report's time and whether it praised."""
    _effect_sums: Counter[tuple[ProductKey, bool]] = field(default_factory=Counter)
    _former: dict[Address, deque[tuple[int, dict[ProductKey, Standing]]]] = field(default_factory=dict)
    """What the standings of a provider were before its latest reports, with the times of these."""
    _claims: dict[Hash, dict[AskClaim, int]] = field(default_factory=dict)
    """For each ask, what leaves say of it, and the first leaf that says so."""

    def add(self, digest: Hash, data: bytes | None) -> Iterator[Fault]:
        """Takes the next leaf: its hash, and its contents if they are kept. Yields what is wrong with it."""
        index = self.edge.size
        self.edge.append(digest)
        promise = self.promises.get(index)
        if promise is not None and promise.leaf_hash != digest:
            yield Fault(index, f"the coordinator promised to log the report {promise.report_hash.hex()} here, and dropped it")
        if data is None:
            self.forgotten += 1
            return
        if leaf_hash(data) != digest:
            yield Fault(index, "its contents do not have the hash that the log has")
            return
        try:
            leaf = load_leaf(data)
        except BadMessage as error:
            yield Fault(index, str(error))
            return
        if leaf.at < self._at:
            yield Fault(index, f"it is of {leaf.at}, and an earlier leaf is of {self._at}: it is back-dated")
        self._at = max(self._at, leaf.at)
        if isinstance(leaf, RestartLeaf):
            texts = self._restart(index)
        else:
            texts = self._report(index, leaf) if isinstance(leaf, ReportLeaf) else self._match(index, leaf)
        for text in texts:
            yield Fault(index, text)

    def _report(self, index: int, leaf: ReportLeaf) -> Iterator[str]:
        self.reports += 1
        yield from self._check_epoch(leaf.epoch)
        finding = leaf.job_alias, leaf.provider, leaf.verdict == AuditVerdict.CONFIRMED
        if finding in self._reported or leaf.report_hash in self._report_hashes:
            yield f"the audit of the job with the alias {leaf.job_alias.hex()} is counted again"
        self._reported[finding] = self._report_hashes[leaf.report_hash] = None
        for remembered in (self._reported, self._report_hashes):
            while len(remembered) > _REMEMBERED_JOBS:
                remembered.popitem(last=False)
        yield from self._check_effect(leaf)
        former = self._former.setdefault(leaf.provider, deque(maxlen=_FORMER_STANDINGS))
        former.append((leaf.at, self.integrity.standings(leaf.provider)))
        self.integrity.apply(leaf, index)

    def _check_effect(self, leaf: ReportLeaf) -> Iterator[str]:
        """Sums what payers' reports add to a product within DAY_SECONDS, which is bounded."""
        if leaf.is_probe or leaf.verdict not in tuple(AuditVerdict):
            return
        verdict = AuditVerdict(leaf.verdict)
        key = ProductKey(leaf.provider, leaf.model, leaf.precision), verdict is AuditVerdict.PASS
        effects, effect = self._effects, effect_of(verdict, leaf.weight)
        while effects and (effects[0][0] <= leaf.at - DAY_SECONDS or len(effects) >= _REMEMBERED_JOBS):
            _, former, passed = effects.popleft()
            self._effect_sums[former] -= passed
            if not self._effect_sums[former]:
                del self._effect_sums[former]
        if not effect:
            return
        effects.append((leaf.at, key, effect))
        self._effect_sums[key] += effect
        if self._effect_sums[key] > DAILY_EFFECT:
            added, bound = self._effect_sums[key] / WEIGHT_ONE, DAILY_EFFECT // WEIGHT_ONE
            yield f"{leaf.provider}: payers' reports of a day count {added:g} audits of {leaf.model} together, more than {bound}"

    def _check_epoch(self, epoch: int) -> Iterator[str]:
        """Each process names its own restart, and the leaves of replicas alternate. Nobody knows what a forgotten leaf was."""
        if self._epochs and epoch >= self.forgotten and epoch not in self._epochs:
            yield f"it names leaf {epoch} as the restart of its process, and that is none; the last was {max(self._epochs)}"

    def _check_integrity(self, leaf: MatchLeaf) -> Iterator[str]:
        """Compares the integrity by which the matcher ranked with what the reports before the match make of it."""
        if not leaf.audited or self.forgotten:
            return
        for entry in leaf.considered:
            if entry.facts is None:
                continue
            own = self.integrity.standing(key := ProductKey(entry.provider, leaf.model, entry.facts.precision))
            known = [own, *self._latest_former(key, leaf.at)]
            if not any(_agrees(standing, entry.facts) for standing in known):
                recorded = f"{entry.facts.integrity / INTEGRITY_STEPS} after {entry.facts.audits} audits"
                expected = f"{own.integrity / INTEGRITY_STEPS} after {own.audits}"
                yield f"{entry.provider}: its integrity is recorded as {recorded}, and the logged reports make it {expected}"

    def _latest_former(self, key: ProductKey, at: int) -> Iterator[Standing]:
        """The standings of a product before the latest reports: a match is decided a moment before it is logged."""
        for changed_at, standings in self._former.get(key.provider, ()):
            if changed_at >= at - MERGE_SECONDS:
                yield standings.get(key, UNAUDITED)

    def _restart(self, index: int) -> Iterator[str]:
        self.restarts += 1
        self._epochs.add(index)
        yield from ()

    def check_missing(self, head: LogHead) -> Iterator[Fault]:
        """Yields the reports that the log must have by the time of its head, and has not, after all of its leaves were added."""
        for index, promise in self.promises.items():
            if index >= self.edge.size and head.signed_at > promise.accepted_at + MERGE_SECONDS:
                report = promise.report_hash.hex()
                yield Fault(index, f"the coordinator promised to log the report {report} here, and its log ends before")

    @property
    def models(self) -> set[str]:
        """The models whose asks the leaves name."""
        return {claim.model for claims in self._claims.values() for claim in claims}

    def check_ask(self, ask: Verified[Ask]) -> Iterator[Fault]:
        """Yields the leaves that say something else of an ask than what its provider signed."""
        signed = AskClaim.of_ask(ask.message)
        for claim, index in self._claims.get(ask.digest, {}).items():
            for member in fields(AskClaim):
                recorded, own = getattr(claim, member.name), getattr(signed, member.name)
                if recorded is not None and recorded != own:
                    yield Fault(
                        index, f"{signed.provider}: its {member.name} is recorded as {recorded}, and its signed ask says {own}"
                    )

    def _note_asks(self, index: int, leaf: MatchLeaf) -> None:
        for entry in leaf.considered:
            if entry.facts is not None and (entry.ask in self._claims or len(self._claims) < _REMEMBERED_ASKS):
                claims = self._claims.setdefault(entry.ask, {})
                if len(claims) < _CLAIMS_AN_ASK:
                    claims.setdefault(AskClaim.of_leaf(leaf, entry.provider, entry.facts), index)

    def _match(self, index: int, leaf: MatchLeaf) -> Iterator[str]:
        self.matches += 1
        self._note_asks(index, leaf)
        yield from self._check_epoch(leaf.epoch)
        yield from self._check_integrity(leaf)
        tried = self._tried.setdefault(leaf.job, [])
        unlogged = leaf.attempt - len(tried)  # a job that was cancelled before its dispatch has no leaf of that attempt
        excluded = [entry.provider for entry in leaf.considered if entry.outcome is Reason.FAILED and entry.provider not in tried]
        if not self.forgotten and unlogged < 0:
            yield f"it is attempt {leaf.attempt} of job {leaf.job.hex()}, and {len(tried)} were logged before"
        if not self.forgotten and len(excluded) > max(unlogged, 0):
            yield f"{excluded[0]} is said to have had the job before, and no earlier leaf says so"
        tried.append(leaf.chosen.provider)
        while len(self._tried) > _REMEMBERED_JOBS:
            self._tried.popitem(last=False)
        yield from check_leaf(leaf)


def _agrees(standing: Standing, facts: AskFacts) -> bool:
    """Whether a leaf has this standing. Machines differ in the last digit of a quantile."""
    return abs(standing.integrity - facts.integrity) <= 1 and standing.audits == facts.audits

"""Watches a coordinator's match log for one payer or node: what was matched must be in it, and every head must be of one log.

Without I/O and clock. The caller asks the coordinator `question()` in the background, never in a job's path, and passes on the
answer. Heads that other parties saw come through sealed requests and responses, which the coordinator cannot read or hold back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tallystick.protocol.eip712 import Domain, Signed, Verified, read_signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_count, read_members
from tallystick.protocol.log_evidence import Fraud, LogEntry, LogEvidence, LogSpan, contradicts, is_early, read_path, read_paths
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import MERGE_SECONDS, Match
from tallystick.protocol.merkle import Range, includes, includes_span, is_prefix
from tallystick.protocol.messages import LogHead, Order
from tallystick.protocol.types import Address, Hash

MAX_PENDING = 1_024
"""Matches that wait for their check. More than these replace others at random."""
MAX_ASKED = 16
"""Leaves, and sizes, that one question names."""
MAX_SPAN = 2_048
"""Leaves in a row that one question asks for."""
MIN_SHARE = 16
"""Leaves in a row are asked for if at least one in so many is expected among them; else each is asked for by its number."""
MAX_FOREIGN = 8
"""Heads of other parties that wait for their check."""
SETTLE_SECONDS = 3
"""How long after a match its leaf is asked for: a head is signed every second."""
_MAX_INDEX = (1 << 63) - 1


@dataclass(slots=True)
class PendingMatch:
    """A match whose leaf was not seen in the log yet. `restart`: the number of the leaf that may say why it is not there.
    `missed`: leaves in a row were shown in which its own was not, so it is asked for alone.
    """

    match: Match
    order: Signed[Order]
    received_at: int
    restart: int | None = None
    missed: bool = False
    early_at: int | None = None
    """When the match was due by the clock here for the first time, if it was not by the coordinator's head."""

    @property
    def due_at(self) -> int:
        """When the match must be in the log, in Unix seconds of the clock here."""
        return (self.received_at if self.early_at is None else self.early_at) + MERGE_SECONDS


@dataclass(frozen=True, slots=True)
class LogQuestion:
    """What to ask GET /v1/log/proof: that the log continues those of these sizes, which leaves have these numbers, and the hashes
    of leaves in a row. `span`: the first of these, and the one after the last; None for none.
    """

    since: tuple[int, ...]
    indexes: tuple[int, ...]
    span: Range | None = None

    @property
    def query(self) -> list[tuple[str, str]]:
        """The parameters of the request."""
        in_a_row = [] if self.span is None else [("start", str(self.span[0])), ("end", str(self.span[1]))]
        return [("since", str(size)) for size in self.since] + [("index", str(index)) for index in self.indexes] + in_a_row


@dataclass(frozen=True, slots=True)
class _Answer:
    head: Verified[LogHead]
    epoch: int
    proofs: dict[int, tuple[bytes, ...]]
    entries: dict[int, LogEntry]
    span: LogSpan | None


@dataclass(slots=True)
class LogMonitor:
    """See the module's docstring. `chance` draws uniformly from 0 to 1.

    `checked`: matches that were found in the log; `lost`: those that a restart of the coordinator lost, as its log admits;
    `skipped`: those that were not checked because too many waited.
    """

    domain: Domain
    coordinator: Address
    chance: Callable[[], float]
    head: Verified[LogHead] | None = None
    checked: int = 0
    lost: int = 0
    skipped: int = 0
    _pending: dict[Hash, PendingMatch] = field(default_factory=dict)
    """By the hash of the leaf. If two have one number, at least one of them is not in the log."""
    _foreign: dict[tuple[int, bytes], tuple[Verified[LogHead], int]] = field(default_factory=dict)
    _compared: tuple[int, bytes] | None = None

    @property
    def pending(self) -> list[PendingMatch]:
        """The matches that wait for their check."""
        return list(self._pending.values())

    def add_match(self, match: Match, order: Signed[Order], now: int) -> None:
        """Takes a match that the coordinator sent, whose `check` passed."""
        key = match.leaf_hash
        if key in self._pending:
            return
        if len(self._pending) >= MAX_PENDING:
            self.skipped += 1
            place = min(int(self.chance() * (MAX_PENDING + 1)), MAX_PENDING)
            if place == MAX_PENDING:
                return
            del self._pending[list(self._pending)[place]]
        self._pending[key] = PendingMatch(match, order, now)

    def add_head(self, head: Signed[LogHead], now: int) -> LogEvidence | None:
        """Takes a head that another party saw. Raises BadMessage, BadSignature for one that is not this coordinator's."""
        message = head.message
        key = (message.size, message.root)
        if key == self._compared or key in self._foreign or (self.head is not None and _key(self.head.message) == key):
            return None
        if message.coordinator != self.coordinator:
            raise BadMessage(f"head.coordinator: expected {self.coordinator}, got {message.coordinator}")
        verified = head.verify(self.domain)
        if self.head is not None:
            fraud = contradicts(self.head.message, message)
            if fraud is not None:
                return self._evidence(fraud, self.head, verified, checked_at=now)
        if len(self._foreign) < MAX_FOREIGN:
            self._foreign[key] = (verified, now)
        return None

    def question(self, now: int) -> LogQuestion | None:
        """What to ask the coordinator now; None if there is nothing."""
        due = [pending for pending in self._pending.values() if now >= pending.received_at + SETTLE_SECONDS]
        if not due and not self._foreign:
            return None
        span, due = _in_a_row(due, now)
        due = due[: MAX_ASKED // 2]
        sizes = dict.fromkeys(size for size, _ in self._foreign)
        if self.head is not None:
            sizes = dict.fromkeys((self.head.message.size, *sizes))
        indexes = dict.fromkeys(pending.match.index for pending in due)
        indexes |= dict.fromkeys(pending.restart for pending in due if pending.restart is not None)
        return LogQuestion(tuple(sizes)[:MAX_ASKED], tuple(indexes)[:MAX_ASKED], span)

    def answer(self, question: LogQuestion, raw: object, now: int) -> list[LogEvidence]:
        """Takes the answer to a question. Returns what it proves against the coordinator, which is kept forever.

        Raises BadMessage, BadSignature for an answer that is none; nothing is concluded from it.
        """
        answer = self._read(raw)
        found = self._compare(answer, now)
        if found:
            return found
        self.head = answer.head
        if question.span is not None and answer.span is not None:
            self._check_span(question.span, answer.span, answer.head.message)
        for pending in self.pending:
            if pending.match.index in question.indexes:
                evidence = self._check(pending, answer, now)
                found += [] if evidence is None else [evidence]
        return found

    def _read(self, raw: object) -> _Answer:
        head, epoch, consistency, inclusion = read_members(raw, "proof", "head", "epoch", "consistency", "inclusion")
        verified = read_signed(LogHead, head, "proof.head").verify(self.domain)
        if verified.message.coordinator != self.coordinator:
            raise BadMessage(f"proof.head.coordinator: expected {self.coordinator}, got {verified.message.coordinator}")
        proofs = read_paths(consistency, "proof.consistency", MAX_ASKED)
        entries = read_paths(inclusion, "proof.inclusion", MAX_ASKED)
        return _Answer(
            verified,
            read_count(epoch, "proof.epoch", high=_MAX_INDEX),
            {size: read_path(path, f"proof.consistency.{size}") for size, path in proofs.items()},
            {index: LogEntry.from_json(entry, f"proof.inclusion.{index}") for index, entry in entries.items()},
            LogSpan.from_json(raw["span"], "proof.span", MAX_SPAN) if isinstance(raw, dict) and raw.get("span") else None,
        )

    def _compare(self, answer: _Answer, now: int) -> list[LogEvidence]:
        """Compares the head of an answer with the own one and with those of others."""
        found = list[LogEvidence]()
        newest = answer.head.message
        known = [] if self.head is None else [(self.head, None)]
        for head, since in [*known, *self._foreign.values()]:
            message = head.message
            fraud = contradicts(message, newest)
            proof = answer.proofs.get(message.size, ())
            if fraud is None and message.size > newest.size:
                if since is None or now < since + MERGE_SECONDS:
                    continue  # an older head than one that is known is no answer to anything
                fraud = Fraud.INCONSISTENT
            if fraud is None and not is_prefix(message.size, message.root, newest.size, newest.root, proof):
                fraud = Fraud.INCONSISTENT
            if fraud is not None:
                found.append(self._evidence(fraud, head, answer.head, proof=proof, checked_at=now))
            if since is not None:
                del self._foreign[_key(message)]
                self._compared = _key(message)
        if not found and self.head is not None and newest.size < self.head.message.size:
            raise BadMessage(f"proof.head.size: expected at least {self.head.message.size}, got {newest.size}")
        return found

    def _check(self, pending: PendingMatch, answer: _Answer, now: int) -> LogEvidence | None:
        match, head = pending.match, answer.head.message
        entry = answer.entries.get(match.index)
        proven = entry is not None and includes(head.root, head.size, match.index, entry.hash, entry.path)
        if entry is not None and proven and entry.hash == match.leaf_hash:
            del self._pending[match.leaf_hash]
            self.checked += 1
            return None
        if not proven and now < pending.due_at:
            return None  # it may still come
        if not proven and pending.early_at is None and is_early(match, head):
            pending.early_at = now  # the clock here may have jumped: a head of the coordinator that is late too must come first
            return None
        if pending.restart is None:
            pending.restart = self._restart_before(entry if proven else None, answer, match)
            if pending.restart is not None:
                return None  # the next question asks for that leaf
        del self._pending[match.leaf_hash]
        if pending.restart is not None and self._was_lost(pending.restart, answer, match):
            self.lost += 1
            return None
        return self._evidence(
            Fraud.MISSING,
            answer.head,
            match=match,
            order=pending.order,
            entry=entry,
            received_at=pending.received_at,
            checked_at=now,
        )

    def _check_span(self, span: Range, shown: LogSpan, head: LogHead) -> None:
        """Checks off what is among leaves in a row. It proves nothing of the others: they are asked for one by one."""
        first, end = span
        proven = len(shown.hashes) == end - first and includes_span(head.root, head.size, first, shown.hashes, shown.path)
        for leaf, pending in tuple(self._pending.items()):
            index = pending.match.index
            if not first <= index < end:
                continue
            if proven and shown.hashes[index - first] == leaf:
                del self._pending[leaf]
                self.checked += 1
            else:
                pending.missed = True

    def _restart_before(self, entry: LogEntry | None, answer: _Answer, match: Match) -> int | None:
        """The number of the restart that may have lost this match; None if there was none after it."""
        contents = None if entry is None else entry.contents()
        epoch = answer.epoch if contents is None else contents.epoch_at(match.index)
        return epoch if match.decision.epoch < epoch <= match.index else None

    def _was_lost(self, restart: int, answer: _Answer, match: Match) -> bool:
        """Whether the log admits a restart after which the match's number was free again."""
        entry, head = answer.entries.get(restart), answer.head.message
        if entry is None or not includes(head.root, head.size, restart, entry.hash, entry.path):
            return False
        contents = entry.contents()
        return isinstance(contents, RestartLeaf) and contents.at >= match.decision.at

    def _evidence(self, fraud: Fraud, *heads: Verified[LogHead], **members: Any) -> LogEvidence:
        signed = tuple(Signed(head.message, head.signature) for head in heads)
        return LogEvidence(fraud, self.domain, self.coordinator, signed, **members)


def _in_a_row(due: list[PendingMatch], now: int) -> tuple[Range | None, list[PendingMatch]]:
    """Chooses leaves in a row among which many of these matches are. Returns their range, None if that does not pay, and the
    matches that are asked for alone.
    """
    alone = [pending for pending in due if pending.missed or now >= pending.received_at + MERGE_SECONDS]
    others = sorted(pending.match.index for pending in due if not pending.missed and now < pending.received_at + MERGE_SECONDS)
    first = others[0] if others else 0
    within = [index for index in others if index < first + MAX_SPAN]
    if len(within) <= MAX_ASKED // 2 or len(within) * MIN_SHARE < within[-1] + 1 - first:
        return None, due
    return (first, within[-1] + 1), alone


def _key(head: LogHead) -> tuple[int, bytes]:
    return head.size, head.root

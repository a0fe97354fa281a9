"""The match log: its leaves, the unsigned match that names one, and what a payer can open of it. Pure.

A coordinator appends each match to a Merkle log (merkle.py) and signs a `LogHead` for its size about once a second. A match
itself is not signed: its leaf must be in a signed head after MERGE_SECONDS. log_monitor.py checks that.

A leaf has what the matcher saw: each candidate in the order of its ranking, the facts about its ask, and the reason against it.
It names no payer. `commit` binds it to the payer's order; whoever knows the match's secret can open that commitment.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.log_facts import MAX_TIME, REQUEST_SIZE, AskFacts, RequestFacts
from tallystick.protocol.log_leaves import FORMER_MATCH, LEAF_HEAD, MATCH, REPORT, RESTART, VERSION, ReportLeaf, RestartLeaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.messages import LogHead
from tallystick.protocol.types import Address, Hash, JobId

MERGE_SECONDS = 60
"""Seconds after a match within which a signed head must contain its leaf."""
MAX_LEAF = 16 * 1024
MAX_CONSIDERED = 64
"""Candidates of one match: those of the submission, and those that were added while the job waited."""
SECRET_SIZE = 16
_BODY = struct.Struct(">Q16sB32s?dHB")
_CANDIDATE = struct.Struct(">20s32sBBI?")
_FRAME = struct.Struct(">Q16s32s")
_SIGNED_HEAD = struct.Struct(">Q32sQ65s")


class Verdict(Enum):
    """What came of a candidate that fitted: words that its provider reads."""

    CHOSEN = "got the job"
    OUTRANKED = "another was ranked before it: cheaper, or more reliable"
    UNPAID = "the payer's purse did not cover the job"
    HELD = "its free slot belongs to a job that waits for longer"


Outcome = Verdict | Reason
_CODES: dict[int, Outcome] = {
    0: Verdict.CHOSEN,
    1: Verdict.OUTRANKED,
    2: Verdict.UNPAID,
    3: Verdict.HELD,
    16: Reason.ASK_GONE,
    17: Reason.ASK_EXPIRED,
    18: Reason.ORDER_EXPIRED,
    19: Reason.BUSY,
    20: Reason.FAILED,
    21: Reason.MODEL,
}
"""The numbers of outcomes in a leaf. A number is never given to another outcome."""
_NUMBERS = {outcome: number for number, outcome in _CODES.items()}


class Considered(NamedTuple):
    """One candidate of a match. `place`: its place in the client's submission; `facts`: None if its ask was not listed.

    `deadline`: of its order, in Unix seconds.
    """

    provider: Address
    ask: Hash
    place: int
    outcome: Outcome
    deadline: int
    facts: AskFacts | None


@dataclass(frozen=True, slots=True)
class MatchLeaf:
    """One match. `epoch`: the number of the last RestartLeaf before it. `considered`: as they were ranked, best first, and then
    the candidates that did not fit. `draw`: the number from 0 to 1 that decided among near ties, see `draw_of`.
    """

    at: int
    epoch: int
    job: JobId
    attempt: int
    commitment: Hash
    ranked: bool
    draw: float
    model: str
    request: RequestFacts
    considered: tuple[Considered, ...]
    audited: bool = True

    def epoch_at(self, index: int) -> int:  # noqa: ARG002 - as RestartLeaf has it
        """The number of the last restart at this leaf."""
        return self.epoch

    @property
    def chosen(self) -> Considered:
        """The candidate that got the job."""
        return next(candidate for candidate in self.considered if candidate.outcome is Verdict.CHOSEN)

    def dumps(self) -> bytes:
        """The bytes of the leaf. Times and counts beyond their fields count as the largest value of these."""
        model = self.model.encode()
        parts = [
            LEAF_HEAD.pack(VERSION, MATCH if self.audited else FORMER_MATCH, self.at),
            _BODY.pack(
                self.epoch, self.job, self.attempt, self.commitment, self.ranked, self.draw, len(model), len(self.considered)
            ),
            model,
            self.request.dumps(),
        ]
        for entry in self.considered:
            provider = bytes.fromhex(entry.provider[2:])
            deadline, number = min(entry.deadline, MAX_TIME), _NUMBERS[entry.outcome]
            parts.append(_CANDIDATE.pack(provider, entry.ask, entry.place, number, deadline, entry.facts is not None))
            if entry.facts is not None:
                parts.append(entry.facts.dumps(audited=self.audited))
        return b"".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The leaf as people read it. Prices are base units."""
        return {
            "kind": "match",
            "at": self.at,
            "epoch": self.epoch,
            "job": self.job.hex(),
            "attempt": self.attempt,
            "commitment": self.commitment.hex(),
            "model": self.model,
            "ranked": self.ranked,
            "request": self.request.to_json(),
            "draw": self.draw,
            "considered": [_considered_json(entry) for entry in self.considered],
        }


Leaf = MatchLeaf | RestartLeaf | ReportLeaf


def _considered_json(entry: Considered) -> dict[str, Any]:
    shown = {"provider": entry.provider, "ask": entry.ask.hex(), "outcome": entry.outcome.value, "deadline": entry.deadline}
    return shown if entry.facts is None else shown | entry.facts.to_json()


def load_leaf(data: bytes) -> Leaf:
    """Reads a leaf. Raises BadMessage."""
    try:
        version, kind, at = LEAF_HEAD.unpack_from(data)
        if version != VERSION or kind > MATCH or len(data) > MAX_LEAF:
            raise BadMessage(f"leaf: expected version {VERSION} and a kind up to {MATCH}, got version {version}, kind {kind}")
        leaf: Leaf
        if kind == RESTART:
            leaf = RestartLeaf(at)
        elif kind == REPORT:
            leaf = ReportLeaf.loads(at, data)
        else:
            leaf = _load_match(at, data, audited=kind == MATCH)
    except (struct.error, UnicodeDecodeError):
        raise BadMessage(f"leaf: cut off, or its text is not UTF-8 ({len(data)} bytes)") from None
    if leaf.dumps() != data:
        raise BadMessage("leaf: expected its only encoding, got another one")
    return leaf


def _load_match(at: int, data: bytes, *, audited: bool) -> MatchLeaf:
    place = LEAF_HEAD.size
    epoch, job, attempt, commitment, ranked, draw, length, count = _BODY.unpack_from(data, place)
    place += _BODY.size
    model = data[place : place + length].decode()
    place += length
    request = RequestFacts.loads(data, place)
    place += REQUEST_SIZE
    if not 0 <= draw <= 1:
        raise BadMessage("leaf.draw: expected a number from 0 to 1")
    if not 1 <= count <= MAX_CONSIDERED:
        raise BadMessage(f"leaf.considered: expected 1 to {MAX_CONSIDERED}, got {count}")
    considered = list[Considered]()
    for _ in range(count):
        provider, ask, submitted, number, deadline, listed = _CANDIDATE.unpack_from(data, place)
        place += _CANDIDATE.size
        facts = None
        if listed:
            facts, place = AskFacts.loads(data, place, audited=audited)
        if number not in _CODES:
            raise BadMessage(f"leaf.outcome: expected a known number, got {number}")
        address = Address("0x" + provider.hex())
        considered.append(Considered(address, Hash(ask), submitted, _CODES[number], deadline, facts))
    if sum(entry.outcome is Verdict.CHOSEN for entry in considered) != 1:
        raise BadMessage("leaf.considered: expected one candidate that was chosen")
    listed_candidates = tuple(considered)
    return MatchLeaf(at, epoch, JobId(job), attempt, Hash(commitment), ranked, draw, model, request, listed_candidates, audited)


def commit(secret: bytes, payer: Address, order_hash: Hash, job: JobId) -> Hash:
    """The commitment of a leaf to the order that was matched: HMAC-SHA-256, keyed with the match's secret."""
    return Hash(hmac.digest(secret, bytes.fromhex(payer[2:]) + order_hash + job, hashlib.sha256))


def draw_of(job: JobId, attempt: int) -> float:
    """The draw of a match, from 0 to 1. The client chose the job's id, so the coordinator cannot choose the draw."""
    digest = hashlib.sha256(b"tallystick draw" + job + attempt.to_bytes(4, "big")).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


@dataclass(frozen=True, slots=True)
class Match:
    """The coordinator's choice of one order of a job, as a MATCH frame and a dispatch carry it: not signed, but logged.

    `index`: the number of its leaf in the log; `secret` opens the leaf's commitment to the order.
    """

    index: int
    secret: bytes
    order_hash: Hash
    leaf: bytes
    decision: MatchLeaf = field(compare=False, repr=False)

    @property
    def leaf_hash(self) -> Hash:
        """The hash that the log must have at `index`."""
        return leaf_hash(self.leaf)

    def dumps(self) -> bytes:
        """The wire form: the index (8 bytes, big-endian), the secret (16), the order's digest (32), the leaf."""
        return _FRAME.pack(self.index, self.secret, self.order_hash) + self.leaf

    @classmethod
    def loads(cls, data: bytes) -> Match:
        """Reads the wire form. Raises BadMessage."""
        if len(data) <= _FRAME.size:
            raise BadMessage(f"match: expected more than {_FRAME.size} bytes, got {len(data)}")
        index, secret, order_hash = _FRAME.unpack_from(data)
        leaf = data[_FRAME.size :]
        decision = load_leaf(leaf)
        if not isinstance(decision, MatchLeaf):
            raise BadMessage("match.leaf: expected the leaf of a match, got that of a restart or of a report")
        return cls(index, secret, Hash(order_hash), leaf, decision)

    def check(self, job: JobId, order_hash: Hash, provider: Address, payer: Address) -> None:
        """Checks that the match is of this order, and that its leaf is of this job, chose this provider and commits to the order.

        Raises BadMessage.
        """
        decision = self.decision
        if self.order_hash != order_hash:
            raise BadMessage(f"match.orderHash: expected {order_hash.hex()}, got {self.order_hash.hex()}")
        if decision.job != job:
            raise BadMessage(f"match.job: expected {job.hex()}, got {decision.job.hex()}")
        if decision.chosen.provider != provider:
            raise BadMessage(f"match.provider: expected {provider}, got {decision.chosen.provider}")
        if commit(self.secret, payer, self.order_hash, job) != decision.commitment:
            raise BadMessage("match.leaf: expected a commitment to the matched order, got another one")
        if decision.epoch >= self.index:
            raise BadMessage(f"match.index: expected one after the restart {decision.epoch}, got {self.index}")


def pack_head(head: Signed[LogHead]) -> bytes:
    """A head without its coordinator, which both sides know: size, root, time and signature, 113 bytes."""
    message = head.message
    return _SIGNED_HEAD.pack(message.size, message.root, message.signed_at, head.signature)


def unpack_head(data: bytes, coordinator: Address) -> Signed[LogHead]:
    """Reads `pack_head`. Raises BadMessage."""
    if len(data) != _SIGNED_HEAD.size:
        raise BadMessage(f"head: expected {_SIGNED_HEAD.size} bytes, got {len(data)}")
    size, root, signed_at, signature = _SIGNED_HEAD.unpack(data)
    return Signed(LogHead(coordinator=coordinator, size=size, root=Hash(root), signed_at=signed_at), signature)

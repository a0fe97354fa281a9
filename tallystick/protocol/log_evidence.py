"""Evidence about a coordinator's match log, as a file that anyone can judge offline. Pure.

Heads are signed, so two heads that cannot both be true prove a broken log to everybody. A match is not signed: that it is missing
is proven to its payer or its node alone. The file has what others need to weigh it: the payer's signed order and the leaf.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tallystick.protocol.eip712 import Domain, Signed, read_signed
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.json_members import read_count, read_items, read_members, read_text
from tallystick.protocol.log_leaves import RestartLeaf
from tallystick.protocol.match_log import MERGE_SECONDS, Leaf, Match, load_leaf
from tallystick.protocol.merkle import HASH_SIZE, includes, is_prefix, leaf_hash
from tallystick.protocol.messages import LogHead, Order
from tallystick.protocol.types import Address, Hash, parse_address
from tallystick.protocol.wire import dumps, loads

MAX_FILE = 64 * 1024
MAX_PATH = 64
_MAX_INDEX = (1 << 63) - 1


class Fraud(Enum):
    """What a coordinator did, in words for people."""

    SPLIT = "two heads of the same size have different roots: the coordinator shows different logs"
    OUT_OF_ORDER = "of two heads, the later one has fewer leaves: the coordinator took leaves back"
    INCONSISTENT = "the coordinator could not prove that its log of the larger size begins with that of the smaller one"
    MISSING = "a match is not in the log at its number, although it was due"


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A leaf as the coordinator proves it: its hash, its contents if they are kept, and its path to a head's root."""

    hash: Hash
    leaf: bytes | None
    path: tuple[bytes, ...]

    @classmethod
    def from_json(cls, raw: object, where: str) -> LogEntry:
        """Reads one member of `inclusion`. Raises BadMessage."""
        digest, leaf, path = read_members(raw, where, "hash", "leaf", "path")
        contents = None if leaf is None else read_hex(leaf, f"{where}.leaf")
        entry = cls(Hash(read_hex(digest, f"{where}.hash", 32)), contents, read_path(path, f"{where}.path"))
        if contents is not None and leaf_hash(contents) != entry.hash:
            raise BadMessage(f"{where}.leaf: expected the contents with hash {entry.hash.hex()}, got others")
        return entry

    def to_json(self) -> dict[str, Any]:
        """The wire form."""
        leaf = None if self.leaf is None else self.leaf.hex()
        return {"hash": self.hash.hex(), "leaf": leaf, "path": [part.hex() for part in self.path]}

    def contents(self) -> Leaf | None:
        """The leaf; None if its contents are not known or cannot be read."""
        try:
            return None if self.leaf is None else load_leaf(self.leaf)
        except BadMessage:
            return None


@dataclass(frozen=True, slots=True)
class LogSpan:
    """Leaves in a row as the coordinator proves them: their hashes, and those of what lies beside them in a head's tree."""

    hashes: tuple[Hash, ...]
    path: tuple[bytes, ...]

    @classmethod
    def from_json(cls, raw: object, where: str, most: int) -> LogSpan:
        """Reads the member `span` with up to `most` leaves. Raises BadMessage."""
        listed, path = read_members(raw, where, "hashes", "path")
        size = HASH_SIZE
        data = read_hex(read_text(listed, f"{where}.hashes", 2 * size * most), f"{where}.hashes")
        if len(data) % size:
            raise BadMessage(f"{where}.hashes: expected hashes of {size} bytes in a row, got {len(data)} bytes")
        hashes = tuple(Hash(data[place : place + size]) for place in range(0, len(data), size))
        return cls(hashes, read_path(path, f"{where}.path", 2 * MAX_PATH))


@dataclass(frozen=True, slots=True)
class LogEvidence:
    """See the module's docstring. `heads`: the heads that the evidence is about, the earlier one first; the last one is the
    coordinator's answer. `match` and `order`: of a missing match. `entry`: what the log has at its number. `proof`: what the
    coordinator gave as a proof of consistency. `received_at`, `checked_at`: Unix seconds by the reporter's clock.
    """

    fraud: Fraud
    domain: Domain
    coordinator: Address
    heads: tuple[Signed[LogHead], ...]
    match: Match | None = None
    order: Signed[Order] | None = None
    entry: LogEntry | None = None
    proof: tuple[bytes, ...] = ()
    received_at: int = 0
    checked_at: int = 0

    def dumps(self) -> bytes:
        """The file."""
        return dumps(
            {
                "fraud": self.fraud.name.lower(),
                "domain": self.domain.to_json(),
                "coordinator": self.coordinator,
                "heads": [head.to_json() for head in self.heads],
                "match": None if self.match is None else self.match.dumps().hex(),
                "order": None if self.order is None else self.order.to_json(),
                "entry": None if self.entry is None else self.entry.to_json(),
                "proof": [part.hex() for part in self.proof],
                "receivedAt": self.received_at,
                "checkedAt": self.checked_at,
            }
        )

    @classmethod
    def loads(cls, data: bytes) -> LogEvidence:
        """Reads a file. Raises BadMessage."""
        if len(data) > MAX_FILE:
            raise BadMessage(f"evidence: expected at most {MAX_FILE} bytes, got {len(data)}")
        raw = loads(data, "evidence")
        fraud, domain, coordinator, heads = read_members(raw, "evidence", "fraud", "domain", "coordinator", "heads")
        match, order, entry, proof = read_members(raw, "evidence", "match", "order", "entry", "proof")
        received_at, checked_at = read_members(raw, "evidence", "receivedAt", "checkedAt")
        names = {kind.name.lower(): kind for kind in Fraud}
        if fraud not in names:
            raise BadMessage(f"evidence.fraud: expected one of {', '.join(names)}")
        chain, contract = read_members(domain, "evidence.domain", "chainId", "verifyingContract")
        return cls(
            names[fraud],
            Domain(read_count(chain, "evidence.domain.chainId", high=_MAX_INDEX), parse_address(contract, "evidence.domain")),
            parse_address(coordinator, "evidence.coordinator"),
            tuple(read_signed(LogHead, head, "evidence.heads") for head in read_items(heads, "evidence.heads", 2)),
            None if match is None else Match.loads(read_hex(match, "evidence.match")),
            None if order is None else read_signed(Order, order, "evidence.order"),
            None if entry is None else LogEntry.from_json(entry, "evidence.entry"),
            read_path(proof, "evidence.proof"),
            read_count(received_at, "evidence.receivedAt", high=_MAX_INDEX),
            read_count(checked_at, "evidence.checkedAt", high=_MAX_INDEX),
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a file shows. `proven`: to everybody, by the coordinator's own signatures. `text`: why, and what it rests on."""

    proven: bool
    text: str


def judge(evidence: LogEvidence) -> Judgement:
    """Judges a file from what is in it alone. Raises BadMessage, BadSignature for one that shows nothing."""
    heads = []
    for head in evidence.heads:
        if head.message.coordinator != evidence.coordinator:
            raise BadSignature(f"evidence.heads: expected heads of {evidence.coordinator}, got {head.message.coordinator}")
        heads.append(head.verify(evidence.domain).message)
    if evidence.fraud is Fraud.MISSING:
        return _judge_missing(evidence, heads)
    if len(heads) != 2:
        raise BadMessage(f"evidence.heads: expected two, got {len(heads)}")
    contradiction = contradicts(*heads)
    if contradiction is not None:
        return Judgement(True, contradiction.value)
    first, second = sorted(heads, key=lambda head: head.size)
    if is_prefix(first.size, first.root, second.size, second.root, evidence.proof):
        raise BadMessage("evidence: the proof in the file shows that both heads are of one log")
    return Judgement(False, f"{Fraud.INCONSISTENT.value}. Anyone can ask it for the proof: GET /v1/log/consistency")


def contradicts(first: LogHead, second: LogHead) -> Fraud | None:
    """What two heads of one coordinator prove by themselves; None if both may be true."""
    if first.size == second.size:
        return Fraud.SPLIT if first.root != second.root else None
    smaller, larger = sorted((first, second), key=lambda head: head.size)
    return Fraud.OUT_OF_ORDER if smaller.signed_at > larger.signed_at else None


def _judge_missing(evidence: LogEvidence, heads: Sequence[LogHead]) -> Judgement:
    match, order, entry = evidence.match, evidence.order, evidence.entry
    if match is None or order is None or not heads:
        raise BadMessage("evidence: expected a match, its order and a head")
    payer, head = order.message.payer, heads[-1]
    verified = order.verify(evidence.domain)
    match.check(match.decision.job, verified.digest, order.message.provider, payer)
    if order.message.coordinator != evidence.coordinator:
        raise BadMessage(f"evidence.order: expected one through {evidence.coordinator}, got {order.message.coordinator}")
    provider = order.message.provider
    signed_order = f"The order of {payer} on {provider} is signed. The match is not: that it came is the reporter's word"
    if head.size <= match.index:
        if is_early(match, head):
            raise BadMessage(f"evidence: the head was signed before the match was due ({MERGE_SECONDS} s after it)")
        return Judgement(False, f"the head has {head.size} leaves, and the match was to be number {match.index}. {signed_order}")
    if entry is None or not includes(head.root, head.size, match.index, entry.hash, entry.path):
        return Judgement(False, f"the coordinator did not prove which leaf is number {match.index}. {signed_order}")
    if entry.hash == match.leaf_hash:
        raise BadMessage("evidence: the match is in the log, at its number")
    contents = entry.contents()
    if contents is not None and not isinstance(contents, RestartLeaf) and contents.epoch > match.decision.epoch:
        signed_order += f". The coordinator restarted meanwhile (leaf {contents.epoch})"
    return Judgement(False, f"another leaf is number {match.index} in the log. {signed_order}")


def is_early(match: Match, head: LogHead) -> bool:
    """Whether the log need not have the match under this head yet, by the times that the coordinator itself signed."""
    return head.size <= match.index and head.signed_at < match.decision.at + MERGE_SECONDS


def read_hex(raw: object, where: str, size: int | None = None) -> bytes:
    """Hex digits as bytes; of `size` bytes if it is given. Raises BadMessage."""
    try:
        data = bytes.fromhex(read_text(raw, where, 2 * MAX_FILE))
    except ValueError:
        raise BadMessage(f"{where}: expected hex digits") from None
    if size is not None and len(data) != size:
        raise BadMessage(f"{where}: expected {size} bytes, got {len(data)}")
    return data


def read_path(raw: object, where: str, limit: int = MAX_PATH) -> tuple[bytes, ...]:
    """The hashes of a proof. Raises BadMessage."""
    return tuple(read_hex(part, where, 32) for part in read_items(raw, where, limit))


def read_paths(raw: object, where: str, limit: int) -> Mapping[int, Any]:
    """An object whose keys are numbers. Raises BadMessage."""
    if not isinstance(raw, dict) or len(raw) > limit or not all(key.isdecimal() and len(key) < 20 for key in raw):
        raise BadMessage(f"{where}: expected a JSON object of at most {limit} numbers")
    return {int(key): value for key, value in raw.items()}

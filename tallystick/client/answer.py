"""The answer to a job, as its client reads it: a state machine over response frames, with no I/O in it.

Legal order: MATCH, then CHUNKs, then RECEIPT; a second MATCH (failover) only before any CHUNK, and of another order; FAIL and
BEAT at any time. The first chunk is the response head, the others are the body. What breaks the order, does not parse or is not
signed by who it must be is the coordinator's fault: it stands between, and nothing of it is held against a provider.
"""

from __future__ import annotations

from collections.abc import Mapping

from tallystick.client.payer import Delivered, Placed
from tallystick.protocol.eip712 import Domain, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadSeal, BadSignature, Fault, TallyError, from_public
from tallystick.protocol.messages import Match, Receipt
from tallystick.protocol.sealing import ContentKey, Opener, Transcript
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId
from tallystick.protocol.wire import Kind, ResponseHead, load_response_head, loads

CHUNK_COST = 64
"""Bytes that keeping a chunk takes beside its content."""


class Answer:
    """One answer. `accept` takes frames in the order in which they came.

    `kept`: the plaintext chunks so far, where up to `keep_bytes` of them are to be kept; None once they are more.
    """

    def __init__(
        self,
        job: JobId,
        key: ContentKey,
        placed: Mapping[Hash, Placed],
        domain: Domain,
        coordinator: Address,
        *,
        keep_bytes: int = 0,
    ) -> None:
        self.job, self.key = job, key
        self.kept: list[bytes] | None = [] if keep_bytes else None
        self._room = keep_bytes
        self.match: Placed | None = None
        self.head: ResponseHead | None = None
        self.receipt: Verified[Receipt] | None = None
        self.failure: TallyError | None = None
        self.body_bytes = 0
        self.chunks = 0
        self._placed, self._domain, self._coordinator = placed, domain, coordinator
        self._opener: Opener | None = None
        self._transcript: Transcript | None = None
        self._matched: dict[Hash, int] = {}

    @property
    def ended(self) -> bool:
        """Whether nothing more can come: a receipt or a failure did."""
        return self.receipt is not None or self.failure is not None

    @property
    def passed_over(self) -> list[Address]:
        """The providers that had the job before the one that answered, and did not do it."""
        return [self._placed[order].provider for order in list(self._matched)[:-1]]

    @property
    def whole(self) -> bool:
        """Whether the last chunk came."""
        return self._opener is not None and self._opener.finished

    @property
    def candidates(self) -> tuple[Placed, ...]:
        """The job's orders, in the shortlist's order."""
        return tuple(self._placed.values())

    def delivered(self, request_bytes: int, *, bounded: bool) -> Delivered:
        """What arrived, to hold a receipt against."""
        commitment = self._transcript.commitment if self._transcript is not None else ZERO_HASH
        return Delivered(request_bytes, self.body_bytes, commitment, self.whole, bounded)

    def accept(self, kind: Kind, payload: bytes) -> bytes:
        """Takes a frame and returns the bytes of the body that it brought, often none. Raises PeerError."""
        try:
            return self._take(kind, payload)
        except (BadMessage, BadSignature, BadSeal) as error:
            error.fault = Fault.COORDINATOR
            raise

    def _take(self, kind: Kind, payload: bytes) -> bytes:
        if kind is Kind.CHUNK:
            return self._chunk(payload)
        if kind is Kind.MATCH:
            self._take_match(payload)
        elif kind is Kind.RECEIPT:
            self._take_receipt(payload)
        elif kind is Kind.FAIL:
            self.failure = from_public(loads(payload, "failure"), 502)
        elif kind is not Kind.BEAT:
            raise BadMessage(f"frame: {kind.name} has no place in an answer")
        return b""

    def _chunk(self, payload: bytes) -> bytes:
        if self._opener is None or self._transcript is None:
            raise BadMessage("frame: a chunk before any match")
        chunk = self._opener.open(payload)
        self._transcript.add(chunk)
        self.chunks += 1
        self._keep(chunk)
        if self.head is None:
            self.head = load_response_head(chunk)
            if self.head.status < 200:
                raise BadMessage(f"response.status: {self.head.status} ends no answer")
            return b""
        self.body_bytes += len(chunk)
        return chunk

    def _keep(self, chunk: bytes) -> None:
        if self.kept is not None:
            self._room -= len(chunk) + CHUNK_COST
            self.kept.append(chunk)
            if self._room < 0:
                self.kept = None

    def _take_match(self, payload: bytes) -> None:
        if self.chunks:
            raise BadMessage("frame: a match after output has begun")
        match = read_signed(Match, loads(payload, "match")).verify(self._domain).message
        placed = self._placed.get(match.order_hash)
        if match.coordinator != self._coordinator or match.job != self.job:
            raise BadMessage("match: of another coordinator or job")
        if placed is None or placed.provider != match.provider:
            raise BadMessage("match: names no order of this job")
        if match.order_hash in self._matched or any(match.attempt <= attempt for attempt in self._matched.values()):
            raise BadMessage(f"match: attempt {match.attempt} repeats an earlier one")
        self._matched[match.order_hash] = match.attempt
        self.match = placed
        self._opener = Opener(self.key, self.job, match.order_hash)
        self._transcript = Transcript(self.key.commitment_key, match.order_hash)

    def _take_receipt(self, payload: bytes) -> None:
        if self.match is None:
            raise BadMessage("frame: a receipt before any match")
        self.receipt = read_signed(Receipt, loads(payload, "receipt")).verify(self._domain)

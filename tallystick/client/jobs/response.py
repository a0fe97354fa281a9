"""The answer to a job, as its client reads it: a state machine over response frames, with no I/O in it.

Legal order: MATCH, then CHUNKs, then RECEIPT; a second MATCH (failover) only before any CHUNK, and of another order; VOID, the
receipt at no cost of the attempt that was matched last, before the next MATCH or FAIL; FAIL and BEAT at any time. The first chunk
is the response head, the others are the body. What breaks the order, does not parse or is not signed by who it must be is the
coordinator's fault: it stands between, and nothing of it is held against a provider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.protocol.eip712 import Domain, Verified, read_signed
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSeal, BadSignature, Fault, TallyError
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Match, Outcome, Receipt
from tallystick.protocol.sealing import ContentKey, Opener, Transcript
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import Address, Hash, JobId
from tallystick.protocol.wire import Failure, Kind, ResponseHead, load_response_head, loads

CHUNK_COST = 64
"""Bytes that keeping a chunk takes beside its content."""


class JobResponse:
    """One answer. `accept` takes frames in the order in which they came.

    `kept`: the plaintext chunks so far, where up to `keep_bytes` of them are to be kept; None once they are more. `voids`:
    receipts at no cost that came, with their orders, for the reader to book and take out.
    """

    def __init__(
        self,
        job: JobId,
        key: ContentKey,
        placed: Mapping[Hash, PlacedOrder],
        domain: Domain,
        coordinator: Address,
        *,
        keep_bytes: int = 0,
    ) -> None:
        self.job, self.key = job, key
        self.kept: list[bytes] | None = [] if keep_bytes else None
        self._room = keep_bytes
        self.match: PlacedOrder | None = None
        self.head: ResponseHead | None = None
        self.receipt: Verified[Receipt] | None = None
        self.failure: TallyError | None = None
        self.body_bytes = 0
        self.chunks = 0
        self._placed, self._domain, self._coordinator = placed, domain, coordinator
        self._opener: Opener | None = None
        self._transcript: Transcript | None = None
        self._matched: dict[Hash, int] = {}
        self.voids: deque[tuple[PlacedOrder, Verified[Receipt]]] = deque()
        self._voided: dict[Hash, Hash] = {}

    @property
    def ended(self) -> bool:
        """Whether nothing more can come: a receipt or a failure did."""
        return self.receipt is not None or self.failure is not None

    @property
    def failed_providers(self) -> list[Address]:
        """The providers that had the job before the one that answered, and did not do it."""
        return [self._placed[order].provider for order in list(self._matched)[:-1]]

    @property
    def whole(self) -> bool:
        """Whether the last chunk came."""
        return self._opener is not None and self._opener.finished

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """The job's orders, in the shortlist's order."""
        return tuple(self._placed.values())

    def delivered(
        self, request_bytes: int, *, bounded: bool, cancelled: bool = False, stream: StreamEnd = StreamEnd.ENDED
    ) -> Delivery | None:
        """What arrived of the attempt that was matched last, to hold its receipt against; None before any match."""
        if self._transcript is None:
            return None
        seen = self._transcript.commitment
        return Delivery(request_bytes, self.body_bytes, seen, self.whole, bounded, cancelled, stream)

    def arrived(
        self, request_bytes: int, *, bounded: bool, cancelled: bool = False, stream: StreamEnd = StreamEnd.ENDED
    ) -> dict[Hash, Delivery]:
        """What arrived for each order that a provider had and gave no receipt for: nothing, but for the last one."""
        last = self.delivered(request_bytes, bounded=bounded, cancelled=cancelled, stream=stream)
        found: dict[Hash, Delivery] = {}
        for order in self._matched:
            if order in self._voided or (self.receipt is not None and self.receipt.message.order_hash == order):
                continue
            nothing = Delivery.empty(self.key, order, request_bytes, bounded=bounded)
            here = self.match is not None and self.match.order.digest == order
            found[order] = last if here and last is not None else nothing
        return found

    def unmatched(self, request_bytes: int, *, bounded: bool, stream: StreamEnd) -> dict[Hash, Delivery]:
        """Nothing, for each order whose match did not arrive before the stream was lost."""
        return {
            order: Delivery.empty(self.key, order, request_bytes, bounded=bounded, cancelled=True, stream=stream)
            for order in self._placed
            if order not in self._matched
        }

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
        elif kind is Kind.VOID:
            self._take_void(read_signed(Receipt, loads(payload, "void receipt")).verify(self._domain))
        elif kind is Kind.FAIL:
            failure = Failure.loads(payload)
            if failure.receipt is not None:
                self._take_void(failure.receipt.verify(self._domain))
            self.failure = failure.error
        elif kind is not Kind.BEAT:
            raise BadMessage(f"frame: {kind.name} has no place in an answer")
        return b""

    def _chunk(self, payload: bytes) -> bytes:
        if self._opener is None or self._transcript is None:
            raise BadMessage("frame: a chunk before any match")
        if self.match is not None and self.match.order.digest in self._voided:
            raise BadMessage("frame: a chunk after its attempt's receipt at no cost")
        chunk = self._opener.open(payload)
        self._transcript.add(chunk)
        self.chunks += 1
        self._keep(chunk)
        if self.head is None and self.whole and not chunk:
            return b""  # an attempt that was stopped before it answered
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

    def _take_void(self, receipt: Verified[Receipt]) -> None:
        if self.match is None:
            raise BadMessage("frame: a receipt at no cost before any match")
        order = self.match.order.digest
        if self._voided.get(order, receipt.digest) != receipt.digest:
            raise BadMessage("frame: a second receipt at no cost for one attempt")
        try:
            check_receipt(self.match.order, self.match.terms, receipt.message)
        except BadReceipt as error:
            raise BadMessage(f"void {error}") from error
        if CHARGES[Outcome(receipt.message.outcome)] is not Charge.NOTHING:
            raise BadMessage("void receipt.outcome: one that may charge")
        self._voided[order] = receipt.digest
        self.voids.append((self.match, receipt))

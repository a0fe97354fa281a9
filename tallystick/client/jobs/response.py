"""Reads a job's response: a state machine over response frames, without I/O.

Legal order: MATCH, then CHUNKs, then RECEIPT. A second MATCH (failover) is legal only before any CHUNK, and only for another
order. HEDGE tells of a second attempt beside the one that was matched last; it is legal once, before any CHUNK, if the job asked
for it. The CHUNKs are of the attempt that was matched last, so a MATCH of the second attempt follows if that one is faster. VOID
carries the receipt at no cost of an attempt that failed or was outrun. FAIL and BEAT may come at any time. The first chunk is
the response head, the others are the body.

Rows of evidence may come in chunks of their own before the last one.

A frame that breaks this order, does not parse or has a wrong signature is the coordinator's fault, because every frame passes
through it. It is never held against a provider.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.answer_evidence import NO_EVIDENCE, AnswerEvidence, EvidenceState, check_rows, most_bytes
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.protocol.eip712 import Domain, Verified, read_signed_bytes
from tallystick.protocol.errors import BadMessage, BadReceipt, BadSeal, BadSignature, Fault, TallyError
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.match_log import Match
from tallystick.protocol.messages import Order, Outcome, Receipt
from tallystick.protocol.plaintext_heads import ResponseHead, load_response_head
from tallystick.protocol.pricing import charge, usage_of
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.sealing import ContentKey, Opener, Transcript, is_evidence
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import ZERO_HASH, Address, Hash, JobId
from tallystick.protocol.wire import Failure, Kind

CHUNK_OVERHEAD = 64
"""Bytes that keeping a chunk takes beside its content."""
MAX_REASON = 1_000
"""Characters of an engine's own words that an error has."""


class JobResponse:
    """The response to one job. `accept` takes its frames in the order in which they arrive.

    `kept`: the plaintext chunks so far, if up to `keep_bytes` of them are to be kept; None once they exceed that. `voids`:
    receipts at no cost and their orders, which the reader records and removes.
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
        may_hedge: bool = False,
    ) -> None:
        """`may_hedge`: the job may run at two providers at a time."""
        self.job, self.key = job, key
        self._may_hedge = may_hedge
        self.kept: list[bytes] | None = [] if keep_bytes else None
        self._keep_bytes_left = keep_bytes
        self.match: PlacedOrder | None = None
        self.hedged_from: PlacedOrder | None = None
        """The order of the attempt beside which a second one began."""
        self._hedge: Hash | None = None
        self.head: ResponseHead | None = None
        self.receipt: Verified[Receipt] | None = None
        self.failure: TallyError | None = None
        self.place: QueuePlace | None = None
        """The job's last known place in the coordinator's queue, while it waits for a free slot."""
        self.body_bytes = 0
        self.chunks = 0
        self.complete = False
        """Whether the last chunk came."""
        self._rows: bytearray | None = bytearray()
        """Packed rows of evidence so far; None once they are more than the order allows."""
        self._evidence: AnswerEvidence | None = None
        self._placed, self._domain, self._coordinator = dict(placed), domain, coordinator
        self._opener: Opener | None = None
        self._transcript: Transcript | None = None
        self._attempts: dict[Hash, int] = {}
        self.matches: list[Match] = []
        """The matches so far, which the coordinator must have logged."""
        self.voids: deque[tuple[PlacedOrder, Verified[Receipt]]] = deque()
        self._voided: dict[Hash, Hash] = {}

    @property
    def ended(self) -> bool:
        """Whether a receipt or a failure came, after which no frame is legal."""
        return self.receipt is not None or self.failure is not None

    @property
    def packed_rows(self) -> bytes:
        """The rows of evidence that came, unchecked; none if they are more than the order allows."""
        return bytes(self._rows or b"")

    @property
    def evidence(self) -> AnswerEvidence:
        """The rows of evidence that came, checked once against the receipt; none before it came.

        Rows of a response that was cut off are not judged: the coordinator may have dropped some.
        """
        if self.receipt is None or self.match is None:
            return NO_EVIDENCE
        if not self.complete:
            is_none = self.receipt.message.evidence_root == ZERO_HASH
            return NO_EVIDENCE if is_none else AnswerEvidence(EvidenceState.NOT_SENT)
        if self._evidence is None:
            packed = None if self._rows is None else bytes(self._rows)
            self._evidence = check_rows(self.receipt.message, packed, self.match.terms.max_output_tokens)
        return self._evidence

    @property
    def failed_providers(self) -> list[Address]:
        """The providers that had the job and neither did it nor were outrun."""
        current = None if self.match is None else self.match.order.digest
        pair = () if self.hedged_from is None else (self.hedged_from.order.digest, self._hedge)
        return [self._placed[order].provider for order in self._attempts if order != current and order not in pair]

    @property
    def outrun_order(self) -> Hash | None:
        """The order of the attempt that another one outran, while its receipt is missing; None if there is none."""
        if self.hedged_from is None or self.match is None:
            return None
        current, first = self.match.order.digest, self.hedged_from.order.digest
        other = {first: self._hedge, self._hedge: first}.get(current)
        return None if other in self._voided else other

    @property
    def hedge_cost(self) -> int | None:
        """What the receipt costs more than the first provider would have charged for the same usage, in base units.

        Below 0 if it is cheaper; None for a job that did not run at two providers.
        """
        if self.hedged_from is None or self.receipt is None:
            return None
        receipt = self.receipt.message
        return receipt.cost - charge(self.hedged_from.terms, usage_of(receipt), Outcome(receipt.outcome))

    @property
    def candidates(self) -> tuple[PlacedOrder, ...]:
        """The job's orders, in the order of the shortlist."""
        return tuple(self._placed.values())

    @property
    def logged_matches(self) -> list[tuple[Match, Verified[Order]]]:
        """The matches so far, each with its order."""
        return [(match, self._placed[match.order_hash].order) for match in self.matches]

    def add_orders(self, placed: Sequence[PlacedOrder]) -> None:
        """Adds orders that were signed while the job waited. Any of them may be matched from now on."""
        self._placed |= {order.order.digest: order for order in placed}

    def delivered(
        self, request_bytes: int, *, bounded: bool, cancelled: bool = False, stream: StreamEnd = StreamEnd.ENDED
    ) -> Delivery | None:
        """What arrived from the provider that was matched last, to check its receipt against; None before any match."""
        if self._transcript is None:
            return None
        commitment = self._transcript.commitment
        return Delivery(request_bytes, self.body_bytes, commitment, self.complete, bounded, cancelled, stream)

    def delivered_by_order(
        self, request_bytes: int, *, bounded: bool, cancelled: bool = False, stream: StreamEnd = StreamEnd.ENDED
    ) -> dict[Hash, Delivery]:
        """What arrived for each matched order without a receipt: nothing, except for the order that was matched last."""
        last = self.delivered(request_bytes, bounded=bounded, cancelled=cancelled, stream=stream)
        delivered: dict[Hash, Delivery] = {}
        for order in self._attempts:
            if order in self._voided or (self.receipt is not None and self.receipt.message.order_hash == order):
                continue
            nothing = Delivery.empty(self.key, order, request_bytes, bounded=bounded)
            is_last = self.match is not None and self.match.order.digest == order
            delivered[order] = last if is_last and last is not None else nothing
        return delivered

    def unmatched(self, request_bytes: int, *, bounded: bool, stream: StreamEnd) -> dict[Hash, Delivery]:
        """An empty delivery for each order whose match had not arrived when the stream was lost."""
        return {
            order: Delivery.empty(self.key, order, request_bytes, bounded=bounded, cancelled=True, stream=stream)
            for order in self._placed
            if order not in self._attempts
        }

    def accept(self, kind: Kind, payload: bytes) -> bytes:
        """Accepts one frame and returns the body bytes in it, which are often none. Raises PeerError."""
        try:
            return self._take(kind, payload)
        except (BadMessage, BadSignature, BadSeal) as error:
            error.fault = Fault.COORDINATOR
            raise

    def _take(self, kind: Kind, payload: bytes) -> bytes:
        if kind is Kind.CHUNK:
            return self._take_chunk(payload)
        if kind is Kind.MATCH:
            self._take_match(self._read_match(payload))
        elif kind is Kind.HEDGE:
            self._take_hedge(self._read_match(payload))
        elif kind is Kind.RECEIPT:
            self._take_receipt(payload)
        elif kind is Kind.VOID:
            self._take_void(read_signed_bytes(Receipt, payload, "void receipt").verify(self._domain))
        elif kind is Kind.FAIL:
            failure = Failure.loads(payload)
            if failure.receipt is not None:
                self._take_void(failure.receipt.verify(self._domain))
            self.failure = self._with_reason(failure.error)
        elif kind is Kind.BEAT:
            self.place = QueuePlace.loads(payload) if payload else None
        else:
            raise BadMessage(f"frame: expected a frame of a response, got {kind.name}")
        return b""

    def _with_reason(self, failure: TallyError) -> TallyError:
        """The failure with its node's own words, which came sealed. Words that do not open are left out."""
        sealed, failure.sealed_reason = failure.sealed_reason, None
        if sealed is None or self.match is None:
            return failure
        try:
            reason = self.key.open_reason(self.match.order.digest, sealed)
        except BadSeal:
            return failure
        failure.opened_reason = "".join(character for character in reason if character.isprintable())[:MAX_REASON] or None
        return failure

    def _take_chunk(self, payload: bytes) -> bytes:
        if self._opener is None or self._transcript is None:
            raise BadMessage("frame: expected a match before the first chunk")
        if self.match is not None and self.match.order.digest in self._voided:
            raise BadMessage("frame: expected no chunk after the receipt at no cost of its attempt")
        chunk = self._opener.open(payload)
        self.complete = self._opener.finished
        if is_evidence(payload):
            return self._take_evidence(chunk)
        self._transcript.add(chunk)
        self.chunks += 1
        self._keep(chunk)
        if self.head is None and self.complete and not chunk:
            return b""  # the attempt was stopped before its answer began
        if self.head is None:
            self.head = load_response_head(chunk)
            if self.head.status < 200:
                raise BadMessage(f"response.status: expected a final status, at least 200, got {self.head.status}")
            return b""
        self.body_bytes += len(chunk)
        return chunk

    def _take_evidence(self, rows: bytes) -> bytes:
        if self._rows is not None and self.match is not None:
            fits = len(self._rows) + len(rows) <= most_bytes(self.match.terms.max_output_tokens)
            self._rows = self._rows + rows if fits else None
        return b""

    def _keep(self, chunk: bytes) -> None:
        if self.kept is not None:
            self._keep_bytes_left -= len(chunk) + CHUNK_OVERHEAD
            self.kept.append(chunk)
            if self._keep_bytes_left < 0:
                self.kept = None

    def _read_match(self, payload: bytes) -> Match:
        if self.chunks:
            raise BadMessage("frame: expected no match after the first chunk")
        match = Match.loads(payload)
        placed = self._placed.get(match.order_hash)
        if placed is None:
            raise BadMessage(f"match.orderHash: expected an order of this job, got {match.order_hash.hex()}")
        match.check(self.job, placed.order.digest, placed.provider, placed.order.message.payer)
        return match

    def _take_hedge(self, match: Match) -> None:
        if not self._may_hedge or self.match is None or self.hedged_from is not None:
            raise BadMessage("frame: expected at most one second attempt, beside a first one, of a job that allows it")
        self._add_attempt(match)
        self.hedged_from, self._hedge = self.match, match.order_hash

    def _add_attempt(self, match: Match) -> None:
        attempt = match.decision.attempt
        if match.order_hash in self._attempts or any(attempt <= earlier for earlier in self._attempts.values()):
            raise BadMessage(f"match.attempt: expected another order and a number above all before, got {attempt}")
        self._attempts[match.order_hash] = attempt
        self.matches.append(match)

    def _take_match(self, match: Match) -> None:
        second = match.order_hash == self._hedge and self.match is self.hedged_from
        if second and match.order_hash in self._voided:
            raise BadMessage("match: expected another attempt than one whose receipt at no cost came")
        if not second:
            self._add_attempt(match)
        self.match, self.place = self._placed[match.order_hash], None
        self._opener, self.complete = Opener(self.key, self.job, match.order_hash), False
        self._transcript = Transcript(self.key.commitment_key, match.order_hash)

    def _take_receipt(self, payload: bytes) -> None:
        if self.match is None:
            raise BadMessage("frame: expected a match before the receipt")
        self.receipt = read_signed_bytes(Receipt, payload).verify(self._domain)

    def _take_void(self, receipt: Verified[Receipt]) -> None:
        order = receipt.message.order_hash
        if order not in self._attempts:
            raise BadMessage("frame: expected a match before a receipt at no cost")
        if self._voided.get(order, receipt.digest) != receipt.digest:
            raise BadMessage("frame: expected one receipt at no cost for each attempt, got another")
        placed = self._placed[order]
        try:
            check_receipt(placed.order, placed.terms, receipt.message)
        except BadReceipt as error:
            raise BadMessage(f"void {error}") from error
        if CHARGES[Outcome(receipt.message.outcome)] is not Charge.NOTHING:
            raise BadMessage(
                f"void receipt.outcome: expected one that charges nothing, got {Outcome(receipt.message.outcome).name.lower()}"
            )
        self._voided[order] = receipt.digest
        self.voids.append((placed, receipt))

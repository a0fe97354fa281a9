"""Compares a bill with the answer that arrived, and refuses charges for output that never arrived. Pure.

Part of an answer that was billed but did not arrive also counts against its provider, in quarters of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from tallystick.protocol.errors import BadReceipt, Fault
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.sealing import ContentKey, Transcript
from tallystick.protocol.types import Hash, format_amount
from tallystick.protocol.wire import INITIAL_CREDIT

OUTPUT_ALLOWANCE = 64
"""Output tokens that a receipt may bill beyond the bytes of the answer: end marks and other tokens without text."""

IN_FLIGHT_TOKENS = 16 * INITIAL_CREDIT
"""Output tokens that a receipt may bill beyond what arrived of a lost stream: one credit window of chunks, at 16 tokens a chunk,
may have been in flight.
"""

MAX_UNDELIVERED_QUARTERS = 12
"""Quarters of an answer: a provider that billed this many without delivering them (three whole answers) is blocked."""
QUARTERS_UNDELIVERED, QUARTERS_CUT_SHORT, QUARTERS_DELIVERED = 4, 1, -1
"""Quarters that an answer adds: billed beyond what arrived; billed for what arrived of a lost stream; delivered whole."""


class StreamEnd(str, Enum):
    """How this client's reading of a job's stream ended.

    `ended`: read up to the frame that ended the job. `abandoned`: lost or given up, and the job was cancelled with it.
    `resumable`: lost, and the idempotency key still brings the answer.
    """

    ENDED = "ended"
    ABANDONED = "abandoned"
    RESUMABLE = "resumable"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the client itself saw of a job: bytes sent and received, the transcript's commitment, whether the last chunk came.

    `bounded` is False if the request's tokens cannot be bounded by bytes (images, audio, files by reference). `cancelled` says
    whether this client may have cancelled the job: it asked to, or it lost a stream of the job.
    """

    request_bytes: int
    response_bytes: int
    commitment: Hash
    finished: bool
    bounded: bool = True
    cancelled: bool = False
    stream: StreamEnd = StreamEnd.ENDED

    @classmethod
    def empty(
        cls,
        key: ContentKey,
        order: Hash,
        request_bytes: int,
        *,
        bounded: bool,
        cancelled: bool = False,
        stream: StreamEnd = StreamEnd.ENDED,
    ) -> Self:
        """The delivery of an order for which no byte arrived; `key` is the content key of its job."""
        begun = Transcript(key.commitment_key, order).commitment
        return cls(request_bytes, 0, begun, finished=False, bounded=bounded, cancelled=cancelled, stream=stream)

    def to_json(self) -> dict[str, Any]:
        """The form in which the ledger stores it."""
        return {
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
            "commitment": self.commitment.hex(),
            "finished": self.finished,
            "bounded": self.bounded,
            "cancelled": self.cancelled,
            "stream": self.stream.value,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Delivery:
        """The inverse of `to_json`."""
        return cls(**(raw | {"commitment": Hash(bytes.fromhex(raw["commitment"])), "stream": StreamEnd(raw["stream"])}))


class UndeliveredCharge(BadReceipt):
    """A receipt that bills output which did not arrive, where nobody can tell which party withheld it.

    The receipt is not recorded, its order counts until `claim_by`, and the client must not buy the same request again. An honest
    coordinator forwards no such receipt.
    """

    fault = Fault.COORDINATOR


def excess_tokens(receipt: Receipt, delivery: Delivery) -> int:
    """Output tokens billed beyond what the bytes that arrived can hold; zero or negative if there are none.

    If bytes do not bound the tokens (images), nothing is in excess as long as something arrived.
    """
    if not delivery.bounded and (delivery.response_bytes or delivery.finished):
        return 0
    return receipt.output_tokens - delivery.response_bytes - OUTPUT_ALLOWANCE


def check_delivery(receipt: Receipt, delivery: Delivery, *, same_transcript: bool) -> None:
    """Checks a receipt that charges: either the last chunk came, or this client cancelled and the bill covers only what arrived.

    `same_transcript`: the receipt commits to exactly what arrived. Raises UndeliveredCharge.
    """
    charged = format_amount(receipt.cost)
    if receipt.outcome == Outcome.CLIENT_CANCELLED and not delivery.cancelled:
        raise UndeliveredCharge(
            f"receipt.outcome: expected an outcome other than client_cancelled, since this client did not cancel; the receipt "
            f"charges {charged} and was not recorded"
        )
    if delivery.finished or same_transcript or delivery.stream is StreamEnd.RESUMABLE:
        return
    if delivery.stream is StreamEnd.ENDED and receipt.outcome != Outcome.CLIENT_CANCELLED:
        raise UndeliveredCharge(f"receipt.cost: {charged} for an answer whose last chunk never came; it was not recorded")
    allowed = IN_FLIGHT_TOKENS if delivery.stream is StreamEnd.ABANDONED else 0
    excess = excess_tokens(receipt, delivery)
    if excess > allowed:
        raise UndeliveredCharge(
            f"receipt.outputTokens: expected at most {receipt.output_tokens - excess + allowed}, since {delivery.response_bytes} "
            f"bytes of the answer arrived, got {receipt.output_tokens}; the receipt charges {charged} and was not recorded"
        )


def undelivered_quarters(receipt: Receipt, delivery: Delivery | None) -> int:
    """Quarters of an answer that an accepted receipt adds to its provider's count; see QUARTERS_UNDELIVERED."""
    if delivery is None or CHARGES[Outcome(receipt.outcome)] is Charge.NOTHING:
        return 0
    if delivery.finished:
        return QUARTERS_DELIVERED
    if not receipt.cost:
        return 0
    return QUARTERS_UNDELIVERED if excess_tokens(receipt, delivery) > 0 else QUARTERS_CUT_SHORT

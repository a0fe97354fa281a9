"""The payer's half of the tab, pure: how high a ceiling to sign, and whether a receipt may raise the tab.

A tab is with one provider, for life. Its next ceiling is the cost of all accepted receipts, plus the caps of all open orders,
plus the new job's cap. Receipts of concurrent jobs come in any order, and some never come (a lost connection); each one
carries the tab's total, so a later one tells what the missing ones cost. Such a total is the provider's word. It counts as
accepted as far as no open order explains it, and something else does: orders that expired without a receipt, or orders of this
key that these books lacked and were shown. An order that was released or never matched explains nothing.

No clock, no store: callers bring both. What it costs to be wrong: the payer can lose the caps in flight, nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from tallystick.protocol import pricing
from tallystick.protocol.eip712 import Domain, Signer, Verified
from tallystick.protocol.errors import BadReceipt, Code, Fault, Refusal
from tallystick.protocol.jobs import CHARGES, Charge
from tallystick.protocol.messages import Ask, Order, Outcome, Receipt, Terms
from tallystick.protocol.sealing import ContentKey, Transcript, padded_size
from tallystick.protocol.tab import MAX_SEQ, PayerTab, check_receipt
from tallystick.protocol.types import Address, Amount, Hash, JobId, format_amount
from tallystick.protocol.wire import INITIAL_CREDIT

OUTPUT_ALLOWANCE = 64
"""Output tokens that a receipt may claim beyond the bytes of the answer: end marks and other tokens that no text shows."""

IN_FLIGHT_TOKENS = 16 * INITIAL_CREDIT
"""Output tokens that a receipt may claim beyond what arrived before the stream was lost: one credit window of chunks, which may
have been on their way, at 16 tokens a chunk.
"""

MAX_UNDELIVERED_QUARTERS = 12
"""Quarters of an answer. A provider with so many of them charged and not delivered gets no more orders: three whole answers."""
QUARTERS_UNDELIVERED, QUARTERS_CUT_SHORT, QUARTERS_DELIVERED = 4, 1, -1
"""Quarters that an answer adds: charged beyond what arrived; charged for what arrived of a lost stream; whole and verified."""

MAX_AWAITING_RECEIPTS = 8
"""Orders that were dispatched, whose jobs ended, and for which no receipt came. A provider with so many gets no more orders until
receipts come or the orders' `claim_by` passes: each one raises the ceilings of later orders by its cap.
"""

RESERVE_MULTIPLE = 4
"""An order asks for a reservation of at most so many times what the provider's booked receipts cost."""

MAX_CAP = Amount(10**15)
"""Base units; the cap of a job is never above this (a billion dollars), so that sums of caps fit 63 bits."""


@dataclass(frozen=True, slots=True)
class OrderPolicy:
    """What every order of a payer says. Amounts are base units, durations seconds. `reserve_target` is the most that an order
    asks to reserve; see `reserve_for`.
    """

    reserve_target: Amount
    start_seconds: int
    run_seconds: int
    claim_seconds: int
    max_fee_bps: int


@dataclass(frozen=True, slots=True)
class PlacedOrder:
    """A signed order and the terms that it commits to."""

    order: Verified[Order]
    terms: Terms

    @property
    def provider(self) -> Address:
        """Whose order it is."""
        return self.order.message.provider


@dataclass(frozen=True, slots=True)
class Tab:
    """What the ledger knows of one provider, in base units.

    `accepted`: cost of the receipts that the ledger holds. `total`: the highest cumulative cost among them. `open_caps`: caps of
    the orders that may still be collected (not released, and before their `claim_by`). `early_caps`: the part of `open_caps` that
    was signed before the receipt with that total came. `ceiling`: the highest ceiling ever signed. `order_seq`: seq of the last
    order. `awaiting_receipts`: number of orders of ended jobs without a receipt. `undelivered_quarters`: see
    MAX_UNDELIVERED_QUARTERS. `blocked_reason`: why this provider gets no orders until a person unblocks it; empty if it is not
    blocked. `expired_caps`: caps of the orders whose `claim_by` passed without a receipt. `recovered`: what was proven, or
    accepted by a person, beyond the receipts in this ledger.
    """

    accepted: Amount = Amount(0)
    total: Amount = Amount(0)
    open_caps: Amount = Amount(0)
    early_caps: Amount = Amount(0)
    ceiling: Amount = Amount(0)
    order_seq: int = 0
    blocked_reason: str = ""
    awaiting_receipts: int = 0
    undelivered_quarters: int = 0
    expired_caps: Amount = Amount(0)
    recovered: Amount = Amount(0)

    @property
    def exclusion_reason(self) -> str:
        """Why no order may be signed for this provider now; empty if one may."""
        return self.blocked_reason or awaiting_receipts_reason(self.awaiting_receipts)

    @property
    def protocol_tab(self) -> PayerTab:
        """The tab as the protocol's arithmetic takes it. Early open orders may explain what the total has beyond `accepted`; the
        rest counts as far as it can be more than the provider's word.
        """
        return PayerTab(Amount(max(self.accepted, min(self.total - self.early_caps, self._known))), self.open_caps)

    @property
    def explained_total(self) -> Amount:
        """The total, as far as orders of this key explain it."""
        return Amount(min(self.total, self._known + self.open_caps))

    @property
    def _known(self) -> int:
        return self.accepted + self.recovered + self.expired_caps


def awaiting_receipts_reason(count: int) -> str:
    """Why a provider with so many orders without a receipt gets none for now; empty if it may have more."""
    if count < MAX_AWAITING_RECEIPTS:
        return ""
    return f"{count} orders of ended jobs wait for its receipts; more are signed when these came or the orders' claimBy passed"


def cap_for(ask: Ask, request_bytes: int, output_tokens: int) -> Amount:
    """The cap of a request (base units) whose plaintext has this many bytes and whose output has at most this many tokens.

    It is the worst case of the padded size, which the coordinator sees anyhow: so the cap does not tell the length.
    """
    prices = pricing.Prices(ask.input_price, ask.cached_input_price, ask.output_price)
    return pricing.worst_case(padded_size(request_bytes), output_tokens, prices)


def reserve_for(tab: Tab, most: Amount) -> Amount:
    """What an order asks to keep reserved for its provider, in base units: nothing before its first booked receipt that charged,
    then RESERVE_TIMES what its receipts cost, at most `most`.
    """
    return Amount(min(most, RESERVE_MULTIPLE * tab.accepted))


def terms_for(ask: Verified[Ask], *, job: JobId, commitment: Hash, output_tokens: int, body_bytes: int) -> Terms:
    """The terms of a job on this ask, for a plaintext of `body_bytes` bytes and output of so many tokens; see `cap_for`."""
    offer = ask.message
    return Terms(
        model=offer.model,
        ask=ask.digest,
        input_price=offer.input_price,
        cached_input_price=offer.cached_input_price,
        output_price=offer.output_price,
        max_cost=cap_for(offer, body_bytes, output_tokens),
        max_output_tokens=output_tokens,
        job=job,
        request_commitment=commitment,
    )


def check_cap(terms: Terms, max_cost: Amount | None) -> None:
    """Holds the cap of a job against what its payer allows for one. Raises Refusal (cost_above_cap)."""
    limit = min(MAX_CAP, MAX_CAP if max_cost is None else max_cost)
    if terms.max_cost > limit:
        raise Refusal(
            Code.COST_ABOVE_CAP,
            f"this request may cost up to {format_amount(terms.max_cost)}, above the {format_amount(limit)} allowed for one "
            "request; lower max_tokens or raise max_cost",
        )


def sign_order(
    tab: Tab,
    terms: Terms,
    *,
    signer: Signer,
    provider: Address,
    coordinator: Address,
    domain: Domain,
    policy: OrderPolicy,
    now_ns: int,
) -> PlacedOrder:
    """The order of a job on one provider. `now_ns` is Unix time in nanoseconds: it makes seq unique across lost state files."""
    now = now_ns // 1_000_000_000
    order = Order(
        payer=signer.address,
        provider=provider,
        ceiling=tab.protocol_tab.ceiling_for(terms.max_cost),
        reserve_target=reserve_for(tab, policy.reserve_target),
        seq=max(tab.order_seq + 1, now_ns),
        deadline=now + policy.start_seconds,
        claim_by=now + policy.claim_seconds,
        max_fee_bps=policy.max_fee_bps,
        coordinator=coordinator,
        terms_hash=terms.struct_hash(),
    )
    return PlacedOrder(signer.sign(order, domain), terms)


class StreamEnd(str, Enum):
    """How far this client followed a job's stream: `read` to the frame that ended the job; `left`: it was lost or given up, and
    the job cancelled with it; `kept`: it was lost, and the idempotency key still brings the answer.
    """

    ENDED = "ended"
    ABANDONED = "abandoned"
    RESUMABLE = "resumable"


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the client itself saw of a job: bytes sent and received, the transcript's commitment, whether the last chunk came.

    `bounded` is False for requests whose tokens cannot be bounded by bytes (images, audio, files by reference). `cancelled`:
    whether this client may have cancelled the job: it asked to, or a stream of the job was lost.
    """

    request_bytes: int
    response_bytes: int
    commitment: Hash
    finished: bool
    bounded: bool = True
    cancelled: bool = False
    stream: StreamEnd = StreamEnd.ENDED

    @classmethod
    def nothing(
        cls,
        key: ContentKey,
        order: Hash,
        request_bytes: int,
        *,
        bounded: bool,
        cancelled: bool = False,
        stream: StreamEnd = StreamEnd.ENDED,
    ) -> Self:
        """Of an order of which no byte arrived; `key` is its job's."""
        begun = Transcript(key.commitment_key, order).commitment
        return cls(request_bytes, 0, begun, finished=False, bounded=bounded, cancelled=cancelled, stream=stream)

    def to_json(self) -> dict[str, Any]:
        """As the ledger keeps it."""
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
        """The inverse."""
        return cls(**(raw | {"commitment": Hash(bytes.fromhex(raw["commitment"])), "stream": StreamEnd(raw["stream"])}))


class UndeliveredCharge(BadReceipt):
    """A receipt that charges for what did not arrive, where it cannot be told who kept it back. It is not booked, its order
    counts until `claim_by`, and the same request must not be bought again. An honest coordinator passes no such receipt on.
    """

    fault = Fault.COORDINATOR


def check_against_order(placed: PlacedOrder, receipt: Receipt, delivered: Delivery | None) -> None:
    """A verified receipt against its order and against what arrived (None: this process crashed, nobody knows; the terms bound
    it).

    Raises BadReceipt. Its fault is the coordinator where the receipt belongs to another order: that says nothing about the
    provider. Raises Undelivered where it charges for what did not arrive, and somebody between may have kept that back.
    """
    order = placed.order
    if (receipt.payer, receipt.provider, receipt.order_hash) != (order.message.payer, order.message.provider, order.digest):
        raise BadReceipt("receipt: of another order than the one that was matched", fault=Fault.COORDINATOR)
    check_receipt(order, placed.terms, receipt)
    if not 0 < receipt.seq <= MAX_SEQ:
        raise BadReceipt(f"receipt.seq: {receipt.seq}; tabs count from 1, and no tab is that long")
    if delivered is None or CHARGES[Outcome(receipt.outcome)] is Charge.NOTHING:
        return
    _check_input(receipt, delivered)
    same = receipt.result_commitment == delivered.commitment
    if delivered.finished and not same:
        raise BadReceipt("receipt.resultCommitment: not the transcript of the answer that arrived")
    if same:
        _check_output(receipt, delivered)
    if receipt.cost:
        _check_delivery(receipt, delivered, same=same)


def _check_input(receipt: Receipt, delivered: Delivery) -> None:
    most = delivered.request_bytes + pricing.TEMPLATE_ALLOWANCE
    if delivered.bounded and receipt.input_tokens > most:
        raise BadReceipt(f"receipt.inputTokens: {receipt.input_tokens}, but the request's bytes hold at most {most}")


def _check_output(receipt: Receipt, delivered: Delivery) -> None:
    """The provider signed for exactly what arrived."""
    ended = receipt.outcome in (Outcome.COMPLETED, Outcome.LENGTH)
    if ended and not delivered.finished and delivered.stream is StreamEnd.ENDED:
        raise BadReceipt("receipt.outcome: a finished answer, but its last chunk was never sent")
    beyond = _beyond(receipt, delivered)
    if beyond > 0:
        raise BadReceipt(f"receipt.outputTokens: {receipt.output_tokens}, {beyond} more than the answer's bytes can hold")


def _beyond(receipt: Receipt, delivered: Delivery) -> int:
    """Output tokens billed beyond what the bytes that arrived can hold; 0 or less if none. Where bytes do not bound the tokens
    (images), nothing is beyond as long as something arrived.
    """
    if not delivered.bounded and (delivered.response_bytes or delivered.finished):
        return 0
    return receipt.output_tokens - delivered.response_bytes - OUTPUT_ALLOWANCE


def _check_delivery(receipt: Receipt, delivered: Delivery, *, same: bool) -> None:
    """A receipt that charges: the last chunk came, or this client cancelled and the bill stays within what arrived."""
    if receipt.outcome == Outcome.CLIENT_CANCELLED and not delivered.cancelled:
        raise UndeliveredCharge(
            f"receipt.outcome: client_cancelled, and this client did not cancel; {receipt.cost} charged are not booked"
        )
    if delivered.finished or same or delivered.stream is StreamEnd.RESUMABLE:
        return
    if delivered.stream is StreamEnd.ENDED and receipt.outcome != Outcome.CLIENT_CANCELLED:
        raise UndeliveredCharge(f"receipt: charges {receipt.cost}, but the answer's last chunk never came; it is not booked")
    allowed = IN_FLIGHT_TOKENS if delivered.stream is StreamEnd.ABANDONED else 0
    if _beyond(receipt, delivered) > allowed:
        text = f"{delivered.response_bytes} bytes of the answer arrived, which hold no {receipt.output_tokens} tokens"
        raise UndeliveredCharge(f"receipt.outputTokens: {text}; it charges {receipt.cost} and is not booked")


def undelivered_quarters(receipt: Receipt, delivered: Delivery | None) -> int:
    """What an accepted receipt adds to its provider's `undelivered`, in quarters of an answer; see NOT_DELIVERED."""
    if delivered is None or CHARGES[Outcome(receipt.outcome)] is Charge.NOTHING:
        return 0
    if delivered.finished:
        return QUARTERS_DELIVERED
    if not receipt.cost:
        return 0
    return QUARTERS_UNDELIVERED if _beyond(receipt, delivered) > 0 else QUARTERS_CUT_SHORT


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """What speaks against a receipt that keeps every rule, in words; `refuse`: this payer accepts no such receipt."""

    reason: str
    refuse: bool


def check_audit(doubt: AuditFinding | None) -> None:
    """Raises BadReceipt for what this payer does not accept."""
    if doubt is not None and doubt.refuse:
        raise BadReceipt(f"receipt: {doubt.reason}")


@dataclass(frozen=True, slots=True)
class AdjacentReceipts:
    """The receipts held around a new one: with its seq, the next lower and the next higher, and the one of the same order."""

    same_seq: Receipt | None = None
    below: Receipt | None = None
    above: Receipt | None = None
    same_order: Receipt | None = None

    @classmethod
    def of(cls, receipt: Receipt, others: Iterable[Receipt]) -> AdjacentReceipts:
        """Those among some receipts of its tab; the receipt itself is none of them."""
        near = [one for one in others if one != receipt]
        return cls(
            same_seq=next((one for one in near if one.seq == receipt.seq), None),
            below=max((one for one in near if one.seq < receipt.seq), key=lambda one: one.seq, default=None),
            above=min((one for one in near if one.seq > receipt.seq), key=lambda one: one.seq, default=None),
            same_order=next((one for one in near if one.order_hash == receipt.order_hash), None),
        )


def check_sequence(receipt: Receipt, near: AdjacentReceipts) -> None:
    """A receipt against its tab. Raises BadReceipt.

    Duplicates must be recognised before. Seqs may be missing in between (concurrent jobs, lost answers); totals must then
    leave room for what is missing, and be exact where nothing is. A total above every ceiling that the ledger knows is no lie
    of the provider's while the key may have signed orders that the ledger lost; nor is it believed.
    """
    if near.same_seq is not None:
        raise BadReceipt(f"receipt.seq: {receipt.seq} was used for another receipt before (equivocation)")
    if near.same_order is not None:
        raise BadReceipt(f"receipt: a second one for the same order; the first has seq {near.same_order.seq}")
    if near.below is not None:
        _check_step(near.below, receipt)
    elif receipt.seq == 1 and receipt.cumulative_cost != receipt.cost:
        raise BadReceipt(
            f"receipt.cumulativeCost: {receipt.cumulative_cost} on a tab's first receipt, which costs {receipt.cost}"
        )
    if near.above is not None:
        _check_step(receipt, near.above)


def _check_step(lower: Receipt, higher: Receipt) -> None:
    least = lower.cumulative_cost + higher.cost
    if higher.cumulative_cost < least or (higher.seq == lower.seq + 1 and higher.cumulative_cost != least):
        raise BadReceipt(
            f"receipt.cumulativeCost: {higher.cumulative_cost} at seq {higher.seq} does not continue "
            f"{lower.cumulative_cost} at seq {lower.seq} plus {higher.cost}"
        )

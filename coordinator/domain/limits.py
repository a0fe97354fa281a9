"""Limits of jobs and requests: deadlines of a job's phases, the rules that an order must meet, and shares of memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Order, Terms
from tallystick.protocol.types import Address, format_amount
from tallystick.protocol.wire import MAX_BODY

MIN_LINK_RATE = 1 << 18
"""Bytes per second at which a dispatch is assumed to reach a node. A node on a slower link counts as absent."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Deadlines in seconds, the rules for orders, and the number of concurrent jobs."""

    accept: float = 10
    """From the dispatch to the node's answer, for a small body."""
    first_output: float = 120
    idle: float = 60
    """Between two chunks."""
    total: float = 3_600
    """The whole job, without the time that its reader takes."""
    reader: float = 600
    """How long a client may keep its job waiting, in all."""
    cancel: float = 15
    """From a cancel to the node's receipt."""
    node_return: float = 3
    """From the loss of a node's connection to its return, for a job whose output had begun."""
    beat: float = 10
    """Between two signs of life for a client whose job is silent."""
    wait: float = 120
    """How long a job waits for a free slot if its client does not say."""
    max_wait: float = 600
    max_waiting: int = 10_000
    """Jobs that wait for a free slot."""
    max_waiting_per_model: int = 5_000
    """Of one model. Batch jobs may be half of them."""
    max_waiting_bytes: int = 256 << 20
    """The requests of all jobs that wait. Those of one model may take half."""
    max_order_seconds: int = 3_600
    """How far ahead an order's deadline may lie, and how long replays are remembered."""
    min_claim_window: int = 3_600
    """How long an order must leave its provider to claim."""
    match_log_seconds: float = 1
    """Between two signed heads of the match log, while there are new matches."""
    match_log_keep_seconds: int = 30 * 86_400
    """How long the match log keeps the contents of its leaves. Their hashes stay."""
    match_log_lost: bool = False
    """Whether heads of an earlier log of this key stop nothing."""
    fee_bps: int = 0
    hedge_share: float = 0.05
    """Share of jobs, from 0 to 1, that may run at two providers because their first output is late; of each payer's jobs too."""
    jobs_per_payer: int = 256
    jobs_per_node: int = 1_024

    def accept_within(self, body: int) -> float:
        """Returns the seconds that a node has to answer a dispatch with a body of this many bytes, its transfer included."""
        return self.accept + body / MIN_LINK_RATE


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """What the HTTP routes accept: bytes of request bodies, concurrent jobs, and request rates."""

    body_bytes: int = MAX_BODY
    """One job's body."""
    total_body_bytes: int = 1 << 30
    """The bodies of all jobs under way."""
    refused_per_second: float = 2
    """Requests of one address that had to be refused."""
    refused_burst: float = 100
    address_bytes: int = 128 << 20
    """The bodies of one address."""
    jobs_per_address: int = 256
    requests_per_second: float = 100
    """Requests of one address to the control plane."""


def check_order(order: Order, terms: Terms, *, coordinator: Address, limits: JobLimits, now: int) -> None:
    """Checks what this coordinator requires of every order. `now`: Unix seconds. Raises Refusal that names the member."""
    if order.coordinator != coordinator:
        raise Refusal(Code.ORDER_MISDIRECTED, f"order.coordinator: {order.coordinator}, but this is {coordinator}")
    if order.deadline <= now:
        raise Refusal(Code.ORDER_EXPIRED, f"order.deadline: passed {now - order.deadline} s ago")
    if order.deadline > now + limits.max_order_seconds:
        ahead = order.deadline - now
        text = f"order.deadline: expected at most {limits.max_order_seconds} s ahead, got {ahead} s"
        raise Refusal(Code.ORDER_TERMS, text)
    if order.claim_by < now + limits.min_claim_window:
        left = order.claim_by - now
        text = f"order.claimBy: expected to leave the provider at least {limits.min_claim_window} s, got {left} s"
        raise Refusal(Code.ORDER_TERMS, text)
    if order.max_fee_bps < limits.fee_bps:
        text = f"order.maxFeeBps: expected at least this coordinator's fee of {limits.fee_bps}, got {order.max_fee_bps}"
        raise Refusal(Code.ORDER_TERMS, text)
    if order.ceiling < terms.max_cost:
        text = f"order.ceiling: expected at least the job's own cap of {format_amount(terms.max_cost)} dollars, "
        raise Refusal(Code.UNAUTHORISED_TAB, f"{text}got {format_amount(order.ceiling)}")

"""The rules of the house: how long each phase of a job may take, and what an order must say to be taken. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.messages import Order, Terms
from tallystick.protocol.types import Address
from tallystick.protocol.wire import MAX_BODY

SLOWEST_LINK = 1 << 18
"""Bytes a second at which a dispatch reaches a node, at least: on a slower link its provider is taken for one that is away."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines in seconds, the rules for orders, jobs at once. Accepting is a node's answer to a dispatch; idle is between two
    chunks; `reader` is how long a client may keep its job waiting, in all.
    """

    accept: float = 10
    first_output: float = 120
    idle: float = 60
    total: float = 3_600
    reader: float = 600
    cancel: float = 15
    beat: float = 10
    order_horizon: int = 3_600
    min_claim_window: int = 3_600
    fee_bps: int = 0
    jobs_per_payer: int = 256
    jobs_per_node: int = 1_024

    def accept_within(self, body: int) -> float:
        """Seconds that a node has to answer a dispatch with a body of so many bytes: it must arrive there first."""
        return self.accept + body / SLOWEST_LINK


@dataclass(frozen=True, slots=True)
class Intake:
    """Bytes of one job, of all under way and of those of one address; jobs under way of one address; how many requests of an
    address that must be refused are looked at a second, and at once; how many others it may make a second.
    """

    body: int = MAX_BODY
    bodies: int = 1 << 30
    bad_rate: float = 2
    bad_burst: float = 100
    address_bodies: int = 128 << 20
    address_jobs: int = 256
    request_rate: float = 100


def check_order(order: Order, terms: Terms, *, coordinator: Address, limits: Limits, now: int) -> None:
    """What an order must say, whoever it is for. Raises Refusal."""
    if order.coordinator != coordinator:
        raise Refusal(Code.ORDER_MISDIRECTED, f"order.coordinator: {order.coordinator}, but this is {coordinator}")
    if order.deadline <= now:
        raise Refusal(Code.ORDER_EXPIRED, f"order.deadline: passed {now - order.deadline} s ago")
    if order.deadline > now + limits.order_horizon:
        raise Refusal(Code.ORDER_TERMS, f"order.deadline: more than {limits.order_horizon} s ahead")
    if order.claim_by < now + limits.min_claim_window:
        raise Refusal(Code.ORDER_TERMS, f"order.claimBy: must leave providers at least {limits.min_claim_window} s")
    if order.max_fee_bps < limits.fee_bps:
        raise Refusal(Code.ORDER_TERMS, f"order.maxFeeBps: this coordinator's fee is {limits.fee_bps}")
    if order.ceiling < terms.max_cost:
        raise Refusal(Code.UNAUTHORISED_TAB, f"order.ceiling: {order.ceiling} is below the job's own cap {terms.max_cost}")

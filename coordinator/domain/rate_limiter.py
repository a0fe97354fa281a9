"""Rate limits for strangers: what each address, and each signer of orders, may cost before it has to wait. Pure."""

from __future__ import annotations

from collections.abc import Callable

from coordinator.domain import resource_bounds
from coordinator.domain.limits import IntakeLimits
from tallystick.protocol.errors import PUBLIC, Code, Fault, PeerError, Refusal, TallyError, rate_limited
from tallystick.protocol.types import Address
from tallystick.runtime.connection_limiter import address_key
from tallystick.runtime.token_bucket import TokenBucket

_FUNDS = frozenset({Code.INSUFFICIENT_FUNDS, Code.UNSECURED})
_COSTLY = frozenset(PUBLIC[code].status for code in (Code.BAD_MESSAGE, Code.BAD_SIGNATURE, Code.BODY_TOO_LARGE))
"""Statuses of control-plane responses that count as refusals."""


class RateLimiter:
    """Counts what each address and each signer of orders cost. `tick` is a clock in seconds; addresses are those of sockets."""

    def __init__(self, intake: IntakeLimits, tick: Callable[[], float]) -> None:
        self._tick = tick
        self._refused = TokenBucket(intake.refused_per_second, intake.refused_burst)
        request_burst = intake.requests_per_second * resource_bounds.CONTROL_BURST_SECONDS
        self._requests = TokenBucket(intake.requests_per_second, request_burst)
        self._funds = TokenBucket(resource_bounds.UNFUNDED_ORDERS_PER_SECOND, resource_bounds.UNFUNDED_ORDERS_BURST)
        self._sign_ins = TokenBucket(resource_bounds.SIGN_INS_PER_SECOND, resource_bounds.SIGN_INS_BURST)
        self._asks = TokenBucket(resource_bounds.ASKS_PER_SECOND, resource_bounds.ASKS_BURST)
        self._frames = TokenBucket(resource_bounds.FRAMES_PER_SECOND, resource_bounds.FRAMES_BURST)

    def check_address(self, address: str) -> None:
        """Raises Unavailable (rate_limited) for an address that had too many requests refused lately."""
        if delay := self._refused.delay(address_key(address), self._tick()):
            raise rate_limited(f"too many requests from {address} had to be refused", delay)

    def check_signer(self, signer: Address) -> None:
        """Raises Unavailable (rate_limited) for a signer that had too many orders refused for lack of funds lately."""
        if delay := self._funds.delay(signer, self._tick()):
            raise rate_limited(f"the funds of {signer} did not cover its last orders", delay)

    def count_refusal(self, address: str, error: TallyError, signer: Address | None = None) -> None:
        """Counts an error against the address that caused it, and a lack of funds against the signer of the order.

        `signer`: the payer that the order names. Funds are read after the signature was checked, so the name is true there.
        """
        if isinstance(error, PeerError | Refusal) and error.code is not Code.CANCELLED:
            self._refused.try_spend(address_key(address), self._tick())
        if signer is not None and isinstance(error, Refusal) and error.code in _FUNDS:
            self._funds.try_spend(signer, self._tick())

    def count_request(self, address: str) -> None:
        """Counts a request to the control plane. Raises Unavailable (rate_limited) for an address that makes too many."""
        self.check_address(address)
        key, tick = address_key(address), self._tick()
        if not self._requests.try_spend(key, tick):
            text = f"{address} makes more than {self._requests.rate:g} requests per second"
            raise rate_limited(text, self._requests.delay(key, tick))

    def count_sign_in(self, address: str) -> None:
        """Counts a request to sign in or out, apart from all others. Raises Unavailable (rate_limited) for too many."""
        key, tick = address_key(address), self._tick()
        if not self._sign_ins.try_spend(key, tick):
            text = f"{address} signs in more than {self._sign_ins.rate:g} times per second"
            raise rate_limited(text, self._sign_ins.delay(key, tick))

    def count_response(self, address: str, status: int, size: int) -> None:
        """Counts what a response of the control plane cost: its bytes, a lookup of an unknown job, a refusal."""
        units = size / 1024 * resource_bounds.KIB_COST
        if status == PUBLIC[Code.UNKNOWN_JOB].status:
            units += resource_bounds.LOOKUP_UNITS
        self._requests.overdraw(address_key(address), self._tick(), units)
        if status in _COSTLY:
            self._refused.overdraw(address_key(address), self._tick())

    def count_asks(self, address: str, count: int) -> None:
        """Counts asks whose signatures are about to be checked. Raises Unavailable (rate_limited) for too many."""
        key, tick = address_key(address), self._tick()
        if not self._asks.try_spend(key, tick, count + 1):
            text = f"link: {address} sends more than {resource_bounds.ASKS_PER_SECOND} asks per second"
            raise rate_limited(text, self._asks.delay(key, tick), fault=Fault.PROVIDER)

    def count_frame(self, address: str, units: float) -> float:
        """Counts a frame of a node's link. Returns the seconds that the link must wait before its next frame is read."""
        return self._frames.overdraw(address_key(address), self._tick(), units)

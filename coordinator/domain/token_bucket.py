"""Manners: how much one party may cost before it is no longer listened to, for a while. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.domain import resource_bounds
from coordinator.domain.limits import Intake
from tallystick.protocol.errors import PUBLIC, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Address
from tallystick.runtime.connection_limiter import address_key

_KEPT = 10_000
_FUNDS = frozenset({Code.INSUFFICIENT_FUNDS, Code.UNSECURED})

_COSTLY = frozenset(PUBLIC[code].status for code in (Code.BAD_MESSAGE, Code.BAD_SIGNATURE, Code.BODY_TOO_LARGE))


@dataclass(slots=True)
class Budget:
    """Token buckets by name: `burst` at once, `rate` a second after that. Only the last parties are remembered."""

    rate: float
    burst: float
    _left: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait(self, name: str, now: float) -> float:
        """Seconds until this party has something left; 0 if it has. Spends nothing."""
        return max(0.0, (1 - self._now(name, now)) / self.rate)

    def spend(self, name: str, now: float, amount: float = 1) -> bool:
        """Takes that much; False where less than 1 was left, and then nothing is taken."""
        if self._now(name, now) < 1:
            return False
        self.owe(name, now, amount)
        return True

    def owe(self, name: str, now: float, amount: float = 1) -> float:
        """Takes that much, also where less is left; returns the seconds until that is made good."""
        left = self._now(name, now) - amount
        self._left[name] = (left, now)
        self._left.move_to_end(name)
        if len(self._left) > _KEPT:
            self._left.popitem(last=False)
        return max(0.0, -left / self.rate)

    def _now(self, name: str, now: float) -> float:
        left, at = self._left.get(name, (self.burst, now))
        return min(self.burst, left + (now - at) * self.rate)


class Manners:
    """What each address, and each signer of orders, cost. `tick` is a clock in seconds; addresses are as sockets name them."""

    def __init__(self, intake: Intake, tick: Callable[[], float]) -> None:
        self._tick = tick
        self._refused = Budget(intake.bad_rate, intake.bad_burst)
        self._requests = Budget(intake.request_rate, intake.request_rate * resource_bounds.CONTROL_BURST)
        self._funds = Budget(resource_bounds.LOOK_UPS_PER_SECOND, resource_bounds.LOOK_UPS_AT_ONCE)
        self._asks = Budget(resource_bounds.ASKS_PER_SECOND, resource_bounds.ASKS_AT_ONCE)
        self._frames = Budget(resource_bounds.FRAMES_PER_SECOND, resource_bounds.FRAMES_AT_ONCE)

    def check(self, address: str) -> None:
        """Raises Unavailable for an address whose requests had to be refused too often."""
        if wait := self._refused.wait(address_key(address), self._tick()):
            text = f"too many requests from {address} had to be refused; the next is looked at in {wait:.1f} s"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    def check_signer(self, signer: Address) -> None:
        """Raises Unavailable for a signer whose orders were refused too often for its funds."""
        if wait := self._funds.wait(signer, self._tick()):
            text = f"the funds of {signer} did not cover its last orders; the next is looked at in {wait:.1f} s"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    def note(self, address: str, error: TallyError, signer: Address | None = None) -> None:
        """Counts what had to be refused, whose fault it was and what it cost to find out. `signer`: who ordered, as it says; only
        a refusal for funds comes after the signature was checked.
        """
        if isinstance(error, PeerError | Refusal) and error.code is not Code.CANCELLED:
            self._refused.spend(address_key(address), self._tick())
        if signer is not None and isinstance(error, Refusal) and error.code in _FUNDS:
            self._funds.spend(signer, self._tick())

    def request(self, address: str) -> None:
        """Counts a request to the control plane. Raises Unavailable where the address makes more than it may."""
        self.check(address)
        if not self._requests.spend(address_key(address), self._tick()):
            text = f"{address} asks more than {self._requests.rate:g} times a second"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)

    def answered(self, address: str, status: int, size: int) -> None:
        """Counts what a request to the control plane cost: its answer's bytes, a look-up in vain, a refusal."""
        units = size / 1024 * resource_bounds.KIB_COST + (
            resource_bounds.LOOK_UP if status == PUBLIC[Code.UNKNOWN_JOB].status else 0
        )
        self._requests.owe(address_key(address), self._tick(), units)
        if status in _COSTLY:
            self._refused.owe(address_key(address), self._tick())

    def asks(self, address: str, count: int) -> None:
        """Counts asks whose signatures are to be checked. Raises Unavailable where there are too many of an address."""
        if not self._asks.spend(address_key(address), self._tick(), count + 1):
            text = f"link: more than {resource_bounds.ASKS_PER_SECOND} asks a second come from {address}"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.PROVIDER)

    def frame(self, address: str, units: float) -> float:
        """Counts a frame of a node's link; returns the seconds that its link should wait."""
        return self._frames.owe(address_key(address), self._tick(), units)

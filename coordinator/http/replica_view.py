"""What the API says and asks of the coordinator's other replicas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from tallystick.protocol.replicas import Replica
from tallystick.protocol.types import Address, JobId

NOTICE_FAULTS = ("disconnected", "full", "malformed", "too_long")
"""The reasons for which notices are dropped."""


class ReplicaView(Protocol):
    """The replicas of this coordinator, as the API needs them."""

    @property
    def listed(self) -> tuple[Replica, ...]:
        """The replicas that clients may use, by id; none for a lone coordinator."""
        ...

    @property
    def alone(self) -> bool:
        """Whether no other replica lives."""
        ...

    @property
    def bus_connected(self) -> bool:
        """Whether notices reach the other replicas now."""
        ...

    @property
    def bus_seconds(self) -> float | None:
        """The time of the last round trip to the bus; None if it did not answer."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """The number of notices that were dropped, by reason."""
        ...

    def cancel(self, job: JobId, payer: Address) -> None:
        """Passes on a cancel of a job that this replica does not run."""


class Alone:
    """A lone coordinator: implements ReplicaView."""

    listed: tuple[Replica, ...] = ()
    alone = True
    bus_connected = False
    bus_seconds: float | None = None
    dropped: Mapping[str, int] = {}

    def cancel(self, job: JobId, payer: Address) -> None:
        """Does nothing: nobody else has the job."""

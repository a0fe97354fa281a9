"""The place of a job in a coordinator's queue, as BEAT frames tell it to the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.protocol.json_members import read_count, read_items, read_members
from tallystick.protocol.wire import dumps, loads

MAX_INVITATIONS = 8
"""Asks beside those of its shortlist that a client may be told of while its job waits."""


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """The payload of a BEAT frame for a job that waits for a free slot: its place, 1 for the next, and the expected wait.

    `wait_ms`: milliseconds; None if the coordinator has measured nothing yet. `asks`: signed asks, unread, that the job has no
    order on and that could take it now; its client may post further orders for them.
    """

    position: int
    wait_ms: int | None = None
    asks: tuple[Any, ...] = ()

    @property
    def seconds(self) -> int | None:
        """The expected wait in whole seconds, at least 1; None if it is unknown."""
        return None if self.wait_ms is None else max(1, round(self.wait_ms / 1_000))

    @property
    def words(self) -> str:
        """The expected wait as it is shown behind the position; empty if it is unknown."""
        return "" if self.seconds is None else f", about {self.seconds} s"

    def to_json(self) -> dict[str, Any]:
        """The wire form, as an object."""
        wait: dict[str, Any] = {} if self.wait_ms is None else {"waitMs": self.wait_ms}
        return {"position": self.position} | wait | ({"asks": list(self.asks)} if self.asks else {})

    def dumps(self) -> bytes:
        """The wire form."""
        return dumps(self.to_json())

    @classmethod
    def loads(cls, data: bytes) -> QueuePlace:
        """Reads the wire form. Raises BadMessage."""
        return cls.from_json(loads(data, "place"))

    @classmethod
    def from_json(cls, raw: Any) -> QueuePlace:
        """Reads the wire form, as an object. Raises BadMessage."""
        (position,) = read_members(raw, "place", "position")
        wait, asks = raw.get("waitMs"), read_items(raw.get("asks", []), "place.asks", MAX_INVITATIONS)
        wait_ms = None if wait is None else read_count(wait, "place.waitMs")
        return cls(read_count(position, "place.position"), wait_ms, tuple(asks))

"""What runs the requests of a batch: the gateway's own handler of requests, as a batch sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from tallystick.protocol.types import Amount


@dataclass(frozen=True, slots=True)
class LineJob:
    """One request to be answered. `key`: its idempotency key, with which it is one job however often it is sent.

    `caller`: the label of the API key that created the batch; empty without one. `options`: X-Tally-Options, as JSON. `step`: of
    the batch's window, see `window.price_limit`.
    """

    caller: str
    endpoint: str
    key: str
    options: str
    model: str
    step: int
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """How a request was answered. `cost`: base units. `retry`: whether the same request may succeed later.

    `code`, `message`: of an error.
    """

    status: int
    id: str
    body: bytes = field(repr=False)
    cost: Amount = Amount(0)
    retry: bool = False
    code: str = ""
    message: str = ""


class KeyState(Enum):
    """What became of an idempotency key: it has no job, its job may still cost something, it cost nothing, or it was billed."""

    UNUSED = "unused"
    OPEN = "open"
    FREE = "free"
    BILLED = "billed"


class LineAnswerer(Protocol):
    """Answers requests of batches."""

    async def answer(self, job: LineJob) -> LineAnswer:
        """Answers a request. Cancelling it cancels its job."""
        ...

    def leave(self) -> None:
        """From now on, cancelling an answer lets its job run on, for a later process."""
        ...

    async def keys(self, batch: str) -> set[str]:
        """The keys of a batch's lines that may have jobs."""
        ...

    async def key_state(self, key: str) -> KeyState:
        """What became of a key's job."""
        ...

    async def key_cost(self, key: str) -> Amount:
        """What a key's job was billed, in base units; 0 if nothing."""
        ...

    async def forget(self, key: str) -> None:
        """Forgets a key whose answer is stored."""
        ...

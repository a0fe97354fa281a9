"""Lost dispatches: jobs that were sent to a node whose connection broke before the node had ended them.

The node may never have got such a job. Then it signs no receipt for it, and its payer has to count the order's cap until nobody
can claim on the order any more, which takes days. So the node is sent the job again once it is back, without the request, and
with a cancel behind it. If it had the order before, it says so, and its own receipt comes. If not, it refuses the job with a
receipt at no cost, which releases the order. That is done until the order's deadline: a node remembers the orders that it had
until then.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from coordinator.jobs.attempt import Attempt
from coordinator.ports import Bus, node_subject
from tallystick.protocol.match_log import Match
from tallystick.protocol.types import Address
from tallystick.protocol.wire import CancelReason, Dispatch, Kind, pack_link

MAX_OF_NODE, MAX_NODES = 64, 256
"""Dispatches of one node that wait for its return, and nodes that are waited for. The oldest make room."""


class _Lost(NamedTuple):
    frames: tuple[bytes, ...]
    deadline: int
    """Unix seconds."""


class LostDispatches:
    """See the module's docstring. `is_ready`: whether a node offers something; before, it may not sign yet. `now` returns Unix
    seconds.
    """

    def __init__(self, bus: Bus, is_ready: Callable[[Address], bool], now: Callable[[], float]) -> None:
        self._bus, self._is_ready, self._now = bus, is_ready, now
        self._waiting: OrderedDict[Address, deque[_Lost]] = OrderedDict()

    def add(self, attempt: Attempt) -> None:
        """Sends an attempt's order again, once its node is back."""
        job = attempt.candidate.terms.job
        again = Dispatch(Match.loads(attempt.match), attempt.candidate, b"").frame(job)
        frames = (again, pack_link(Kind.CANCEL, job, CancelReason.COORDINATOR.value.encode()))
        lost = _Lost(frames, attempt.order.message.deadline)
        if not self._send(attempt.provider, lost):
            self._waiting.setdefault(attempt.provider, deque(maxlen=MAX_OF_NODE)).append(lost)
            self._waiting.move_to_end(attempt.provider)
            if len(self._waiting) > MAX_NODES:
                self._waiting.popitem(last=False)

    def node_is_back(self, provider: Address) -> None:
        """Sends what waits for a node that connected, and again when it offers something."""
        left = deque((lost for lost in self._waiting.pop(provider, ()) if not self._send(provider, lost)), maxlen=MAX_OF_NODE)
        if left:
            self._waiting[provider] = left

    def _send(self, provider: Address, lost: _Lost) -> bool:
        """Returns whether there is nothing more to do."""
        if self._now() >= lost.deadline:
            return True
        return all(self._bus.send(node_subject(provider), frame) for frame in lost.frames) and self._is_ready(provider)

"""The frames of nodes on their way to the attempts that the nodes have. A chunk goes on to its client in the same call.

Streamed chunks are most of what a coordinator carries, so frames come as one read of a node's connection brought them. A chunk
that keeps nobody waiting takes no turn of its job's task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.domain.limits import JobLimits
from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from tallystick.protocol.types import Address
from tallystick.protocol.wire import LINK_HEAD, Kind

_CHUNK, _ACCEPT, _FAIL, _RECEIPT = map(int, (Kind.CHUNK, Kind.ACCEPT, Kind.FAIL, Kind.RECEIPT))
"""Kinds of frames that an attempt takes, as plain numbers, which are compared faster."""
_OF_JOBS = frozenset({_CHUNK, _ACCEPT, _FAIL, _RECEIPT})
CREDIT_STEP = 32
"""Chunks for which a node gets credit at once."""
Route = tuple[LiveJob, Attempt]


class NodeFrames:
    """The attempts that nodes have now, and what their frames do. `tick` is a monotonic clock in seconds."""

    def __init__(
        self,
        limits: JobLimits,
        tick: Callable[[], float],
        *,
        accepted: Callable[[LiveJob, Attempt], None],
        begun: Callable[[LiveJob, Attempt], None],
        grant: Callable[[LiveJob, Attempt], None],
    ) -> None:
        """`accepted` is called for an ACCEPT, `begun` for the first output of an attempt, before any other attempt can begin.
        `grant` gives a node CREDIT_STEP of credit.
        """
        self._idle, self._tick = limits.idle, tick
        self._accepted, self._begun, self._grant = accepted, begun, grant
        self._routes: dict[Address, dict[bytes, Route]] = {}

    def attach(self, job: LiveJob, attempt: Attempt) -> None:
        """Gives the attempt the frames that its node sends for the job."""
        self._routes.setdefault(attempt.provider, {})[job.id] = job, attempt

    def detach(self, job: LiveJob, attempt: Attempt) -> None:
        """Gives the attempt no more frames."""
        routes = self._routes.get(attempt.provider, {})
        route = routes.get(job.id)
        if route is not None and route[1] is attempt:
            del routes[job.id]
            if not routes:
                del self._routes[attempt.provider]

    def take(self, provider: Address, frames: Sequence[bytes]) -> Sequence[bytes]:
        """Takes the frames that a node sent for attempts that it has, in their order. Returns all others.

        Raises InboxOverrun if too many of an attempt's frames are unread; the rest are lost then.
        """
        routes = self._routes.get(provider)
        if routes is None:
            return frames
        tick, others = self._tick(), list[bytes]()
        for frame in frames:
            route = routes.get(frame[1:LINK_HEAD])
            if route is None or frame[0] not in _OF_JOBS:
                others.append(frame)
                continue
            job, attempt = route
            kind = frame[0]
            if attempt.outrun and kind in (_CHUNK, _ACCEPT):
                continue
            if kind == _CHUNK:
                attempt.chunk_arrived(tick)
                if self._pass_on(job, attempt, frame[LINK_HEAD:], tick):
                    continue
            elif kind == _ACCEPT and job.inbox.awaited:
                self._accepted(job, attempt)
                continue
            if job.deliver(attempt, frame):
                self._begun(job, attempt)
        return others

    def _pass_on(self, job: LiveJob, attempt: Attempt, payload: bytes, tick: float) -> bool:
        """Gives a chunk to the client's sink while the job's task waits for a frame. Returns False if the task must have it.

        The task must, if the chunk has to wait for the reader or for a frame before it, or if the client must learn more than it.
        """
        sink, inbox = job.sink, job.frames
        if sink is None or inbox is None or not inbox.awaited or job.attempt is not attempt or attempt.delivered:
            return False
        if not sink.take_chunk(payload):
            return False
        job.note_chunk(attempt, payload, tick, tick + self._idle)
        if not attempt.output_seen:
            attempt.output_seen = True
            self._begun(job, attempt)
        attempt.uncredited += 1
        if attempt.uncredited == CREDIT_STEP:
            self._grant(job, attempt)
        return True

"""Lost connections of nodes whose answers had begun: such an attempt waits some seconds for its node to come back.

What was on its way when the connection broke is lost. Often that is the last chunk and the receipt alone, of an answer that the
node has signed for and will collect. A node that announces `resume` keeps what it sent of such an answer. Once it is back, RESUME
tells it how many chunks came, and it sends the others and the receipt. Meanwhile a receipt that lacks the last chunk is not
refused: the node sends it again after that chunk. A node that does not come back in time has left the job.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.jobs.attempt import Attempt
from coordinator.jobs.live_job import LiveJob
from coordinator.ports import Bus, node_subject
from tallystick.protocol.types import Address
from tallystick.protocol.wire import Kind, pack_link


class NodeReturns:
    """See the module's docstring. `tick` is a monotonic clock; `seconds`: how long an attempt waits."""

    def __init__(self, bus: Bus, tick: Callable[[], float], seconds: float) -> None:
        self._bus, self._tick, self._seconds = bus, tick, seconds
        self.resumers: set[Address] = set()
        """The connected providers whose nodes take RESUME frames."""

    def wait_for(self, attempt: Attempt) -> bool:
        """Lets an attempt wait whose node's connection was lost. Returns False if there is nothing to wait for."""
        if attempt.provider not in self.resumers or not attempt.output_seen or attempt.outrun:
            return False
        if attempt.return_by is None:
            attempt.return_by = self._tick() + self._seconds
        return True

    def resume(self, job: LiveJob, attempt: Attempt) -> None:
        """Asks a node that is back for the chunks of an attempt that did not come."""
        if attempt.return_by is not None and attempt.provider in self.resumers:
            attempt.resuming = True
            self._bus.send(node_subject(attempt.provider), pack_link(Kind.RESUME, job.id, attempt.chunks.to_bytes(4, "big")))

    def is_over(self, attempt: Attempt) -> bool:
        """Whether an attempt has waited too long. Its wait ends with that."""
        over = attempt.return_by is not None and self._tick() > attempt.return_by
        if over:
            attempt.return_by = None
        return over

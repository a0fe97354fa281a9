"""One placing of a request: the stream of its frames, the response that they make up, and its record in the ledger.

A `Job` reads one of them, and another one if its request is submitted anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import structlog

from tallystick.client.coordinator.job_stream import JobStream, Sink
from tallystick.client.jobs.further_orders import FurtherOrders
from tallystick.client.jobs.record import JobRecord, RecordContext
from tallystick.client.jobs.response import JobResponse
from tallystick.client.openai.requests import ApiRequest
from tallystick.client.receipts.delivery_check import Delivery, StreamEnd
from tallystick.client.selection.prefix_tags import PrefixTag
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import PeerError, TallyError
from tallystick.protocol.messages import Ask
from tallystick.protocol.queue_place import QueuePlace
from tallystick.protocol.types import Hash
from tallystick.protocol.wire import Kind

log = structlog.get_logger()


class PlacedJob:
    """See the module's docstring. `frames`: those that came and were not taken yet."""

    def __init__(
        self,
        context: RecordContext,
        response: JobResponse,
        stream: JobStream,
        request: ApiRequest,
        *,
        keyed: bool = False,
        resumed: bool = False,
        began: float | None = None,
    ) -> None:
        """`keyed`: the job has an idempotency key, so that losing the stream does not end it. `resumed`: the job was read before,
        and may have been cancelled when that stream was lost. `began`: the event loop's time at the request, in seconds.
        """
        self.response, self.stream, self.keyed = response, stream, keyed
        self.record = JobRecord(context, response, request, keyed=keyed, resumed=resumed, began=began)
        self._reconciler = context.reconciler
        self.frames: deque[tuple[Kind, bytes]] = deque()
        self.broken: PeerError | None = None
        """What is wrong with a frame that came with good ones, which the caller gets first."""
        self.tags: tuple[PrefixTag, ...] = ()
        """The tags by which its market recognises the conversation."""
        self.asks: Sequence[Verified[Ask]] = ()
        """The asks that it was offered to at first."""
        self.further_orders: Callable[[], FurtherOrders] | None = None
        """Gives the orders on asks that its coordinator names while it waits; None if it waits for its first orders alone."""
        self._further_orders: FurtherOrders | None = None
        self.send_again: Callable[[], Awaitable[JobStream]] | None = None
        """Posts the same job again, after its coordinator's replica was lost where it waited for a free slot. None for a
        coordinator without replicas.
        """

    async def read(self, *, whole: bool, sink: Sink | None) -> None:
        """Waits for frames and adds them to `frames`. Raises as JobStream.read."""
        whole = whole and not (self.keyed or self.record.cancelling or self.response.match is None)
        self.frames.extend(await self.stream.read(whole=whole, sink=sink))

    def join_following(self, chunk: bytes) -> bytes:
        """The chunk, and those that arrived with it. An error in one of them is raised once the caller has those before it."""
        chunks, frames = [chunk], self.frames
        while frames and frames[0][0] is Kind.CHUNK and self.broken is None:
            try:
                chunks.append(self.response.accept(*frames.popleft()))
            except PeerError as error:
                self.broken = error
        return b"".join(chunks) if len(chunks) > 1 else chunk

    async def order_on(self, place: QueuePlace) -> None:
        """Orders on the asks that the coordinator names with the job's place in its queue."""
        if not place.asks:
            return
        if self._further_orders is None and self.further_orders is not None:
            self._further_orders = self.further_orders()
        if self._further_orders is not None:
            await self._further_orders.order(place.asks, self.response, self.stream)

    async def send_elsewhere(self) -> bool:
        """Posts a job again that waited for a free slot at a replica which was lost, and of which no match is known.

        Returns whether another replica took it, which it does unless a provider had it.
        """
        if self.send_again is None or self.response.matches or self.record.cancelling:
            return False
        try:
            self.stream = await self.send_again()
        except TallyError as error:
            log.debug("a job could not go to another replica", job=self.response.job.hex(), reason=str(error))
            return False
        self.frames.clear()
        self.response.place, self._further_orders = None, None
        log.info("a waiting job went to another replica", job=self.response.job.hex())
        return True

    async def left(self) -> dict[Hash, Delivery]:
        """Records what arrived on a stream that was lost or is left. Returns what arrived for the matched orders."""
        return await self.record.arrived(StreamEnd.RESUMABLE if self.keyed else StreamEnd.ABANDONED)

    async def abandon(self) -> None:
        """Stops reading: records what arrived, for a receipt that comes later.

        A job with an idempotency key goes on for a while, because a retry may resume it.
        """
        await self.left()
        if not self.keyed:
            self._reconciler.abandon(self.response.job)

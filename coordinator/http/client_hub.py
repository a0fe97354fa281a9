"""The client hub: the links of clients. It serves their jobs as the HTTP route does, for many jobs on one WebSocket.

A lost link is the departure of each of its jobs' clients. coordinator/domain/resource_bounds.py lists what links may cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import structlog
from starlette.types import Receive, Scope, Send

from coordinator.domain.resource_bounds import CLIENT_LINKS, LOOKUP_UNITS
from coordinator.http.client_link import ClientLink, LinkStream
from coordinator.http.job_service import STALL_SECONDS, JobRequest, JobService
from coordinator.http.response_buffer import ResponseBuffer
from tallystick.protocol.errors import BadMessage, Code, Fault, PeerError, Refusal, TallyError, Unavailable
from tallystick.protocol.job_link import (
    CREDIT_BYTES,
    LINK_PATH,
    MAX_CLIENT_MESSAGE,
    MAX_HELLO_MESSAGE,
    MAX_SUBMISSION,
    read_orders,
    split_frames,
)
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import Kind, dumps, pack_frame
from tallystick.runtime.access_log import Access, begin_access, log_access
from tallystick.runtime.connection_limiter import address_key
from tallystick.runtime.websocket import DIRECT_EXTENSION, FRAME_LIMIT_EXTENSION

log = structlog.get_logger()
HELLO_SECONDS = 10
CLOSE_SECONDS = 5
"""How long the jobs of a stopping coordinator have to tell their clients how they ended."""
METHOD = "SUBMIT"
"""The method in the access log of a job that came on a link."""


class ClientHub:
    """All client links of this process."""

    def __init__(
        self, service: JobService, observe: Callable[[Access], None] = lambda _: None, *, stall_seconds: float = STALL_SECONDS
    ) -> None:
        """`observe` gets the figures of each job that has ended."""
        self._service, self._observe, self._stall_seconds = service, observe, stall_seconds
        self._rate_limiter = service.rate_limiter
        self._links: dict[ClientLink, Send] = {}
        self._links_by_address: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: set[asyncio.Task[None]] = set()
        self._job_done = self._jobs.discard
        self._sweeping: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def connected(self) -> int:
        """The number of links."""
        return len(self._links)

    async def serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection, from its handshake to its end (ASGI websocket)."""
        await receive()
        extensions, address = scope["extensions"], (scope.get("client") or ("",))[0]
        extensions[FRAME_LIMIT_EXTENSION](MAX_HELLO_MESSAGE)
        link = self._link(address, extensions[FRAME_LIMIT_EXTENSION])
        link.attach(extensions[DIRECT_EXTENSION](link))
        await send({"type": "websocket.accept"})
        self._links[link] = send
        timer = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._check_greeted, link)
        try:
            with self._counted(address):
                self._check_open(address)
                await _wait_until_gone(receive)
        except TallyError as error:
            link.refuse(error)
            await _wait_until_gone(receive)
        finally:
            timer.cancel()
            del self._links[link]
            link.lost()

    def _link(self, address: str, set_limit: Callable[[int], None]) -> ClientLink:
        def greeted(link: ClientLink) -> None:
            set_limit(MAX_CLIENT_MESSAGE)
            log.debug("client connected", address=link.address, software=link.software)

        return ClientLink(
            address,
            self._rate_limiter,
            submit=self._submit,
            left=self._leave,
            cancelled=self._cancel,
            ordered=self._order,
            refused=self._refuse,
            greeted=greeted,
        )

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """Counts a link of an address while it lasts. Raises Unavailable if the address has too many."""
        key = address_key(address)
        if self._links_by_address[key] >= CLIENT_LINKS:
            text = f"{address} has {CLIENT_LINKS} client links, the maximum per address; close one, or post jobs to /v1/jobs"
            raise Unavailable(Code.RATE_LIMITED, text, fault=Fault.CLIENT)
        self._links_by_address[key] += 1
        try:
            yield
        finally:
            self._links_by_address -= Counter((key,))

    def _check_open(self, address: str) -> None:
        """Raises Unavailable if this coordinator accepts no link of this address now."""
        self._rate_limiter.check_address(address)
        if self._stopping:
            raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "this coordinator is stopping", fault=Fault.COORDINATOR)

    def _check_greeted(self, link: ClientLink) -> None:
        if link.software is None:
            link.refuse(BadMessage(f"link: expected HELLO within {HELLO_SECONDS} s"))

    def _refuse(self, link: ClientLink, error: TallyError) -> None:
        """Closes the link of a client that broke the rules, or that cannot be served."""
        self._rate_limiter.count_refusal(link.address, error)
        log.info("client refused", error=str(error), address=link.address)
        send = self._links.get(link)
        if send is not None:
            self._in_background(_close(send, 1002 if isinstance(error, BadMessage) else 1013))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Closes all links and accepts no new ones, after the jobs have told their clients how they ended."""
        self._stopping = True
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=CLOSE_SECONDS)
        if self._sweeping is not None:
            self._sweeping.cancel()
        for link, send in list(self._links.items()):
            link.flush()
            link.closed = True
            self._in_background(_close(send, 1001))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Jobs

    def _submit(self, stream: LinkStream, body: bytes) -> asyncio.Task[None]:
        task = asyncio.create_task(self._serve_job(stream, [body]), name="job")
        self._jobs.add(task)
        task.add_done_callback(self._job_done)
        if self._sweeping is None:
            self._sweep()
        return task

    async def _serve_job(self, stream: LinkStream, held: list[bytes]) -> None:
        """Serves one job. `held` has the submission, which may not be held while the job waits."""
        access, began = begin_access(METHOD, LINK_PATH), stream.link.clock()
        access.status = 200
        try:
            await self._serve_admitted(stream, held)
            stream.end()
        except TallyError as error:
            access.status = error_status(stream, error)
            stream.fail(error)
        except Exception:  # a bug in one job: its client is told, and the others go on
            log.exception("bug in a job of a link")
            failure = Unavailable(Code.COORDINATOR_UNAVAILABLE, "the coordinator failed on this job", fault=Fault.COORDINATOR)
            access.status = error_status(stream, failure)
            stream.fail(failure)
        finally:
            access.seconds, access.sent_bytes = stream.link.clock() - began, stream.sent_bytes
            access.first_seconds = stream.first_at - began if stream.first_at else None
            self._observe(access)
            log_access(access)

    async def _serve_admitted(self, stream: LinkStream, held: list[bytes]) -> None:
        service, address = self._service, stream.link.address
        request: JobRequest | None = None
        try:
            request = service.open(address)
            service.hold(request, len(held[0]), MAX_SUBMISSION)
            stream.job = service.read(request, held[0])
            if stream.linger is None:
                held.clear()
                await service.run(request, stream)
            else:
                buffer = await service.find_or_begin(request, stream.job, held.pop())
                await self._forward_kept(stream, stream.job, buffer, stream.linger)
        except TallyError as error:
            service.count_refusal(request, address, error)
            if isinstance(error, PeerError | Refusal) or error.code is Code.RATE_LIMITED:  # not if nobody has a free slot
                stream.link.charge(LOOKUP_UNITS)
            raise
        finally:
            if request is not None:
                service.close(request)

    async def _forward_kept(self, stream: LinkStream, job: JobId, buffer: ResponseBuffer, linger: float) -> None:
        """Forwards a response that may outlive this link."""
        self._service.set_linger(buffer, linger)
        try:
            async with contextlib.aclosing(buffer.read(stream.take_frame)) as parts:
                async for frames in parts:
                    for piece in split_frames(frames, CREDIT_BYTES):
                        if stream.put_frames(piece):
                            await stream.wait()
        except ConnectionAbortedError as error:
            raise Refusal(Code.ORDER_REPLAYED, str(error)) from error
        finally:
            self._service.left(job, buffer)

    def _leave(self, stream: LinkStream) -> None:
        """The client reads this job no further."""
        stream.drop()
        if stream.linger is not None:
            if stream.task is not None:
                stream.task.cancel()
        elif stream.job is not None:
            self._service.abandon(stream.job, stream)

    def _cancel(self, stream: LinkStream) -> None:
        if stream.job is not None:
            self._service.market.cancel(stream.job)

    def _sweep(self) -> None:
        """Ends the streams of clients that take nothing, while there are jobs."""
        loop = asyncio.get_running_loop()
        self._sweeping = loop.call_later(self._stall_seconds / 4, self._sweep) if self._jobs else None
        overdue = time.monotonic() - self._stall_seconds
        for link in tuple(self._links):
            for stream in tuple(link.streams.values()):
                if stream.waiting_since is not None and stream.waiting_since < overdue:
                    text = f"the client took nothing of the response for {self._stall_seconds:g} s"
                    stream.fail(Unavailable(Code.TIMED_OUT, text, fault=Fault.CLIENT))
                    self._leave(stream)

    # Further orders

    def _order(self, stream: LinkStream, payload: bytes) -> None:
        stream.adding = True
        self._in_background(self._add_orders(stream, payload))

    async def _add_orders(self, stream: LinkStream, payload: bytes) -> None:
        answer, address = b"", stream.link.address
        try:
            self._rate_limiter.count_request(address)
            if stream.job is None:
                raise Refusal(Code.UNKNOWN_JOB, "orders: expected a stream whose job waits for a slot")
            await self._service.market.add_orders(stream.job, read_orders(payload))
        except TallyError as error:
            self._rate_limiter.count_refusal(address, error)
            answer = dumps(error.as_json())
        finally:
            stream.adding = False
        if stream.number in stream.link.streams:
            stream.put_frames(pack_frame(Kind.ADDED, answer))


def error_status(stream: LinkStream, error: TallyError) -> int:
    """The status in the access log: what the HTTP route would have answered."""
    return 200 if stream.sent_bytes else error.status


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "websocket.disconnect":
        pass


async def _close(send: Send, code: int) -> None:
    """Closes a connection; waits for the client for CLOSE_SECONDS at most."""
    with contextlib.suppress(TimeoutError, OSError, RuntimeError):
        async with asyncio.timeout(CLOSE_SECONDS):
            await send({"type": "websocket.close", "code": code})

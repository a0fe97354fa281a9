"""POST /v1/jobs: the hot route, raw ASGI inside the same app. It parses, calls the market and passes frames on."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, closing
from typing import Any

from starlette.types import Receive, Scope, Send

from coordinator.live import LiveJob
from coordinator.market import Market
from coordinator.patience import Patience
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import MAX_BODY, Submission, dumps, pack_frame

PATH = "/v1/jobs"
FRAMES = b"application/vnd.tallystick.frames"
BODY_SECONDS = 30
BURST = 16
"""Frames that wait already are sent together, up to so many."""
STALL_SECONDS = 45
"""A client that takes nothing for this long counts as gone: less than a provider may stay silent, so that it is not blamed."""


class JobsRoute:
    """The route as an ASGI app. A client that leaves cancels its job; the job is then driven to its receipt all the same."""

    def __init__(self, market: Market, max_body: int = MAX_BODY) -> None:
        self._market, self._max_body = market, max_body

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """One job."""
        try:
            job = await self._market.place_order(Submission.loads(await self._read(receive)))
        except TallyError as error:
            await _answer(send, error)
            return
        except ConnectionResetError:
            return
        gone = asyncio.create_task(self._cancel_when_gone(receive, job.id))
        try:
            if await self._relay(job, send):
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()

    async def _relay(self, job: LiveJob, send: Send) -> bool:
        """Drives a job to its end, whether its client still takes the frames or not; returns whether it does."""
        held: list[bytes] = []
        begun = False
        with closing(Patience(STALL_SECONDS)) as patience:
            async with aclosing(self._market.run(job)) as frames:
                async for kind, payload in frames:
                    held.append(pack_frame(kind, payload))
                    if job.more_waits and len(held) < BURST:
                        continue
                    body = {"type": "http.response.body", "body": b"".join(held), "more_body": True}
                    held.clear()
                    try:
                        if not begun:
                            begun = True
                            await patience.wait(send(_start(200, FRAMES, job.id)))
                        await patience.wait(send(body))
                    except (TimeoutError, OSError):
                        self._market.cancel(job.id)
                        send = _nowhere
        return send is not _nowhere

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise ConnectionResetError
                    size += len(event.get("body", b""))
                    if size > self._max_body:
                        raise Refusal(Code.BODY_TOO_LARGE, f"a job has at most {self._max_body} bytes")
                    parts.append(event.get("body", b""))
                    if not event.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise BadMessage(f"submission: did not arrive within {BODY_SECONDS} s") from None

    async def _cancel_when_gone(self, receive: Receive, job: JobId) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._market.cancel(job)


async def _nowhere(_event: Any) -> None:
    """Where the frames for a client go that is gone."""


def _start(status: int, content_type: bytes, job: JobId | None = None) -> dict[str, Any]:
    headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
    if job is not None:
        headers.append((b"x-tally-job", job.hex().encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _answer(send: Send, error: TallyError) -> None:
    await send(_start(error.status, b"application/json"))
    await send({"type": "http.response.body", "body": dumps(error.as_json())})

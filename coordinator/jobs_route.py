"""POST /v1/jobs: the hot route, raw ASGI inside the same app. It parses, calls the market and passes frames on."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send

from coordinator.market import Market
from tallystick.protocol.errors import Code, Refusal, TallyError
from tallystick.protocol.types import JobId
from tallystick.protocol.wire import MAX_BODY, Submission, dumps, pack_frame

PATH = "/v1/jobs"
FRAMES = b"application/vnd.tallystick.frames"
BODY_SECONDS = 30


class JobsRoute:
    """The route as an ASGI app. A client that leaves cancels its job; the job is then driven to its receipt all the same."""

    def __init__(self, market: Market, max_body: int = MAX_BODY) -> None:
        self._market, self._max_body = market, max_body

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """One job."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive)
            job = await self._market.place_order(Submission.loads(body))
        except TallyError as error:
            await _answer(send, error)
            return
        except (TimeoutError, ConnectionResetError):
            return
        gone = asyncio.create_task(self._cancel_when_gone(receive, job.id))
        try:
            await send(_start(200, FRAMES, job.id))
            async for kind, payload in self._market.run(job):
                await send({"type": "http.response.body", "body": pack_frame(kind, payload), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
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

    async def _cancel_when_gone(self, receive: Receive, job: JobId) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._market.cancel(job)


def _start(status: int, content_type: bytes, job: JobId | None = None) -> dict[str, Any]:
    headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
    if job is not None:
        headers.append((b"x-tally-job", job.hex().encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _answer(send: Send, error: TallyError) -> None:
    await send(_start(error.status, b"application/json"))
    await send({"type": "http.response.body", "body": dumps(error.as_json())})

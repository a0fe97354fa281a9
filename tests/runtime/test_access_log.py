"""One line for each request, with what its handler added, and never a query or a body."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from tallystick.runtime.access_log import CLIENT_GONE, MAX_PATH, Access, AccessLog, record

Handler = Callable[[Any, Any, Any], Awaitable[None]]


class Clock:
    """A clock that a handler moves."""

    def __init__(self) -> None:
        self.time = 5.0

    def __call__(self) -> float:
        return self.time


async def serve(handler: Handler, path: str = "/v1/x", clock: Clock | None = None) -> tuple[Access, dict[str, Any], list[Any]]:
    """Serves one request. Returns what was measured, the line, and what was sent."""
    seen, sent = list[Access](), list[Any]()

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"a prompt"}

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"key=s3cret", "headers": [(b"authorization", b"k")]}
    with capture_logs() as lines:
        await AccessLog(handler, seen.append, clock or Clock())(scope, receive, send)
    (line,), (access,) = lines, seen
    return access, dict(line), sent


async def test_a_line_has_what_handlers_add() -> None:
    """Status, times and bytes are measured; fields come from any task of the request; the body passes unchanged."""
    clock = Clock()

    async def handler(_scope: Any, _receive: Any, send: Any) -> None:
        async def work() -> None:
            record(job="ab", model="m")

        await asyncio.create_task(work())
        clock.time += 1
        await send({"type": "http.response.start", "status": 201, "headers": []})
        clock.time += 2
        for body in (b"", b"one", b"three"):
            await send({"type": "http.response.body", "body": body, "more_body": True})
            clock.time += 4
        await send({"type": "http.response.body"})
        record(outcome="completed")

    access, line, sent = await serve(handler, clock=clock)
    assert (access.status, access.sent_bytes, access.first_seconds, access.seconds) == (201, 8, 7, 15)
    assert access.outcome == "completed"
    assert line == {
        "event": "request",
        "log_level": "info",
        "method": "POST",
        "path": "/v1/x",
        "status": 201,
        "ms": 15_000,
        "job": "ab",
        "model": "m",
        "outcome": "completed",
    }
    assert b"".join(message.get("body", b"") for message in sent) == b"onethree"


@pytest.mark.parametrize(("status", "outcome"), [(None, "failed"), (200, "answered"), (399, "answered"), (400, "failed")])
async def test_the_outcome_without_a_job(status: int | None, outcome: str) -> None:
    """Without a handler's word the status decides; a client that left before the answer failed."""

    async def handler(_scope: Any, _receive: Any, send: Any) -> None:
        if status is not None:
            await send({"type": "http.response.start", "status": status, "headers": []})

    access, _, _ = await serve(handler)
    assert (access.status, access.outcome) == (status or CLIENT_GONE, outcome)


async def test_an_exception_is_logged_and_passed_on() -> None:
    """A handler that raises has its line too."""

    async def handler(_scope: Any, _receive: Any, _send: Any) -> None:
        raise ValueError("a bug")

    with capture_logs() as lines, pytest.raises(ValueError, match="a bug"):
        await AccessLog(handler)({"type": "http", "method": "GET", "path": "/"}, None, None)  # type: ignore[arg-type]
    assert len(lines) == 1


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/health", "/ready", "/metrics", "/v1/health", "/v1/ready"])
async def test_probes_are_quiet(path: str) -> None:
    """Paths that monitors ask every few seconds are logged for debugging only."""

    async def handler(_scope: Any, _receive: Any, _send: Any) -> None:
        """Answers nothing."""

    _, line, _ = await serve(handler, path)
    assert line["log_level"] == "debug"
    _, line, _ = await serve(handler, "/" + "x" * 9_000)
    assert (line["log_level"], len(line["path"])) == ("info", MAX_PATH)


async def test_requests_do_not_mix() -> None:
    """Concurrent requests have fields of their own, and outside of a request nothing is recorded."""
    arrived = asyncio.Event()

    async def handler(scope: Any, _receive: Any, _send: Any) -> None:
        record(job=scope["path"])
        if scope["path"] == "/a":
            await arrived.wait()
        arrived.set()

    record(job="nowhere")
    seen: list[Access] = []
    app = AccessLog(handler, seen.append)
    scopes = [{"type": "http", "method": "GET", "path": path} for path in ("/a", "/b")]
    await asyncio.gather(*(app(scope, None, None) for scope in scopes))  # type: ignore[arg-type]
    assert {access.path: access.fields for access in seen} == {"/a": {"job": "/a"}, "/b": {"job": "/b"}}


async def test_other_connections_pass() -> None:
    """A WebSocket is passed on as it is."""
    calls: list[Any] = []

    async def handler(*call: Any) -> None:
        calls.append(call)

    await AccessLog(handler)({"type": "websocket"}, 1, 2)  # type: ignore[arg-type]
    assert calls == [({"type": "websocket"}, 1, 2)]


@pytest.mark.parametrize(("begins", "status"), [(False, 500), (True, 200)])
async def test_a_handler_that_fails(begins: bool, status: int) -> None:
    """The server answers its error with status 500, unless the answer has begun; the client has not left."""

    async def fails(_scope: Any, _receive: Any, send: Any) -> None:
        if begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("a fault")

    seen: list[Access] = []
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}

    async def nothing(*_: Any) -> Any:
        return {}

    with pytest.raises(ValueError, match="a fault"):
        await AccessLog(fails, seen.append)(scope, nothing, nothing)
    assert seen[0].status == status

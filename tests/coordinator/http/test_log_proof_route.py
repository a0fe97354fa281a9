"""The direct route of log proofs: it answers as the documented one does, and leaves to that one what it does not read."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI

from coordinator.http.log_proof_route import PATH, LogProofRoute, read_question
from coordinator.http.log_routes import add_log_routes
from tallystick.protocol.log_monitor import MAX_ASKED, MAX_SPAN, LogQuestion
from tests.coordinator.harness import World

QUESTIONS = [
    LogQuestion((), (0,)),
    LogQuestion((1, 3, 3, 7), (0, 2, 5, 99)),
    LogQuestion((2,), (), (1, 6)),
    LogQuestion((), (), (1, 1)),
    LogQuestion((), (), (5, 2)),
    LogQuestion((), (), (0, MAX_SPAN + 1)),
    LogQuestion((0, 10**17), (10**17,), (10**17, 10**17 + 5)),
    LogQuestion(tuple(range(MAX_ASKED)), tuple(range(MAX_ASKED)), (0, 12)),
]
OTHERS = [
    "",
    "index=",
    "index=-1",
    "index=+1",
    "index=1&",
    "index=%31",
    "index=\u0661",
    "index=1;since=2",
    "start=1",
    "start=1&start=2&end=4",
    "start=1&end=2&end=4",
    "unknown=1",
    "index=1&unknown=1",
    f"index={1 << 63}",
    f"index={(1 << 63) - 1}",
    f"since={10**18}",
    "index=00000000000000000000000001",
    "&".join(f"since={size}" for size in range(MAX_ASKED + 1)),
    "&".join(f"index={index}" for index in range(MAX_ASKED + 1)),
    "since=1.0",
    "since=0x1",
    "SINCE=1",
]


@pytest.fixture
async def clients() -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """A client of the direct route and one of the documented route, of a log of 12 matches."""
    world = World()
    await world.market.start()
    node = world.node("ann", slots=64)
    for _ in range(12):
        await world.started(node)
    await world.market.match_log.sign_head()
    documented = FastAPI()
    add_log_routes(documented, world.market.match_log)
    apps = LogProofRoute(documented, world.market.match_log), documented
    direct, plain = (httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://log") for app in apps)
    async with direct, plain:
        yield direct, plain


@pytest.mark.parametrize("question", QUESTIONS)
async def test_it_answers_as_the_documented_route(
    clients: tuple[httpx.AsyncClient, httpx.AsyncClient], question: LogQuestion
) -> None:
    """Status, type and content are the same, for all that clients and nodes ask."""
    direct, plain = [await client.get(f"{PATH}?{urlencode(question.query)}") for client in clients]
    assert read_question(str(direct.url.query, "ascii").encode()) is not None, "it is answered without the framework"
    assert (direct.status_code, direct.headers["content-type"]) == (plain.status_code, plain.headers["content-type"])
    assert direct.json() == plain.json()
    assert direct.headers["content-length"] == str(len(direct.content))


@pytest.mark.parametrize("query", OTHERS)
async def test_what_it_does_not_read_goes_to_the_documented_route(
    clients: tuple[httpx.AsyncClient, httpx.AsyncClient], query: str
) -> None:
    """Odd, large, repeated or misspelt members are refused or read there, as before."""
    direct, plain = [await client.get(f"{PATH}?{query}") for client in clients]
    assert (direct.status_code, direct.content) == (plain.status_code, plain.content)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods(clients: tuple[httpx.AsyncClient, httpx.AsyncClient], method: str) -> None:
    """The route is one of GET alone."""
    direct, plain = [await client.request(method, f"{PATH}?index=1") for client in clients]
    assert (direct.status_code, direct.content) == (plain.status_code, plain.content)


@pytest.mark.parametrize("scope", [{"type": "lifespan"}, {"type": "websocket", "path": PATH, "query_string": b"index=1"}])
async def test_what_is_no_request_goes_on(scope: dict[str, Any]) -> None:
    """The events of a server and WebSockets have no method, and are the framework's."""
    seen = list[Any]()

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope)

    async def unused(*_: Any) -> Any:
        raise AssertionError

    await LogProofRoute(app, World().market.match_log)(scope, unused, unused)
    assert seen == [scope]


async def test_before_the_first_head() -> None:
    """The error is that of the market: the status, the code and the reason."""
    world = World()
    route = LogProofRoute(FastAPI(), world.market.match_log)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=route), base_url="http://log") as client:
        response = await client.get(f"{PATH}?index=1")
    assert response.status_code == 503
    assert "no signed head yet" in response.json()["error"]["message"]

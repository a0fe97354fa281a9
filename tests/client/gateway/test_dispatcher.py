"""Requests for jobs go to their handler, all others to the app; both are authenticated first, whatever form their path has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.auth import ANONYMOUS, CALLER_KEY, Authenticator
from tallystick.client.gateway.dispatcher import JOB_ROUTES, PATH_MODEL, Dispatcher
from tallystick.protocol.errors import TallyError

KEY = "k" * 20


async def dispatch(config: ClientConfig, method: str, path: str, **headers: str) -> tuple[str, Scope]:
    """Who got a request, and its scope."""
    got: list[tuple[str, Scope]] = []

    def app(name: str) -> Any:
        async def serve(scope: Scope, _receive: Receive, _send: Send) -> None:
            got.append((name, scope))

        return serve

    async def refuse(scope: Scope, _send: Send, error: TallyError) -> None:
        got.append((error.code.value, scope))

    async def receive() -> Message:
        raise AssertionError("nothing is read yet")

    async def send(_message: Message) -> None:
        raise AssertionError("nothing is sent yet")

    raw = [(b"host", b"localhost")] + [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "raw_path": b"?", "http_version": "1.1", "headers": raw}
    await Dispatcher(app("job"), app("app"), Authenticator(config), refuse)(scope, receive, send)
    return got[0]


@pytest.mark.parametrize(
    ("request_line", "receiver", "route", "model"),
    [
        *((f"POST {route}", "job", route, None) for route in sorted(JOB_ROUTES)),
        ("POST /chat/completions", "job", "/v1/chat/completions", None),
        ("POST //v1//chat/completions/", "job", "/v1/chat/completions", None),
        ("POST /openai/deployments/m/chat/completions", "job", "/v1/chat/completions", "m"),
        ("POST /openai/deployments/a/b/chat/completions", "job", "/v1/chat/completions", "a/b"),
        ("POST /v1/rerank", "app", "/v1/rerank", None),
        ("POST /v1/messages/count_tokens", "app", "/v1/messages/count_tokens", None),
        ("POST /v1/models", "app", "/v1/models", None),
        ("GET /v1/chat/completions", "app", "/v1/chat/completions", None),
        ("OPTIONS /v1/responses", "app", "/v1/responses", None),
        ("PUT /v1/messages", "app", "/v1/messages", None),
        ("GET /v1/responses/resp_1", "app", "/v1/responses/resp_1", None),
    ],
)
async def test_who_serves_a_request(
    config: ClientConfig, request_line: str, receiver: str, route: str, model: str | None
) -> None:
    """By route and method. The path is that of the route, and the model that the path names is known."""
    method, path = request_line.split()
    keyed = replace(config, api_keys=(ApiKey(label="a", secret=KEY),))
    served, scope = await dispatch(keyed, method, path, authorization=f"Bearer {KEY}")
    assert (served, scope["path"], scope.get(PATH_MODEL), scope[CALLER_KEY].label) == (receiver, route, model, "a")
    served, scope = await dispatch(keyed, method, path, authorization="Bearer wrong")
    assert served == "unauthenticated"
    served, scope = await dispatch(config, method, path, origin="https://evil.example")
    assert served == "unauthenticated"
    served, scope = await dispatch(config, method, path)
    assert (served, scope[CALLER_KEY]) == (receiver, None)


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "//health/"])
async def test_open_paths_serve_strangers_as_strangers(config: ClientConfig, path: str) -> None:
    """They are marked, and only on these paths."""
    keyed = replace(config, api_key=KEY)
    served, scope = await dispatch(keyed, "GET", path)
    assert (served, scope[ANONYMOUS]) == ("app", True)
    served, scope = await dispatch(keyed, "GET", path, x_api_key=KEY)
    assert (served, scope.get(ANONYMOUS)) == ("app", None)


async def test_any_presented_key_counts(config: ClientConfig) -> None:
    """Clients that send several keys mean any of them; the first one that is known decides who they are."""
    keyed = replace(config, api_key=KEY, api_keys=(ApiKey(label="a", secret="a" * 20), ApiKey(label="b", secret="b" * 20)))
    for headers, label in (
        ({"authorization": "Bearer none", "api_key": "b" * 20}, "b"),
        ({"authorization": "bearer  " + "a" * 20, "x_api_key": "b" * 20}, "a"),
        ({"authorization": "Basic " + "a" * 20, "x_api_key": "b" * 20}, "b"),
    ):
        _, scope = await dispatch(keyed, "POST", "/v1/chat/completions", **headers)
        assert scope[CALLER_KEY].label == label
    served, scope = await dispatch(keyed, "POST", "/v1/chat/completions", api_key=KEY)
    assert (served, scope[CALLER_KEY]) == ("job", None), "the master key is no caller's"
    for wrong in ("a" * 19, "a" * 21, "", "Bearer " + "a" * 20):
        served, _ = await dispatch(keyed, "POST", "/v1/chat/completions", api_key=wrong)
        assert served == "unauthenticated"

"""Who may use the gateway, and on which terms: without API keys only programs on this machine; with keys, whoever has one, each
within what the config says of its key.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError

MIN_SECRET = 16
CALLER = "tally.caller"
"""Where a scope has the ApiKey of its caller, if the key is one of the config's [[keys]]."""

_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """See the module's docstring. Everything but GET /health passes through it; `refuse` sends an error.

    Raises BadMessage for keys that are easily guessed.
    """

    def __init__(self, app: ASGIApp, config: ClientConfig, refuse: Callable[[Send, TallyError], Awaitable[None]]) -> None:
        self._app, self._refuse, self._origins = app, refuse, frozenset(config.allow_origins)
        _check_secrets(config)
        master = ((config.api_key.encode(), None),) if config.api_key else ()
        self._keys: tuple[tuple[bytes, ApiKey | None], ...] = (*master, *((one.value.encode(), one) for one in config.keys))
        self._names = _LOCAL_NAMES | {config.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 401."""
        if scope["type"] == "http" and scope["path"] != "/health":
            try:
                scope[CALLER] = self._caller(Headers(scope=scope))
            except TallyError as error:
                await self._refuse(send, error)
                return
        await self._app(scope, receive, send)

    def _caller(self, headers: Headers) -> ApiKey | None:
        if not self._keys:
            self._check_local(headers)
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        secret = given.strip().encode() if scheme.lower() == "bearer" else b""
        found = [caller for key, caller in self._keys if hmac.compare_digest(secret, key)]
        if not found:
            raise Refusal(Code.UNAUTHENTICATED, "this gateway wants an API key of its own: Authorization: Bearer …")
        return found[0]

    def _check_local(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            raise Refusal(Code.UNAUTHENTICATED, f"web pages of {origin} may not spend from this wallet; see allow_origins")
        if _host_name(headers.get("host", "")) not in self._names:
            raise Refusal(Code.UNAUTHENTICATED, "the Host header names another machine; set api_key to serve other names")


def _host_name(host: str) -> str | None:
    try:
        return urlsplit("//" + host).hostname
    except ValueError:
        return None


def _check_secrets(config: ClientConfig) -> None:
    for one in config.keys:
        if len(one.value) < MIN_SECRET:
            named = "secret" if one.secret_env is None else f"the environment variable {one.secret_env}"
            what = "is not set" if not one.value else f"has fewer than {MIN_SECRET} characters: anyone could guess it"
            raise BadMessage(f"config: keys: {one.label}: {named} {what}")
    secrets = [one.value for one in config.keys] + [config.api_key]
    if len(set(secrets)) != len(secrets):
        raise BadMessage("config: keys: two of them have the same secret")
    labels = [one.label for one in config.keys]
    if len(set(labels)) != len(labels):
        raise BadMessage("config: keys: two of them have the same label, by which callers are kept apart")


def check_exposed(config: ClientConfig) -> None:
    """Raises BadMessage for a gateway that others could spend from: bound beyond this machine without an API key."""
    if not (config.loopback or config.api_key or config.keys):
        raise BadMessage(f"gateway: {config.host} can be reached from other machines, so set api_key (TALLY_GATEWAY_API_KEY)")

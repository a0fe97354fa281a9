"""Authenticates the gateway's callers: by API key, or, without keys, as programs on this machine.

Without keys, the only untrusted party on this machine is a browser. Its pages differ from programs by the headers Origin and
Sec-Fetch-Site, which pages cannot set. Host names that were made to resolve to this machine (DNS rebinding) differ by Host.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.config import ANY_ORIGIN, ApiKey, ClientConfig
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.runtime.plaintext import is_loopback

MIN_SECRET = 16
"""The fewest characters of a key in [[api_keys]]."""
KEY_HEADERS = ("api-key", "x-api-key")
"""Headers with the key of clients of Azure's and of Anthropic's API, beside Authorization."""
CALLER_KEY = "tally.caller"
"""Scope member with the ApiKey of the caller, if its key is one of the config's [[api_keys]]."""
ANONYMOUS = "tally.anonymous"
"""Scope member that is set for a request to OPEN_PATHS if the caller may use nothing else."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that answer every caller, and tell strangers only that the gateway is up."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([a-zA-Z0-9._-]{1,253}))(?::[0-9]{1,5})?")
_OWN_SITES = ("none", "same-origin")
"""Values of Sec-Fetch-Site for requests that no other site's page caused."""


def caller_label(scope: Scope) -> str:
    """The label of the caller's API key; empty if it has none of [[api_keys]]."""
    caller: ApiKey | None = scope.get(CALLER_KEY)
    return "" if caller is None else caller.label


class Authenticator:
    """ASGI middleware that passes authenticated requests on. `refuse` sends an error to other callers.

    OPEN_PATHS are passed on for every caller, marked ANONYMOUS. Raises BadMessage for keys that are easy to guess, and for
    allow_origins "*" without a key.
    """

    def __init__(self, app: ASGIApp, config: ClientConfig, refuse: Callable[[Scope, Send, TallyError], Awaitable[None]]) -> None:
        self._app, self._refuse, self._origins = app, refuse, frozenset(origin.lower() for origin in config.allow_origins)
        _check_secrets(config)
        _check_origins(config)
        master = ((config.api_key.encode(), None),) if config.api_key else ()
        callers = ((api_key.value.encode(), api_key) for api_key in config.api_keys)
        self._keys: tuple[tuple[bytes, ApiKey | None], ...] = (*master, *callers)
        self._own_name = config.host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 401."""
        if scope["type"] == "http":
            try:
                scope[CALLER_KEY] = self._authenticate(Headers(scope=scope), scope["http_version"])
            except TallyError as error:
                if scope["path"] not in OPEN_PATHS:
                    await self._refuse(scope, send, error)
                    return
                scope[ANONYMOUS] = True
        await self._app(scope, receive, send)

    def _authenticate(self, headers: Headers, http_version: str) -> ApiKey | None:
        if not self._keys:
            self._check_local(headers, http_version)
            return None
        # Compares with every key, so that the time does not tell which one was close.
        secrets = _presented(headers)
        matching = [caller for secret in secrets for key, caller in self._keys if hmac.compare_digest(secret, key)]
        if not matching:
            text = f"this gateway requires an API key: send Authorization: Bearer KEY, or the header {' or '.join(KEY_HEADERS)}"
            raise Refusal(Code.UNAUTHENTICATED, text)
        return matching[0]

    def _check_local(self, headers: Headers, http_version: str) -> None:
        origins, hosts = headers.getlist("origin"), headers.getlist("host")
        for origin in origins:
            if origin.lower() not in self._origins:
                text = f"web pages of {origin[:200]} may not spend from this wallet; to allow them, set allow_origins"
                raise Refusal(Code.UNAUTHENTICATED, text)
        if not origins and any(site not in _OWN_SITES for site in headers.getlist("sec-fetch-site")):
            text = "web pages of other sites (Sec-Fetch-Site) may not spend from this wallet; to allow them, set allow_origins"
            raise Refusal(Code.UNAUTHENTICATED, text)
        if not hosts and http_version == "1.0":
            return  # such clients need not send it, and no browser is one
        if len(hosts) != 1 or not self._is_this_machine(hosts[0]):
            text = "Host: expected exactly one, the name of this machine; to serve other names, set api_key"
            raise Refusal(Code.UNAUTHENTICATED, text)

    def _is_this_machine(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        name = (match[1] or match[2]).lower() if match is not None else ""
        return bool(name) and (name == self._own_name or is_loopback(name))


def _presented(headers: Headers) -> list[bytes]:
    """The keys that a request presents. Clients that send several mean any of them."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    bearer = [credentials] if scheme.lower() == "bearer" else []
    return [key.strip().encode() for key in (*bearer, *(headers.get(name, "") for name in KEY_HEADERS)) if key.strip()]


def _check_secrets(config: ClientConfig) -> None:
    for api_key in config.api_keys:
        if len(api_key.value) < MIN_SECRET:
            source = "secret" if api_key.secret_env is None else f"environment variable {api_key.secret_env}"
            problem = f"got {len(api_key.value)}" if api_key.value else "it is not set"
            raise BadMessage(f"config: api_keys: {api_key.label}: {source}: expected at least {MIN_SECRET} characters, {problem}")
    secrets = [api_key.value for api_key in config.api_keys] + [config.api_key]
    if len(set(secrets)) != len(secrets):
        raise BadMessage("config: api_keys: expected different secrets, got the same secret twice")
    labels = [api_key.label for api_key in config.api_keys]
    if len(set(labels)) != len(labels):
        raise BadMessage("config: api_keys: expected different labels, got the same label twice")


def _check_origins(config: ClientConfig) -> None:
    if ANY_ORIGIN in config.allow_origins and not (config.api_key or config.api_keys):
        text = (
            f'config: allow_origins: "{ANY_ORIGIN}" would let every web page spend from this wallet; name the origins of pages, '
        )
        raise BadMessage(text + "or set api_key (TALLY_GATEWAY_API_KEY), which each page must then send")


def check_public_access(config: ClientConfig) -> None:
    """Raises BadMessage for a gateway that other machines, or web pages of all sites, can use without an API key."""
    _check_origins(config)
    if not (config.loopback or config.api_key or config.api_keys):
        text = f"config: host: other machines can reach {config.host}, so set api_key (TALLY_GATEWAY_API_KEY)"
        raise BadMessage(text)

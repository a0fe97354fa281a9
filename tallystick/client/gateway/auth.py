"""Who may use the gateway, and on which terms: without API keys only programs on this machine; with keys, whoever has one, each
within what the config says of its key.

Without keys, a browser is the stranger on this machine. Its pages are told from programs by Origin and Sec-Fetch-Site, which
pages cannot set, and names that were made to point here (DNS rebinding) by Host.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.protocol.errors import BadMessage, Code, Refusal, TallyError
from tallystick.runtime.plaintext import is_loopback

MIN_SECRET = 16
CALLER_KEY = "tally.caller"
"""Where a scope has the ApiKey of its caller, if the key is one of the config's [[api_keys]]."""
ANONYMOUS = "tally.stranger"
"""Set in a scope of GET /health whose caller would be refused anything else."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([a-zA-Z0-9._-]{1,253}))(?::[0-9]{1,5})?")
_OWN_SITES = ("none", "same-origin")
"""What Sec-Fetch-Site says where no other site's page is behind a request."""


class Authenticator:
    """See the module's docstring. `refuse` sends an error; GET /health is passed on for strangers too, marked as such.

    Raises BadMessage for keys that are easily guessed.
    """

    def __init__(self, app: ASGIApp, config: ClientConfig, refuse: Callable[[Send, TallyError], Awaitable[None]]) -> None:
        self._app, self._refuse, self._origins = app, refuse, frozenset(config.allow_origins)
        _check_secrets(config)
        master = ((config.api_key.encode(), None),) if config.api_key else ()
        self._keys: tuple[tuple[bytes, ApiKey | None], ...] = (*master, *((one.value.encode(), one) for one in config.api_keys))
        self._own_name = config.host.lower()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, or answers 401."""
        if scope["type"] == "http":
            try:
                scope[CALLER_KEY] = self._caller(Headers(scope=scope))
            except TallyError as error:
                if scope["path"] != "/health":
                    await self._refuse(send, error)
                    return
                scope[ANONYMOUS] = True
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
        origins, hosts = headers.getlist("origin"), headers.getlist("host")
        for origin in origins:
            if origin not in self._origins:
                text = f"web pages of {origin[:200]} may not spend from this wallet; see allow_origins"
                raise Refusal(Code.UNAUTHENTICATED, text)
        if not origins and any(site not in _OWN_SITES for site in headers.getlist("sec-fetch-site")):
            text = "another site's web page may not use this wallet (Sec-Fetch-Site); see allow_origins"
            raise Refusal(Code.UNAUTHENTICATED, text)
        if len(hosts) != 1 or not self._is_here(hosts[0]):
            text = "the Host header names another machine, or none, or several; set api_key to serve other names"
            raise Refusal(Code.UNAUTHENTICATED, text)

    def _is_here(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = (found[1] or found[2]).lower() if found is not None else ""
        return bool(name) and (name == self._own_name or is_loopback(name))


def _check_secrets(config: ClientConfig) -> None:
    for one in config.api_keys:
        if len(one.value) < MIN_SECRET:
            named = "secret" if one.secret_env is None else f"the environment variable {one.secret_env}"
            what = "is not set" if not one.value else f"has fewer than {MIN_SECRET} characters: anyone could guess it"
            raise BadMessage(f"config: api_keys: {one.label}: {named} {what}")
    secrets = [one.value for one in config.api_keys] + [config.api_key]
    if len(set(secrets)) != len(secrets):
        raise BadMessage("config: api_keys: two of them have the same secret")
    labels = [one.label for one in config.api_keys]
    if len(set(labels)) != len(labels):
        raise BadMessage("config: api_keys: two of them have the same label, by which callers are kept apart")


def check_public_access(config: ClientConfig) -> None:
    """Raises BadMessage for a gateway that others could spend from: bound beyond this machine without an API key."""
    if not (config.loopback or config.api_key or config.api_keys):
        raise BadMessage(f"gateway: {config.host} can be reached from other machines, so set api_key (TALLY_GATEWAY_API_KEY)")

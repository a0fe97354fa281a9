"""Authenticates the gateway's callers: by API key, or, without keys, as programs on this machine.

Without keys, the only untrusted party on this machine is a browser. Its pages differ from programs by the headers Origin and
Sec-Fetch-Site, which pages cannot set. Host names that were made to resolve to this machine (DNS rebinding) differ by Host.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import Scope

from tallystick.client.config import ANY_ORIGIN, ApiKey, ClientConfig
from tallystick.client.gateway.request_headers import RequestHeaders, headers_of
from tallystick.client.gateway.sessions import Sessions
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.health import LIVENESS_PATH, READINESS_PATH
from tallystick.runtime.plaintext import is_loopback
from tallystick.web.sign_in_routes import SIGN_IN_PATHS
from tallystick.web.wallet_sign_in import WalletSignIn

MIN_SECRET = 16
"""The fewest characters of a key in [[api_keys]]."""
KEY_HEADERS = ("api-key", "x-api-key")
"""Headers with the key of clients of Azure's and of Anthropic's API, beside Authorization."""
CALLER_KEY = "tally.caller"
"""Scope member with the ApiKey of the caller, if its key is one of the config's [[api_keys]]."""
ANONYMOUS = "tally.anonymous"
"""Scope member that is set for a request to OPEN_PATHS if the caller may use nothing else."""
OPEN_PATHS = frozenset({"/", LIVENESS_PATH, READINESS_PATH, "/health", "/ready"})
"""Paths that answer every caller, and tell strangers only that the gateway is up."""

_PAYER_PATHS = (
    "/tally/spending",
    "/tally/money",
    "/tally/jobs",
    "/tally/receipt",
    "/tally/chat",
    "/tally/wallet",
    "/tally/login",
)
PAGE_PATHS = (*_PAYER_PATHS, *SIGN_IN_PATHS)
PAGE_FOLDERS = ("/tally/pages/", "/static/")
"""Paths of pages and their files. With API keys, they answer every caller too, who is shown the form to log in."""

MAX_HOSTS = 64
"""Values of the header Host that are remembered: one for each port, or name, by which local programs reach this gateway."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([a-zA-Z0-9._-]{1,253}))(?::[0-9]{1,5})?")
_OWN_SITES = ("none", "same-origin")
"""Values of Sec-Fetch-Site for requests that no other site's page caused."""


def caller_label(scope: Scope) -> str:
    """The label of the caller's API key; empty if it has none of [[api_keys]]."""
    caller: ApiKey | None = scope.get(CALLER_KEY)
    return "" if caller is None else caller.label


class Authenticator:
    """Authenticates requests. Raises BadMessage for keys that are easy to guess, and for allow_origins "*" without a key."""

    def __init__(self, config: ClientConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: monotonic seconds, for sessions."""
        self._origins = frozenset(origin.lower() for origin in config.allow_origins)
        _check_secrets(config)
        _check_origins(config)
        self._pepper = secrets.token_bytes(32)
        master = ((config.api_key, None),) if config.api_key else ()
        callers = ((api_key.value, api_key) for api_key in config.api_keys)
        self._keys: dict[bytes, ApiKey | None] = {self._digest(key.encode()): caller for key, caller in (*master, *callers)}
        self._master = self._digest(config.api_key.encode()) if config.api_key else None
        self.sessions = Sessions(clock)
        self.sign_in: WalletSignIn | None = None
        """Whose sessions open what the gateway's own key does."""
        self._own_name = config.host.lower()
        self._own_hosts: set[str] = set()
        """Values of the header Host that name this machine, of those seen last."""

    def _digest(self, key: bytes) -> bytes:
        """What a key is looked up by. It is secret, so the time of a lookup does not tell how close a guess was."""
        return hashlib.blake2b(key, key=self._pepper, digest_size=32).digest()

    def authenticate(self, scope: Scope) -> ApiKey | None:
        """The caller's key, if it is one of [[api_keys]]. Raises Refusal (unauthenticated) for a caller that may do nothing."""
        headers = headers_of(scope)
        if not self._keys:
            self._check_local(headers, scope["http_version"])
            return None
        for key in _presented(headers):
            digest = self._digest(key)
            if digest in self._keys:
                return self._keys[digest]
        if _is_same_origin(headers) and (self.sessions.is_open(headers.get("cookie")) or self._has_wallet_session(scope)):
            return None
        text = f"this gateway requires an API key: send Authorization: Bearer KEY, or the header {' or '.join(KEY_HEADERS)}"
        raise Refusal(Code.UNAUTHENTICATED, text)

    def _has_wallet_session(self, scope: Scope) -> bool:
        return self.sign_in is not None and self.sign_in.session_at_hand(Request(scope)) is not None

    def is_page(self, path: str) -> bool:
        """Whether callers without a key are passed on to this path, to log in. Without keys, nobody need log in."""
        return bool(self._keys) and (path in PAGE_PATHS or path.startswith(PAGE_FOLDERS))

    def log_in(self, key: str) -> str | None:
        """Opens a session for the holder of `api_key`. Returns the value of its cookie; None for any other key."""
        known = self._master is not None and self._digest(key.strip().encode(errors="surrogatepass")) == self._master
        return self.sessions.open() if known else None

    def _check_local(self, headers: RequestHeaders, http_version: str) -> None:
        origins, hosts = headers.all("origin"), headers.all("host")
        for origin in origins:
            if origin.lower() not in self._origins and not _is_same_origin(headers):
                text = f"web pages of {origin[:200]} may not spend from this wallet; to allow them, set allow_origins"
                raise Refusal(Code.UNAUTHENTICATED, text)
        if not origins and any(site not in _OWN_SITES for site in headers.all("sec-fetch-site")):
            text = "web pages of other sites (Sec-Fetch-Site) may not spend from this wallet; to allow them, set allow_origins"
            raise Refusal(Code.UNAUTHENTICATED, text)
        if not hosts and http_version == "1.0":
            return  # such clients need not send it, and no browser is one
        if len(hosts) != 1 or not self._is_this_machine(hosts[0]):
            text = "Host: expected exactly one, the name of this machine; to serve other names, set api_key"
            raise Refusal(Code.UNAUTHENTICATED, text)

    def _is_this_machine(self, host: str) -> bool:
        if host in self._own_hosts:
            return True
        match = _HOST.fullmatch(host)
        name = (match[1] or match[2]).lower() if match is not None else ""
        if not name or not (name == self._own_name or is_loopback(name)):
            return False
        if len(self._own_hosts) >= MAX_HOSTS:
            self._own_hosts.clear()
        self._own_hosts.add(host)
        return True


def _is_same_origin(headers: RequestHeaders) -> bool:
    """Whether a request is of this gateway's own pages, or of no page. Host must be checked besides."""
    origins, hosts = headers.all("origin"), headers.all("host")
    own = {f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")}
    sites = headers.all("sec-fetch-site")
    return len(hosts) == 1 and {origin.lower() for origin in origins} <= own and all(site in _OWN_SITES for site in sites)


def _presented(headers: RequestHeaders) -> list[bytes]:
    """The keys that a request presents. Clients that send several mean any of them."""
    scheme, _, credentials = headers.get("authorization").partition(" ")
    bearer = [credentials] if scheme.lower() == "bearer" else []
    return [key.strip().encode() for key in (*bearer, *(headers.get(name) for name in KEY_HEADERS)) if key.strip()]


def _check_secrets(config: ClientConfig) -> None:
    for api_key in config.api_keys:
        if len(api_key.value) < MIN_SECRET:
            source = "secret" if api_key.secret_env is None else f"environment variable {api_key.secret_env}"
            problem = f"got {len(api_key.value)}" if api_key.value else "it is not set"
            raise BadMessage(f"config: api_keys: {api_key.label}: {source}: expected at least {MIN_SECRET} characters, {problem}")
    values = [api_key.value for api_key in config.api_keys] + [config.api_key]
    if len(set(values)) != len(values):
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

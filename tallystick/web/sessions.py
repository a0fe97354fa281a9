"""Sessions of people and programs that signed in with a wallet: short, few, and known by a digest of their secret value."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Protocol

from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable
from tallystick.protocol.sign_in import CHALLENGE_SECONDS, SKEW_SECONDS
from tallystick.protocol.types import Address

SESSION_SECONDS = 3_600
NONCE_SECONDS = CHALLENGE_SECONDS + 2 * SKEW_SECONDS
"""How long a used nonce is remembered: longer than any message with it can be used."""
MAX_SESSIONS, MAX_OF_ACCOUNT = 4_096, 16
"""Open sessions of all accounts and of one. A further one ends the oldest of its account, or of all."""
MAX_COOKIES = 4_096
"""Characters of a Cookie header that are read."""


@dataclass(frozen=True, slots=True)
class Session:
    """An open session. `digest`: of its secret value; `nonce`: of the message that opened it; `origin`: the site that it is for.

    Times are Unix seconds.
    """

    digest: bytes
    nonce: str
    account: Address
    origin: str
    opened_at: float
    until: float


class SessionStore(Protocol):
    """Keeps sessions, and the nonces that opened them."""

    async def open(self, session: Session) -> None:
        """Keeps a session. The oldest of its account ends beyond MAX_OF_ACCOUNT, and the oldest of all if the store is full.

        Raises Refusal (unauthenticated) if its nonce was used before, Unavailable if too many were opened in NONCE_SECONDS.
        """

    async def find(self, digest: bytes) -> Session | None:
        """Returns a session that was opened and not closed, or None. It may be over. Raises Unavailable."""
        ...

    async def close(self, digest: bytes) -> None:
        """Ends a session if it is open. Raises Unavailable."""


class MemorySessions:
    """The sessions of one process."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._nonces: OrderedDict[str, float] = OrderedDict()
        """The nonces that were used, and when."""

    async def open(self, session: Session) -> None:
        """See SessionStore."""
        now = session.opened_at
        while self._nonces and next(iter(self._nonces.values())) < now - NONCE_SECONDS:
            self._nonces.popitem(last=False)
        for digest in [known.digest for known in self._sessions.values() if known.until <= now]:
            del self._sessions[digest]
        if session.nonce in self._nonces:
            raise nonce_used()
        own = [digest for digest, known in self._sessions.items() if known.account == session.account]
        if len(own) >= MAX_OF_ACCOUNT:
            del self._sessions[own[0]]
        if len(self._nonces) >= MAX_SESSIONS:
            raise too_many_sessions(MAX_SESSIONS)
        if len(self._sessions) >= MAX_SESSIONS:
            self._sessions.popitem(last=False)
        self._nonces[session.nonce] = now
        self._sessions[session.digest] = session

    async def find(self, digest: bytes) -> Session | None:
        """See SessionStore."""
        return self.get(digest)

    def get(self, digest: bytes) -> Session | None:
        """Returns a session at once, as `find` does."""
        return self._sessions.get(digest)

    async def close(self, digest: bytes) -> None:
        """See SessionStore."""
        self._sessions.pop(digest, None)


def nonce_used() -> Refusal:
    """Returns the refusal of a message that was used before."""
    return Refusal(Code.UNAUTHENTICATED, "sign-in: Nonce: this message was used before; sign a new one")


def too_many_sessions(limit: int) -> Unavailable:
    """Returns the error of a server at which `limit` sessions were opened within NONCE_SECONDS, whose nonces it has to know."""
    text = f"{limit:,} sessions were opened in the last {NONCE_SECONDS // 60} minutes, the maximum; try again in a minute"
    return Unavailable(Code.RATE_LIMITED, text, fault=Fault.NOBODY)


def session_digest(value: str) -> bytes:
    """What a session is looked up by, so that the time of a lookup tells nothing of its value."""
    return hashlib.sha256(value.encode(errors="surrogateescape")).digest()


def cookie_name(origin: str) -> str:
    """The name of the cookie of a site. Browsers send cookies to all ports of a host, so the port is in the name.

    With https, the prefix keeps sites beside this one from setting it (RFC 6265bis, section 4.1.3.2).
    """
    scheme, _, host = origin.partition("://")
    port = host.rpartition(":")[2]
    name = f"tally_wallet_{port}" if port.isdecimal() else "tally_wallet"
    return f"__Host-{name}" if scheme == "https" else name


def read_cookie(headers: Iterable[str], name: str) -> str | None:
    """The value of a cookie in Cookie headers (RFC 6265); None without it, or if it has two values."""
    text = "; ".join(headers)
    if len(text) > MAX_COOKIES or text.count(f"{name}=") != 1:
        return None
    try:
        morsel = SimpleCookie(text).get(name)
    except CookieError:
        return None
    return None if morsel is None else morsel.value

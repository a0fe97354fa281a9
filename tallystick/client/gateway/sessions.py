"""Sessions of browsers that logged in with the gateway's API key: short, few, and in memory alone."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

COOKIE = "tally_session"
SESSION_SECONDS = 8 * 3_600
MAX_SESSIONS = 64
"""Open sessions; at more, the oldest one ends."""
MAX_COOKIES = 4_096
"""Characters of a Cookie header that are read."""


class Sessions:
    """The open sessions, by a digest of their secret value. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def open(self) -> str:
        """Opens a session. Returns the value of its cookie."""
        value = secrets.token_urlsafe(32)
        while len(self._until) >= MAX_SESSIONS:
            del self._until[next(iter(self._until))]
        self._until[_digest(value)] = self._clock() + SESSION_SECONDS
        return value

    def is_open(self, cookies: str) -> bool:
        """Whether a Cookie header (RFC 6265) has the value of an open session."""
        if not self._until or len(cookies) > MAX_COOKIES:
            return False
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        if morsel is None:
            return False
        digest = _digest(morsel.value)
        until = self._until.get(digest)
        if until is not None and self._clock() >= until:
            del self._until[digest]
            until = None
        return until is not None


def _digest(value: str) -> bytes:
    """What a session is looked up by, so that the time of a lookup tells nothing of its value."""
    return hashlib.sha256(value.encode(errors="surrogateescape")).digest()

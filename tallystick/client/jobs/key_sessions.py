"""Session keys with providers: HPKE's curve arithmetic, the dearest step of a small job, once a minute instead of once a job.

A content key is wrapped with the session key of its provider. Session keys exist in memory alone, and for SESSION_SECONDS at
most: what leaks of this process later opens no older job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from tallystick.protocol.messages import Ask
from tallystick.protocol.sealing import ContentKey, KeySession
from tallystick.protocol.types import Address, Hash, JobId

SESSION_SECONDS: Final = 60
MAX_SESSIONS: Final = 1_024
"""Sessions of one client. A further one takes the place of the oldest."""

CallLater = Callable[[float, Callable[[], None]], object]


class KeySessions:
    """The sessions of one client, by sealing key. `random`: the source of random bytes.

    `call_later`: calls a function after some seconds; None for the running event loop's.
    """

    def __init__(self, random: Callable[[int], bytes], call_later: CallLater | None = None) -> None:
        self._random, self._call_later = random, call_later
        self._sessions: dict[tuple[str, bytes], KeySession] = {}

    def wrap(self, key: ContentKey, ask: Ask, *, job: JobId, order_hash: Hash, provider: Address) -> bytes:
        """Wraps a content key for the provider of an ask. Raises BadSeal if the ask's sealing key is unusable."""
        name = (ask.sealing_suite, ask.sealing_key)
        session = self._sessions.get(name) or self._open(name)
        return session.wrap(key, job=job, order_hash=order_hash, provider=provider)

    def _open(self, name: tuple[str, bytes]) -> KeySession:
        session = KeySession(*name, self._random)
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[name] = session
        call_later = self._call_later or asyncio.get_running_loop().call_later
        call_later(SESSION_SECONDS, lambda: self._forget(name, session))
        return session

    def _forget(self, name: tuple[str, bytes], session: KeySession) -> None:
        if self._sessions.get(name) is session:
            del self._sessions[name]

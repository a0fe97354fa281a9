"""Session keys: one a provider and minute, forgotten in time, and never shared between providers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from tallystick.client.jobs import key_sessions
from tallystick.client.jobs.key_sessions import SESSION_SECONDS, KeySessions
from tallystick.protocol.errors import BadSeal
from tallystick.protocol.messages import Ask
from tallystick.protocol.sealing import ContentKey
from tallystick.protocol.types import Hash, JobId
from tests.client.parties import ALICE, BOB, Provider

JOB, ORDER = JobId(bytes(16)), Hash(bytes(32))
KEY = ContentKey(bytes(range(32)))
WRAP_BYTES = 48
"""Of a wrapped key, those that are of its job."""


class Timers:
    """Keeps what is to be called later."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """See asyncio's loop."""
        self.pending.append((seconds, callback))


def wrap(sessions: KeySessions, provider: Provider, ask: Ask | None = None) -> bytes:
    """Wraps the key for a provider, and checks that it opens there."""
    wrapped = sessions.wrap(KEY, ask or provider.ask.message, job=JOB, order_hash=ORDER, provider=provider.address)
    assert provider.sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=provider.address) == KEY
    return wrapped[:-WRAP_BYTES]


def test_a_session_is_shared_until_its_minute_is_over() -> None:
    """Jobs for one provider share a session, jobs for another do not, and after a minute there is a new one."""
    timers = Timers()
    sessions = KeySessions(os.urandom, timers.call_later)
    alice, bob = wrap(sessions, ALICE), wrap(sessions, BOB)
    assert alice != bob
    assert (wrap(sessions, ALICE), wrap(sessions, BOB)) == (alice, bob)
    assert [seconds for seconds, _ in timers.pending] == [SESSION_SECONDS] * 2
    timers.pending[0][1]()
    assert wrap(sessions, BOB) == bob
    later = wrap(sessions, ALICE)
    assert later != alice
    timers.pending[0][1]()  # of the session before
    assert wrap(sessions, ALICE) == later


def test_sessions_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further session takes the place of the oldest."""
    monkeypatch.setattr(key_sessions, "MAX_SESSIONS", 1)
    timers = Timers()
    sessions = KeySessions(os.urandom, timers.call_later)
    alice, bob = wrap(sessions, ALICE), wrap(sessions, BOB)
    assert wrap(sessions, BOB) == bob
    assert wrap(sessions, ALICE) != alice
    assert wrap(sessions, BOB) != bob
    for _, forget in timers.pending:
        forget()


def test_an_unusable_sealing_key_begins_no_session() -> None:
    """Each attempt is refused, and nothing is to be forgotten later."""
    timers = Timers()
    sessions = KeySessions(os.urandom, timers.call_later)
    for _ in range(2):
        with pytest.raises(BadSeal, match="sealingKey"):
            wrap(sessions, ALICE, replace(ALICE.ask.message, sealing_key=bytes(32)))
    assert not timers.pending


async def test_a_running_loop_forgets_sessions() -> None:
    """Without a timer of its own, a client uses its event loop's."""
    sessions = KeySessions(os.urandom)
    assert wrap(sessions, ALICE) == wrap(sessions, ALICE)

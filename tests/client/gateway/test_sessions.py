"""Sessions of browsers: short, few, and found by their secret alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.client.gateway.sessions import COOKIE, MAX_SESSIONS, SESSION_SECONDS, Sessions


def test_a_session() -> None:
    """It is open until its time is over, among other cookies too."""
    now = 0.0
    sessions = Sessions(lambda: now)
    value = sessions.open()
    for cookies in (f"{COOKIE}={value}", f"a=b; {COOKIE}={value}; c=d"):
        assert sessions.is_open(cookies)
    now = SESSION_SECONDS
    assert not sessions.is_open(f"{COOKIE}={value}")


@pytest.mark.parametrize("cookies", ["", COOKIE, f"{COOKIE}=", f"{COOKIE}=x", "other=y", f"{COOKIE}=" + "x" * 10_000, "\udcff=1"])
def test_other_cookies(cookies: str) -> None:
    """Nothing else is a session, and nothing raises."""
    sessions = Sessions(lambda: 0.0)
    sessions.open()
    assert not sessions.is_open(cookies)


@given(st.text())
def test_any_header(cookies: str) -> None:
    """Whatever a browser or a stranger sends."""
    sessions = Sessions(lambda: 0.0)
    sessions.open()
    assert not sessions.is_open(cookies)


def test_their_number_is_bounded() -> None:
    """The oldest ends first."""
    sessions = Sessions(lambda: 0.0)
    values = [sessions.open() for _ in range(MAX_SESSIONS + 1)]
    assert not sessions.is_open(f"{COOKIE}={values[0]}")
    assert all(sessions.is_open(f"{COOKIE}={value}") for value in values[1:])

"""The form in which clients and nodes see a coordinator's own errors."""

from __future__ import annotations

from coordinator.domain.peer_errors import error_for_peers
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable


def test_a_failed_database_is_an_unavailable_coordinator() -> None:
    """Peers see the coordinator's code, its fault and the reason, and may try again."""
    shown = error_for_peers(Unavailable(Code.DATABASE_UNAVAILABLE, "the database is closed"))
    assert (shown.code, shown.fault, shown.retry) == (Code.COORDINATOR_UNAVAILABLE, Fault.COORDINATOR, True)
    assert (shown.status, str(shown)) == (503, "the database is closed")


def test_other_errors_are_shown_as_they_are() -> None:
    """Every other error keeps its code, its fault and its class."""
    for error in (Refusal(Code.UNSECURED, "poor"), Unavailable(Code.NODE_GONE, "gone", fault=Fault.PROVIDER)):
        assert error_for_peers(error) is error

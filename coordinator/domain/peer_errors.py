"""The form in which a coordinator shows its own errors to clients and nodes. Pure."""

from __future__ import annotations

from tallystick.protocol.errors import Code, Fault, TallyError, Unavailable


def error_for_peers(error: TallyError) -> TallyError:
    """The error, with a failure of this coordinator's own database reported as an unavailable coordinator, at its fault.

    A peer would otherwise take `database_unavailable` for a failure of a database of its own.
    """
    if error.code is Code.DATABASE_UNAVAILABLE:
        return Unavailable(Code.COORDINATOR_UNAVAILABLE, str(error), fault=Fault.COORDINATOR)
    return error

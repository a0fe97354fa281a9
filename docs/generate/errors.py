"""The table of error codes, from `Code` and `PUBLIC`, with the advice that the code does not hold."""

from __future__ import annotations

from docs.generate.markdown import code, table
from tallystick.protocol.errors import PUBLIC, Code

FINAL, RETRY, DEPENDS = "no", "yes", "if `retry` says so"
ADVICE: dict[str, tuple[str, str, str, str]] = {
    # code: (meaning, usual fault, retry, what to do)
    "bad_message": (
        "A message does not parse, or a member has the wrong type or range.",
        "sender",
        FINAL,
        "Correct the member that the message names.",
    ),
}
"""Keyed by code. `pages` fails if a code is missing here or unknown there."""


def pages() -> dict[str, str]:
    """The page of error codes."""
    return {
        "errors.md": "# Error codes\n\n"
        + table(("code", "status", "type"), ((code(c.value), str(PUBLIC[c].status), code(PUBLIC[c].type)) for c in Code))
    }

"""The console script: picks the sub-commands to load, and turns errors into exit codes.

A process that becomes a daemon loads its own command alone: the others would take 5 MiB for as long as it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from tallystick.protocol.errors import BadMessage, TallyError

_DAEMONS = (("gateway",), ("node", "run"), ("coordinator", "run"))


def _app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command with those sub-commands that these arguments may name. Where they name a daemon, it is the only one."""
    if any(tuple(arguments[: len(names)]) == names for names in _DAEMONS):
        from tallystick.cli.daemons import daemon_app

        return daemon_app()
    from tallystick.cli.commands import app

    return app


def main() -> None:
    """The console script: a TallyError, or a file that cannot be used, becomes one message (JSON with --json) and exit code 1."""
    try:
        _app_for(sys.argv[1:])()
    except TallyError as error:
        _exit_with(error)
    except OSError as error:
        if error.filename is None:  # no file of the user
            raise
        _exit_with(BadMessage(f"{error.filename}: {error.strerror}"))


def _exit_with(error: TallyError) -> None:
    from tallystick.cli.output import exit_with_error

    exit_with_error(error, as_json="--json" in sys.argv)

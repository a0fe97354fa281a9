"""The console script: picks the sub-commands to load, and turns errors into exit codes.

A process that becomes a daemon loads its own command alone: the others would take 5 MiB for as long as it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from tallystick import __version__
from tallystick.protocol.errors import BadMessage, TallyError

_DAEMONS = (("gateway",), ("node", "run"), ("coordinator", "run"))


def new_app() -> typer.Typer:
    """Returns the root command, which has no sub-commands yet."""
    app = typer.Typer(
        name="tally",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Tallystick, a decentralised marketplace for inference jobs. **First steps:** `tally start` sets up everything for "
        "a first paid answer; `tally demo` runs a whole market on this machine; `tally gateway` serves an OpenAI-compatible API; "
        "`tally node run` sells the capacity of your engine.",
    )
    app.callback()(_root)
    return app


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(  # noqa: ARG001 - its callback prints it
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """See the help of the application."""
    from tallystick.runtime.optional_import import without_module

    with without_module("pygments"):  # by which structlog would colour tracebacks: 4 MiB, and the slowest of all imports
        from tallystick.runtime.logs import configure_quiet

    configure_quiet()


def _app_for(arguments: Sequence[str]) -> typer.Typer:
    """The command with those sub-commands that these arguments may name. Where they name a daemon, it is the only one."""
    if any(tuple(arguments[: len(names)]) == names for names in _DAEMONS):
        from tallystick.cli.daemons import daemon_app

        return daemon_app()
    from tallystick.cli.main import app

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

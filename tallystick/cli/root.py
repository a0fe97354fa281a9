"""The root of the `tally` command, without its sub-commands."""

from __future__ import annotations

import typer

from tallystick import __version__


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

    # With both, structlog would colour tracebacks: 6 MiB, and the slowest imports. Commands that print have loaded rich already.
    with without_module("rich"), without_module("pygments"):
        from tallystick.runtime.logs import configure_quiet

    configure_quiet()

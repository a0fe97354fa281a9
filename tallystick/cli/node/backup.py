"""`tally node backup` and `tally node restore`: copy a node's state, and put a copy in place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.options import Config, Json
from tallystick.cli.output import show_json, step
from tallystick.cli.progress import activity


def backup(
    file: Annotated[Path, typer.Argument(help="File to write, with mode 0600.")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Copy the node's state to a file, also while the node runs.

    The copy has receipts, orders, tabs and the key that opens requests, but not the wallet.
    """
    from node.service.config import load_config
    from node.storage.backup import back_up

    with activity("copying the state"):
        summary = back_up(load_config(config).state, file)
    if as_json:
        show_json({"file": str(file)} | summary)
    else:
        text = f"{file}: {summary['receipts']} receipts of provider {summary['provider']}"
        step(f"{text}; keep it secret, and keep a copy of the wallet elsewhere")


def restore(
    file: Annotated[Path, typer.Argument(help="File that `tally node backup` wrote.")],
    config: Config = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing state, which is moved aside.")] = False,
    as_json: Json = False,
) -> None:
    """Put a backup of the node's state in place.

    Before the node serves jobs again, it asks its coordinators for what it has signed since the backup.
    """
    from node.service.config import load_config
    from node.storage.backup import restore as restore_state

    state = load_config(config).state
    with activity("putting the state in place"):
        summary = restore_state(file, state, force=force)
    if as_json:
        show_json({"state": str(state)} | summary)
    else:
        step(f"{state}: {summary['receipts']} receipts of provider {summary['provider']}; next: tally node run")

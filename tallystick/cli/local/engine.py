"""`tally engine`: runs a small real model on this machine, to try the market without an engine of one's own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.local.embedded_engine import install_embedded_engine
from tallystick.cli.output import err


def engine(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    folder: Annotated[Path | None, typer.Option(hidden=True, help="Folder in which the engine is installed.")] = None,
) -> None:
    """Run SmolLM2-135M-Instruct with llama.cpp, as an OpenAI-compatible engine at http://127.0.0.1:8080/v1.

    The first run downloads 127 MB. `tally node init` finds the engine while it runs.
    """
    from node.engines.embedded import MODEL, server_command

    command = server_command(folder or install_embedded_engine(), host, port)
    err.print(f"serving {MODEL} at http://{host}:{port}/v1 (Ctrl-C stops it)")
    os.execv(command[0], command)  # noqa: S606 - this process becomes the server, which then gets its signals

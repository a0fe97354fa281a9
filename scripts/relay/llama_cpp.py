"""Starts real engines for measurements: llama.cpp's server with the embedded model, as `tally engine` serves it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from node.engines.embedded import INSTALL_BYTES, MODEL, MODEL_FILE, embedded_folder, install, is_installed, server_command
from node.engines.embedded_server import CONTEXT_TOKENS, SLOTS
from scripts.peers import BUILD
from scripts.relay import processes
from tallystick.cli.local.processes import free_port
from tallystick.cli.output import note
from tallystick.cli.progress import Unit, activity
from tallystick.protocol.errors import Unavailable

__all__ = ["CONTEXT_TOKENS", "MODEL", "MODEL_FILE", "SLOTS", "install_engine", "server"]


def install_engine() -> Path | None:
    """Returns the folder of the engine, which is filled on the first call. Returns None, with the reason on stderr, if the
    installation fails.
    """
    folder = embedded_folder(BUILD)
    if not is_installed(folder):
        note(f"installing llama.cpp and {MODEL} into {folder} (once) …")
        try:
            with activity("downloading", INSTALL_BYTES, Unit.BYTES) as shown:
                install(folder, lambda size: shown.update(done=min(size, INSTALL_BYTES)))
        except Unavailable as error:
            note(str(error))
            return None
    return folder


@contextlib.asynccontextmanager
async def server(folder: Path, log: Path, core: int | None = None, model_file: Path | None = None) -> AsyncIterator[str]:
    """Runs one server with SLOTS slots; yields its base URL. `core`: the one that it runs on, with one thread; None for any.

    `model_file`: another file that is served under the model's name.
    """
    port = free_port(0)
    with log.open("ab") as output, _on_core(core):
        process = await asyncio.create_subprocess_exec(
            *server_command(folder, "127.0.0.1", port, model_file), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        url = f"http://127.0.0.1:{port}"
        await processes.until_answers(f"{url}/v1/models", process)
        yield url
    finally:
        await processes.stop(process)


@contextlib.contextmanager
def _on_core(core: int | None) -> Iterator[None]:
    """Pins this process for the time of the block: its children inherit that from their first moment on."""
    if core is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

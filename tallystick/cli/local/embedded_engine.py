"""Installs the embedded engine once per user, with a progress bar."""

from __future__ import annotations

from pathlib import Path

from tallystick.cli.output import step
from tallystick.cli.progress import Unit, activity
from tallystick.runtime.config import home


def install_embedded_engine() -> Path:
    """Downloads llama.cpp's server and its model unless they are installed. Returns their folder.

    Raises Unavailable if the download fails, or if the model's file was modified.
    """
    from node.engines.embedded import INSTALL_BYTES, MODEL, embedded_folder, install, is_installed, verify_model

    folder = embedded_folder(home())
    if is_installed(folder):
        verify_model(folder)
        return folder
    with activity(f"installing llama.cpp and {MODEL} (once)", INSTALL_BYTES, Unit.BYTES) as shown:
        install(folder, lambda size: shown.update(done=min(size, INSTALL_BYTES)))
    step(f"installed llama.cpp and {MODEL} into {folder}")
    return folder

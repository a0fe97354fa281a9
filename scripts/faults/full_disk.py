"""A small file system in memory, which can be filled. Mounting one needs Linux and its rights, such as those of root."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

_BALLAST = "ballast"
_BLOCK = bytes(1 << 16)


class NoSmallDisk(Exception):
    """A file system cannot be mounted here. The text says why."""


class SmallDisk:
    """A tmpfs on an empty folder."""

    def __init__(self, folder: Path, mib: int) -> None:
        """Raises NoSmallDisk."""
        self._folder = folder
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tallystick-chaos", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise NoSmallDisk(f"{command[0]}: {error.strerror}") from None
        if done.returncode:
            raise NoSmallDisk(done.stderr.strip())

    def fill(self) -> None:
        """Takes all space that is left."""
        with contextlib.suppress(OSError), (self._folder / _BALLAST).open("ab", buffering=0) as ballast:
            while ballast.write(_BLOCK):
                pass

    def empty(self) -> None:
        """Gives the space back."""
        (self._folder / _BALLAST).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts it. The folder keeps its files."""
        kept = self._folder.with_name(f"{self._folder.name}.kept")
        self.empty()
        shutil.copytree(self._folder, kept)
        subprocess.run(["umount", "--lazy", str(self._folder)], capture_output=True, check=False)
        shutil.copytree(kept, self._folder, dirs_exist_ok=True)
        shutil.rmtree(kept)

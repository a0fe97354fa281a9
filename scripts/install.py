"""Installs the pinned dependencies and the project into .venv, and shows how far that is. Called by scripts/_env; needs pip only.

On a terminal it draws one bar; elsewhere it prints a line for each quarter. pip's whole output is in .venv/install.log, and its
end is shown if pip fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TextIO

ENVIRONMENT = Path(".venv")
LOG = ENVIRONMENT / "install.log"
CONSTRAINTS = Path("constraints.txt")
POLL_SECONDS = 0.2
SHOWN_ERROR_LINES = 40
_PIN = re.compile(r"^[A-Za-z0-9][^ ;]*==", re.MULTILINE)
_FETCHED = re.compile(r"(?:Collecting |Processing (?:\S*/)?|Requirement already satisfied: )([A-Za-z0-9._-]+?)(?:==|-\d|[ <>(])")
_NOISE = re.compile(r"WARNING: (Location|Running pip as)|Looking in |DEPRECATION")


class Progress:
    """How many of `total` packages were fetched and installed. Each counts one step for either."""

    def __init__(self, total: int, out: TextIO) -> None:
        self.total, self._out = max(total, 1), out
        self.fetched = self.installed = 0
        self.name = ""
        self._quarter = 0

    def read(self, line: str) -> None:
        """Reads one line of pip's output."""
        if line.startswith("Ignoring "):  # a marker: the package is for other systems
            self.total = max(self.total - 1, 1)
        elif line.startswith("Installing collected packages"):
            self.fetched, self.name = self.total, "installing"
        elif match := _FETCHED.match(line):
            self.fetched, self.name = min(self.fetched + 1, self.total), match[1]

    def show(self) -> None:
        """Draws the bar anew, or prints a line if another quarter is done."""
        share = min((self.fetched + self.installed) / (2 * self.total), 1.0)
        if self._out.isatty():
            width = max(min(shutil.get_terminal_size().columns - 48, 40), 8)
            bar = ("#" * int(share * width)).ljust(width, ".")
            self._out.write(f"\r[{bar}] {share:4.0%} {self.name[:30]:30}")
        elif int(share * 4) > self._quarter:
            self._quarter = int(share * 4)
            self._out.write(
                f"  {self._quarter * 25}% ({self.fetched} of {self.total} packages fetched, {self.installed} installed)\n"
            )
        self._out.flush()

    def end(self) -> None:
        """Removes the bar."""
        if self._out.isatty():
            self._out.write("\r\033[K")


def main() -> int:
    """Installs; returns pip's exit status."""
    began = time.monotonic()
    print("Installing the pinned dependencies into .venv (once; a minute or two) ...", file=sys.stderr)
    progress = Progress(len(_PIN.findall(CONSTRAINTS.read_text())), sys.stderr)
    with LOG.open("w") as log:
        status = run_pip(log, progress, "--require-hashes", "--requirement", str(CONSTRAINTS))
        status = status or run_pip(log, progress, "--no-deps", "--no-build-isolation", "--editable", ".")
    progress.end()
    if status:
        lines = deque((line for line in LOG.read_text().splitlines() if not _NOISE.match(line)), SHOWN_ERROR_LINES)
        print(*lines, f"pip failed; its whole output is in {LOG}", sep="\n", file=sys.stderr)
    else:
        print(f"Installed {count_installed()} packages in {time.monotonic() - began:.0f} s.", file=sys.stderr)
    return status


def run_pip(log: TextIO, progress: Progress, *arguments: str) -> int:
    """Runs pip install, outside the environment, so that systems without ensurepip work too."""
    options = ("--disable-pip-version-check", "install", "--progress-bar", "off", "--no-input")
    command = [sys.executable, "-m", "pip", "--python", str(ENVIRONMENT / "bin/python"), *options, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        if pip.stdout is None:
            raise RuntimeError("pip has no output")
        reader = threading.Thread(target=_read, args=(pip.stdout, log, progress))
        reader.start()
        while reader.is_alive():
            reader.join(POLL_SECONDS)
            if progress.fetched == progress.total:
                progress.installed = min(count_installed(), progress.total)
            progress.show()
        return pip.wait()


def _read(output: TextIO, log: TextIO, progress: Progress) -> None:
    for line in output:
        log.write(line)
        progress.read(line.strip())


def count_installed() -> int:
    """Packages in the environment."""
    return sum(1 for _ in ENVIRONMENT.glob("lib/python3*/site-packages/*.dist-info"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""A PostgreSQL server of its own in a folder, from Debian's package `postgresql`, or from the folder that POSTGRES_BIN names."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path

from scripts.faults.supervisor import Supervised

_USER = "tally"


class NoPostgres(Exception):
    """PostgreSQL cannot be had on this machine. The text says why."""


def create_server(folder: Path, port: int, log: Path) -> Supervised:
    """Creates a database in an empty folder and returns the server, which is not started yet. Raises NoPostgres."""
    programs = _programs()
    account = ""
    if os.getuid() == 0:  # the server refuses to run as root
        account = "postgres"
        try:
            pwd.getpwnam(account)
        except KeyError:
            raise NoPostgres("as root it needs a user named postgres (useradd postgres)") from None
    if account:
        shutil.chown(folder, account, account)
    data = folder / "data"
    command = [str(programs / "initdb"), "--pgdata", str(data), "--auth", "trust", "--username", _USER, "--no-sync"]
    identity = {"user": account, "group": account, "extra_groups": []} if account else {}
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, **identity)  # type: ignore[call-overload]
    if made.returncode:
        raise NoPostgres(f"initdb failed: {made.stderr.strip()[-300:]}")
    options = ("-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F")
    server = (str(programs / "postgres"), "-D", str(data), *options)
    return Supervised("postgres", server, log, user=account, stop_signal=signal.SIGQUIT)


def url(port: int) -> str:
    """The database's URL, as the coordinator's `db` takes it."""
    return f"postgresql+asyncpg://{_USER}@127.0.0.1:{port}/postgres"


def _programs() -> Path:
    named = os.environ.get("POSTGRES_BIN")
    folders = [Path(named)] if named else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").is_file():
            return folder
    raise NoPostgres("it needs Debian's package postgresql (apt-get install postgresql), or POSTGRES_BIN")

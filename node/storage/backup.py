"""Backup and restore of a node's state: receipts, orders, tabs and the key that opens requests. The wallet is not part of it.

A backup lacks what the node signed after it was made. A restored state therefore forgets that its coordinators have answered, so
that state recovery asks them again before the node signs anything (`node.coordinator.state_recovery`).
"""

from __future__ import annotations

import fcntl
import io
import json
import sqlite3
import tarfile
import tempfile
import time
from contextlib import closing
from pathlib import Path

from node.storage.state_folder import LOCK
from tallystick.protocol.errors import BadMessage
from tallystick.runtime.keystore import write_private

DATABASE, ABOUT = "node.db", "about.json"
FORMAT = 1
_MAX_BYTES = 1 << 36


def back_up(state: Path, file: Path) -> dict[str, str | int]:
    """Writes a backup of a running or stopped node, readable by its owner only; returns its description. Raises BadMessage if
    there is no state or `file` exists.
    """
    if file.exists():
        raise BadMessage(f"{file} already exists; choose another file")
    if not (state / DATABASE).exists():
        raise BadMessage(f"{state}: expected the state of a node, found no {DATABASE}")
    with tempfile.TemporaryDirectory(dir=state) as folder:
        copy = Path(folder) / DATABASE
        with closing(sqlite3.connect(state / DATABASE)) as live, closing(sqlite3.connect(copy)) as copied:
            live.backup(copied)
            about = _about(copied)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(copy, DATABASE)
            for key in sorted(state.glob("sealing-*.key")):
                archive.add(key, key.name)
            description = json.dumps(about).encode()
            entry = tarfile.TarInfo(ABOUT)
            entry.size, entry.mtime = len(description), int(time.time())
            archive.addfile(entry, io.BytesIO(description))
    write_private(file, packed.getvalue(), replace=False)
    return about


def restore(file: Path, state: Path, *, force: bool = False) -> dict[str, str | int]:
    """Restores a backup into `state`; returns its description. With `force`, an existing state is moved aside.

    Raises BadMessage if `file` is not a backup, if a state exists, or while a node runs on it.
    """
    try:
        with tarfile.open(file, mode="r:gz") as archive:
            files = {entry.name: _content(archive, entry) for entry in archive}
        about = json.loads(files.pop(ABOUT))
    except (OSError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        raise BadMessage(f"{file}: expected a backup of a node ({error})") from None
    keys = {name: data for name, data in files.items() if name.startswith("sealing-") and name.endswith(".key")}
    if about.get("format") != FORMAT or set(files) != {DATABASE, *keys} or any("/" in name for name in files):
        raise BadMessage(f"{file}: expected a backup of a node in format {FORMAT}")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadMessage(f"{state}: a node is running on this state; stop it first") from None
        if (state / DATABASE).exists():
            if not force:
                raise BadMessage(f"{state} already has a state; use --force to move it aside and restore the backup")
            aside = state / f"aside-{time.time_ns()}"
            aside.mkdir(mode=0o700)
            for former in (*state.glob("node.db*"), *state.glob("sealing-*.key")):
                former.rename(aside / former.name)
        for name, data in keys.items():
            write_private(state / name, data)
        write_private(state / DATABASE, files[DATABASE])
        with closing(sqlite3.connect(state / DATABASE)) as put, put:
            put.execute("DELETE FROM completed_recoveries")
    return dict(about)


def _about(copy: sqlite3.Connection) -> dict[str, str | int]:
    (provider, chain, contract) = copy.execute("SELECT provider, chain_id, contract FROM identity").fetchone()
    (receipts,) = copy.execute("SELECT count(*) FROM receipts").fetchone()
    description = {"format": FORMAT, "made_at": int(time.time()), "provider": provider, "chain_id": chain, "contract": contract}
    return description | {"receipts": receipts}


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """Returns a plain file's bytes. An archive entry is never extracted under its own name."""
    source = archive.extractfile(entry) if entry.isreg() and entry.size <= _MAX_BYTES else None
    if source is None:
        raise ValueError(f"{entry.name}: expected a plain file of at most {_MAX_BYTES} bytes")
    return source.read()

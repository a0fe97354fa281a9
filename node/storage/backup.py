"""A copy of a node's state, taken while it works, and put back: receipts, orders, tabs and the key that opens requests.

The wallet is not in it. What the node signed after the copy was taken is missing from it: a restored state forgets that its
coordinators have answered before, so that the node asks them again (recall.py) before it signs anything.
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

from tallystick.protocol.errors import BadMessage
from tallystick.runtime.keystore import write_private

DATABASE, ABOUT = "node.db", "about.json"
FORMAT = 1
_MAX_BYTES = 1 << 36


def back_up(state: Path, file: Path) -> dict[str, str | int]:
    """Writes a copy, its owner's alone; returns what it is of. Raises BadMessage without a state, or with a file in the way."""
    if file.exists():
        raise BadMessage(f"{file} exists; name another file")
    if not (state / DATABASE).exists():
        raise BadMessage(f"no node has worked on {state} yet")
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
            told = json.dumps(about).encode()
            entry = tarfile.TarInfo(ABOUT)
            entry.size, entry.mtime = len(told), int(time.time())
            archive.addfile(entry, io.BytesIO(told))
    write_private(file, packed.getvalue(), replace=False)
    return about


def restore(file: Path, state: Path, *, force: bool = False) -> dict[str, str | int]:
    """Puts a copy into `state`; returns what it is of. With `force`, a state that is there is kept aside.

    Raises BadMessage for what is no backup, where a state is there, or while a node works on it.
    """
    try:
        with tarfile.open(file, mode="r:gz") as archive:
            found = {entry.name: _content(archive, entry) for entry in archive}
        about = json.loads(found.pop(ABOUT))
    except (OSError, tarfile.TarError, ValueError, KeyError, EOFError) as error:
        raise BadMessage(f"{file}: not a backup of a node ({error})") from None
    keys = {name: data for name, data in found.items() if name.startswith("sealing-") and name.endswith(".key")}
    if about.get("format") != FORMAT or set(found) != {DATABASE, *keys} or any("/" in name for name in found):
        raise BadMessage(f"{file}: not a backup of a node, or one of another version")
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadMessage(f"{state}: a node is running on this state; stop it first") from None
        if (state / DATABASE).exists():
            if not force:
                raise BadMessage(f"{state} has a state already; --force keeps it aside and puts the backup in its place")
            aside = state / f"aside-{time.time_ns()}"
            aside.mkdir(mode=0o700)
            for former in (*state.glob("node.db*"), *state.glob("sealing-*.key")):
                former.rename(aside / former.name)
        for name, data in keys.items():
            write_private(state / name, data)
        write_private(state / DATABASE, found[DATABASE])
        with closing(sqlite3.connect(state / DATABASE)) as put, put:
            put.execute("DELETE FROM completed_recoveries")
    return dict(about)


def _about(copy: sqlite3.Connection) -> dict[str, str | int]:
    (provider, chain, contract) = copy.execute("SELECT provider, chain_id, contract FROM identity").fetchone()
    (receipts,) = copy.execute("SELECT count(*) FROM receipts").fetchone()
    told = {"format": FORMAT, "made_at": int(time.time()), "provider": provider, "chain_id": chain, "contract": contract}
    return told | {"receipts": receipts}


def _content(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    """A plain file's bytes; nothing in an archive is ever unpacked by its own name."""
    source = archive.extractfile(entry) if entry.isreg() and entry.size <= _MAX_BYTES else None
    if source is None:
        raise ValueError(f"{entry.name}: not a plain file")
    return source.read()

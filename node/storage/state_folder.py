"""A node's state folder: whose it is, which config it belongs to, and whether a node runs on it now.

Two nodes on one state, or with one wallet, would sign one receipt number twice, which costs the stake.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tallystick.protocol.errors import BadMessage

LOCK, OWNER, DATABASE = "lock", "owner.json", "node.db"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class StateFolder:
    """What is known of a state folder. `provider` and `contract` are None if no node has run on it and none was set up for it.

    `config`: the config file that it belongs to, if that is known; `running`: the process of the node that runs on it, 0 if it
    is unknown which process that is, None if none runs.
    """

    path: Path
    provider: str | None = None
    contract: str | None = None
    config: Path | None = None
    running: int | None = None

    @property
    def used(self) -> bool:
        """Whether the folder is a node's already."""
        return self.provider is not None or self.config is not None or self.running is not None


def inspect_state(path: Path) -> StateFolder:
    """Reads what is known of a folder; changes nothing in it."""
    owner, held = _read_json(path / OWNER), _read_json(path / LOCK)
    running = _holder(path / LOCK, held)
    provider, contract = _identity(path / DATABASE)
    described = held if running is not None else owner
    config = described.get("config")
    return StateFolder(
        path,
        provider or _text(described.get("provider")),
        contract,
        Path(config) if isinstance(config, str) else None,
        running,
    )


def claim_state(path: Path, provider: str, config: Path) -> None:
    """Notes that a folder is for the node of this wallet and config, before that node runs for the first time."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    (path / OWNER).write_text(json.dumps({"provider": provider, "config": str(config.absolute())}) + "\n")


def lock_state(path: Path, provider: str, config: Path | None) -> IO[str]:
    """Locks a folder for this process until the returned file is closed. Raises BadMessage if another node runs on it."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (path / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise BadMessage(
            f"{path}: {describe_running(inspect_state(path))}; stop it first, or give this node a `state` and a wallet of its "
            "own: tally node init writes such a config"
        ) from None
    file.truncate(0)
    content = {"pid": os.getpid(), "provider": provider, "config": None if config is None else str(config.absolute())}
    file.write(json.dumps(content) + "\n")
    file.flush()
    return file


def describe_running(state: StateFolder) -> str:
    """The node that runs on a state, in words."""
    process = f" (process {state.running})" if state.running else ""
    wallet = f" with the wallet {state.provider}" if state.provider else ""
    config = f" and the config {state.config}" if state.config else ""
    return f"another node is running on this state{process}{wallet}{config}"


def find_states(folders: Iterable[Path]) -> list[StateFolder]:
    """The folders among these that are a node's."""
    return [state for folder in folders if folder.is_dir() and (state := inspect_state(folder)).used]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _holder(path: Path, held: dict[str, Any]) -> int | None:
    """The process that holds a lock; 0 if it does not say which; None if nobody holds it."""
    try:
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                pid = held.get("pid")
                return pid if isinstance(pid, int) else 0
    except OSError:
        return None
    return None


def _identity(path: Path) -> tuple[str | None, str | None]:
    """Provider and contract of a node's database."""
    if not path.exists():
        return None, None
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        row = database.execute("SELECT provider, contract FROM identity").fetchone()
        if row is not None:
            return _text(row[0]), _text(row[1])
    return None, None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None

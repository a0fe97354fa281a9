"""Folders with limits: which files stay."""

from __future__ import annotations

import os
from pathlib import Path

from tallystick.client.receipts.file_store import FileStore


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_the_oldest_files_go_first(tmp_path: Path) -> None:
    """Beyond the bytes or the number of files, the oldest are deleted; a file that is written again is new."""
    store = FileStore(tmp_path, 25, "[a-z]")
    for name in ("a", "b", "a", "c"):
        await store.put(name, bytes(10))
    assert _names(tmp_path) == {"a", "c"}
    counted = FileStore(tmp_path, 1_000, "[a-z]", count=2)
    await counted.put("d", bytes(10))
    assert len(_names(tmp_path)) == 2
    assert "d" in _names(tmp_path)


async def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    """It is not written, replaces the file of its name, and leaves the others alone."""
    store = FileStore(tmp_path, 20, "[a-z]")
    await store.put("a", bytes(5))
    await store.put("b", bytes(5))
    await store.put("b", bytes(21))
    assert _names(tmp_path) == {"a"}
    await store.put("c", bytes(15))
    assert _names(tmp_path) == {"a", "c"}


async def test_old_files_are_deleted(tmp_path: Path) -> None:
    """Files from before the given time go with the next write, also those of an earlier process; other names stay."""
    for name, age in (("a", 100), ("b", 10), ("README", 100)):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (1_000_000_000 - age, 1_000_000_000 - age))
    store = FileStore(tmp_path, 1_000, "[a-z]", oldest=lambda: 1_000_000_000 - 50)
    await store.put("c", b"x")
    assert _names(tmp_path) == {"b", "c", "README"}


async def test_delete(tmp_path: Path) -> None:
    """A deleted file leaves room; deleting what is not there does nothing."""
    store = FileStore(tmp_path, 20, "[a-z]")
    await store.put("a", bytes(10))
    await store.delete("a")
    await store.delete("z")
    await store.put("b", bytes(10))
    await store.put("c", bytes(10))
    assert _names(tmp_path) == {"b", "c"}

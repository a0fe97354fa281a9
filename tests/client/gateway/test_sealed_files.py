"""Encrypted files: who can read them, and for how long."""

from __future__ import annotations

from pathlib import Path

from tallystick.client.gateway.sealed_files import SealedFiles
from tallystick.protocol.eip712 import Signer
from tests.client.parties import signer


def _files(path: Path, wallet: Signer, purpose: bytes = b"test", now: float = 0.0) -> SealedFiles:
    return SealedFiles(path, wallet, purpose, limit=1_000, seconds=100, now=lambda: now)


async def test_only_the_wallet_reads_them(tmp_path: Path) -> None:
    """Another wallet, another purpose and another name get nothing, and cannot even name the file."""
    ann, bob = signer("ann"), signer("bob")
    files = _files(tmp_path, ann)
    name = files.name(b"identity")
    await files.put(name, b"content")
    assert await _files(tmp_path, ann).get(name) == b"content"
    assert b"content" not in (tmp_path / name).read_bytes()
    for other in (_files(tmp_path, bob), _files(tmp_path, ann, b"other")):
        assert other.name(b"identity") != name
        assert await other.get(name) is None
    moved = files.name(b"moved")
    (tmp_path / name).rename(tmp_path / moved)
    assert await files.get(moved) is None


async def test_damaged_old_and_deleted_files(tmp_path: Path) -> None:
    """None of them is read."""
    files = _files(tmp_path, signer("ann"))
    name = files.name(b"identity")
    await files.put(name, b"content")
    written = (tmp_path / name).stat().st_mtime
    assert await _files(tmp_path, signer("ann"), now=written + 99).get(name) == b"content"
    assert await _files(tmp_path, signer("ann"), now=written + 101).get(name) is None
    sealed = (tmp_path / name).read_bytes()
    for damaged in (b"", sealed[:11], sealed[:-1], sealed[:-1] + bytes([sealed[-1] ^ 1])):
        (tmp_path / name).write_bytes(damaged)
        assert await files.get(name) is None
    await files.put(name, b"content")
    await files.delete(name)
    assert await files.get(name) is None

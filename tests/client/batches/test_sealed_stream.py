"""Sealed files: what they give back, and what they refuse."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tallystick.client.batches.sealed_stream import BLOCK_BYTES, SealedReader, SealedWriter
from tallystick.protocol.errors import Unavailable

KEY = b"k" * 32


def write(path: Path, content: bytes, piece: int = 10_000) -> None:
    """Writes a file in pieces."""
    with SealedWriter(path, KEY) as writer:
        for at in range(0, len(content), piece):
            writer.write(content[at : at + piece])
        writer.commit()
        assert writer.size == len(content)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES + 77])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    """Whole and in parts, across blocks; the disk has neither the content nor a file that others can read."""
    content = os.urandom(size)
    write(tmp_path / "file", content)
    assert (tmp_path / "file").stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob("*.part"))
    assert size < 64 or content[:64] not in (tmp_path / "file").read_bytes()
    with SealedReader(tmp_path / "file", KEY) as reader:
        assert b"".join(reader.blocks()) == content
        for offset, length in ((0, size), (max(0, size - 5), 5), (BLOCK_BYTES - 3, 10), (0, 0), (size // 2, BLOCK_BYTES)):
            assert reader.read(offset, length) == content[offset : offset + length]


def test_what_is_not_committed_is_deleted(tmp_path: Path) -> None:
    """A writer that is left early leaves nothing."""
    with SealedWriter(tmp_path / "file", KEY) as writer:
        writer.write(b"x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_changes_are_noticed(tmp_path: Path) -> None:
    """A changed bit, a cut or swapped block, another name and another key give no content."""
    path = tmp_path / "file"
    write(path, os.urandom(2 * BLOCK_BYTES + 10))
    whole = path.read_bytes()
    sealed = BLOCK_BYTES + 16
    first, second, rest = whole[32 : 32 + sealed], whole[32 + sealed : 32 + 2 * sealed], whole[32 + 2 * sealed :]
    flipped = bytearray(whole)
    flipped[100] ^= 1
    for changed in (bytes(flipped), whole[: 32 + 2 * sealed], whole[:-1], whole[:32] + second + first + rest, whole[:10], b""):
        path.write_bytes(changed)
        with pytest.raises(Unavailable, match="cannot be read"), SealedReader(path, KEY) as reader:
            list(reader.blocks())
    path.write_bytes(whole)
    (tmp_path / "other").write_bytes(whole)
    for name, key in (("other", KEY), ("file", b"l" * 32), ("missing", KEY)):
        with pytest.raises(Unavailable, match="cannot be read"), SealedReader(tmp_path / name, key) as reader:
            list(reader.blocks())

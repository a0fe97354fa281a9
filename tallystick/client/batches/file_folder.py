"""The folder of a wallet's files: contents sealed with the wallet's key, one file each, beside the database that lists them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tallystick.client.batches.records import StoredFile
from tallystick.client.batches.sealed_stream import SealedReader, SealedWriter, derive_key
from tallystick.client.batches.store import BatchStore, new_id, storage_full
from tallystick.protocol.errors import Code, Fault, Refusal, Unavailable

PIECE_BYTES = 1 << 20
"""Bytes that an upload holds before they go to the disk."""
_NONCE_BYTES = 12


class FileFolder:
    """Contents of files and results of lines. `secret`: the wallet's key."""

    def __init__(self, path: Path, secret: bytes) -> None:
        self.path = path
        self._key = derive_key(secret, b"tallystick files 1")
        self._results = AESGCM(derive_key(secret, b"tallystick batch results 1"))

    def write(self, file_id: str) -> SealedWriter:
        """Begins a new file. Blocks. Raises OSError."""
        return SealedWriter(self.path / file_id, self._key)

    def read(self, file_id: str) -> SealedReader:
        """Opens a file. Blocks. Raises Unavailable."""
        return SealedReader(self.path / file_id, self._key)

    async def pieces(self, file_id: str) -> AsyncIterator[bytes]:
        """The content of a file, piece by piece. Raises Unavailable."""
        reader = await asyncio.to_thread(self.read, file_id)
        with reader:
            blocks = reader.blocks()
            while (block := await asyncio.to_thread(next, blocks, None)) is not None:
                yield block

    async def delete(self, file_id: str) -> None:
        """Deletes the content of a file, if there is one."""
        await asyncio.to_thread((self.path / file_id).unlink, missing_ok=True)

    async def sweep(self, known: set[str], before: float) -> None:
        """Deletes contents that no known file has, if nobody wrote to them since `before` (Unix seconds)."""
        await asyncio.to_thread(self._sweep, known, before)

    def _sweep(self, known: set[str], before: float) -> None:
        for path in self.path.glob("file-*") if self.path.exists() else ():
            with contextlib.suppress(OSError):
                if path.name not in known and path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)

    def seal_result(self, batch: str, line: int, content: bytes) -> bytes:
        """A line's result as it is kept in the database."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._results.encrypt(nonce, content, f"{batch}:{line}".encode())

    def open_result(self, batch: str, line: int, sealed: bytes) -> bytes:
        """The content of a line's result. Raises Unavailable if it was changed."""
        try:
            return self._results.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], f"{batch}:{line}".encode())
        except (InvalidTag, ValueError):
            text = f"the stored result of line {line} of {batch} was changed, or written with another wallet"
            raise Unavailable(Code.DATABASE_UNAVAILABLE, text, fault=Fault.CLIENT) from None


@dataclass(slots=True)
class UploadRoom:
    """Bytes that uploads may take, all together. `used`: by files and results, as last seen; `held`: by the uploads that run."""

    max_bytes: int
    used: int = 0
    held: int = 0

    def take(self, size: int) -> None:
        """Takes bytes for an upload. Raises Refusal (storage_full)."""
        if self.used + self.held + size > self.max_bytes:
            raise storage_full()
        self.held += size

    def give_back(self, size: int, *, kept: bool) -> None:
        """Ends what an upload held. `kept`: it is a file now."""
        self.held -= size
        self.used += size if kept else 0


class Upload:
    """A file that is being uploaded. `add` takes its content; `flush` writes it to the disk now and then; `finish` keeps it.

    `limit`: the most bytes of one file; `room`: for all uploads.
    """

    def __init__(self, folder: FileFolder, limit: int, room: UploadRoom) -> None:
        self._limit, self._room, self.id = limit, room, new_id("file-")
        self._folder, self._held, self.size = folder, bytearray(), 0
        self._taken, self._kept = 0, False
        self._writer: SealedWriter | None = None

    def add(self, data: bytes) -> None:
        """Takes content. Raises Refusal if the file is too large, or fills the folder."""
        self.size += len(data)
        if self.size > self._limit:
            raise Refusal(Code.BODY_TOO_LARGE, f"file: expected at most {self._limit} bytes (batch_file_mib)")
        self._room.take(len(data))
        self._taken += len(data)
        self._held += data

    async def flush(self, *, at_least: int = PIECE_BYTES) -> None:
        """Writes what is held, if that is enough. Raises Unavailable."""
        if len(self._held) >= at_least:
            piece, self._held = bytes(self._held), bytearray()
            await _on_disk(lambda: self._open().write(piece))

    def _open(self) -> SealedWriter:
        if self._writer is None:
            self._writer = self._folder.write(self.id)
        return self._writer

    async def finish(self, store: BatchStore, file: StoredFile) -> None:
        """Makes the content durable and adds the file. Raises Refusal or Unavailable; then nothing is kept."""
        await self.flush(at_least=0)
        await _on_disk(lambda: self._open().commit())
        try:
            await store.add_file(file)
        except BaseException:
            await self._folder.delete(self.id)
            raise
        self._kept = True

    async def discard(self) -> None:
        """Deletes what was written, unless it was finished, and gives its room back."""
        self._room.give_back(self._taken, kept=self._kept)
        self._taken = 0
        if self._writer is not None:
            await asyncio.to_thread(self._writer.discard)


async def _on_disk(work: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(work)
    except OSError as error:
        text = f"batches_folder: {error.strerror or error}"
        raise Unavailable(Code.DATABASE_UNAVAILABLE, text, fault=Fault.CLIENT) from None

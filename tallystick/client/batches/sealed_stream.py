"""Files that are written and read piece by piece, encrypted with a key that is derived from the wallet's key.

A file is a random salt and then its content in blocks of BLOCK_BYTES, each sealed with AES-256-GCM under the file's own key. The
nonce is the block's number and whether it is the last one, so that blocks can be neither swapped nor cut off unnoticed (the
STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár, 2015). The file's name is authenticated too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tallystick.protocol.errors import Code, Fault, Unavailable

BLOCK_BYTES: Final = 1 << 16
_SALT_BYTES: Final = 32
_SEALED_BLOCK: Final = BLOCK_BYTES + 16


def derive_key(secret: bytes, purpose: bytes) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(secret)


def _cipher(key: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), 32, salt=salt, info=b"tallystick sealed stream 1").derive(key))


def _nonce(block: int, *, last: bool) -> bytes:
    return block.to_bytes(11, "big") + bytes((last,))


class SealedWriter:
    """Writes a new file of mode 0600 under a temporary name. `commit` gives it its name; leaving the block without it deletes it.

    All methods block. Raises OSError.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self._path, self._part = path, path.with_name(f"{path.name}.part")
        self._name, salt = path.name.encode(), os.urandom(_SALT_BYTES)
        self._cipher, self._held, self._block = _cipher(key, salt), bytearray(), 0
        self.size = 0
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.fdopen(os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        self._file.write(salt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.discard()

    def write(self, data: bytes) -> None:
        """Adds content."""
        self.size += len(data)
        self._held += data
        while len(self._held) > BLOCK_BYTES:
            self._seal(bytes(self._held[:BLOCK_BYTES]), last=False)
            del self._held[:BLOCK_BYTES]

    def _seal(self, block: bytes, *, last: bool) -> None:
        self._file.write(self._cipher.encrypt(_nonce(self._block, last=last), block, self._name))
        self._block += 1

    def commit(self) -> None:
        """Writes the last block, syncs the file and its folder, and gives the file its name."""
        self._seal(bytes(self._held), last=True)
        self._held.clear()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def discard(self) -> None:
        """Deletes what was written, unless it was committed."""
        self._file.close()
        self._part.unlink(missing_ok=True)


class SealedReader:
    """Reads a file that SealedWriter wrote. All methods block, and raise Unavailable for a missing or damaged file."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._name = path.name.encode()
        try:
            self._file = path.open("rb")
            self._sealed = os.fstat(self._file.fileno()).st_size - _SALT_BYTES
            self._cipher = _cipher(key, self._file.read(_SALT_BYTES))
        except OSError as error:
            raise _unreadable(path.name, error.strerror or "") from None
        self._blocks = max(1, -(-self._sealed // _SEALED_BLOCK))
        self._cached: tuple[int, bytes] = (-1, b"")
        self._lock = threading.Lock()  # several threads may read lines of one batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def blocks(self) -> Iterator[bytes]:
        """The content, a block at a time."""
        for number in range(self._blocks):
            yield self._open(number)

    def read(self, offset: int, length: int) -> bytes:
        """A part of the content; less than `length` bytes only at its end."""
        first, last = offset // BLOCK_BYTES, (offset + max(length, 1) - 1) // BLOCK_BYTES
        parts = b"".join(self._open(number) for number in range(first, min(last, self._blocks - 1) + 1))
        return parts[offset - first * BLOCK_BYTES :][:length]

    def _open(self, number: int) -> bytes:
        with self._lock:
            if self._cached[0] != number:
                self._cached = number, self._decrypt(number)
            return self._cached[1]

    def _decrypt(self, number: int) -> bytes:
        try:
            self._file.seek(_SALT_BYTES + number * _SEALED_BLOCK)
            sealed = self._file.read(_SEALED_BLOCK)
            return self._cipher.decrypt(_nonce(number, last=number == self._blocks - 1), sealed, self._name)
        except OSError as error:
            raise _unreadable(self._name.decode(), error.strerror or "") from None
        except (InvalidTag, ValueError):
            raise _unreadable(self._name.decode(), "it was changed, or written with another wallet") from None


def _unreadable(name: str, reason: str) -> Unavailable:
    error = Unavailable(Code.DATABASE_UNAVAILABLE, f"the stored file {name} cannot be read: {reason}", fault=Fault.CLIENT)
    error.retry = False
    return error

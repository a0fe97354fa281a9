"""A folder of files that only the wallet's owner can read: encrypted with a key that is derived from the wallet's key.

File names are keyed hashes (HMAC-SHA-256) and contents are sealed (AES-256-GCM), so that neither tells anything to a reader of
the disk who does not have the wallet.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tallystick.client.receipts.file_store import FileStore
from tallystick.protocol.eip712 import Signer

_NONCE_BYTES = 12


class SealedFiles:
    """The files of one purpose. Each is kept for `seconds`, and all together have at most `limit` bytes.

    `purpose` separates the keys of different folders. `count`: the most files; None for any number. `now`: Unix time in seconds.
    """

    def __init__(
        self,
        path: Path,
        wallet: Signer,
        purpose: bytes,
        *,
        limit: int,
        seconds: float,
        count: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._seconds, self._now = seconds, now
        self._store = FileStore(path, limit, "[0-9a-f]{64}", count=count, oldest=lambda: self._now() - self._seconds)
        derived = HKDF(SHA256(), 64, salt=None, info=purpose).derive(wallet.secret)
        self._name_key, self._cipher = derived[:32], AESGCM(derived[32:])

    def name(self, identity: bytes) -> str:
        """The name of the file that this identity stands for."""
        return hmac.new(self._name_key, identity, hashlib.sha256).hexdigest()

    async def get(self, name: str) -> bytes | None:
        """The content of a file; None if there is none, if it is too old, or if it was not written with this wallet's key."""
        return await asyncio.to_thread(self._get, self._store.path / name)

    def _get(self, path: Path) -> bytes | None:
        try:
            if path.stat().st_mtime < self._now() - self._seconds:
                return None
            sealed = path.read_bytes()
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], path.name.encode())
        except (OSError, InvalidTag, ValueError):
            return None

    async def put(self, name: str, content: bytes) -> None:
        """Writes a file. Deletes the ones that are too old, and the oldest ones beyond the limits."""
        nonce = os.urandom(_NONCE_BYTES)
        await self._store.put(name, nonce + self._cipher.encrypt(nonce, content, name.encode()))

    async def delete(self, name: str) -> None:
        """Deletes a file if there is one."""
        await self._store.delete(name)

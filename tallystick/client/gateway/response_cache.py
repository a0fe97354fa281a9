"""Answers kept on this machine for the same request again: opt-in, encrypted with a key that follows from the wallet's.

A request is the same where its route, its JSON (whatever the order of its members), what it requires of providers and its
caller's key are. It is kept where it says temperature 0, or asks for it. Names of files are keyed hashes and their content is
sealed (AES-256-GCM), so that neither tells anything to who has the disk and not the wallet.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.receipts.file_store import FileStore
from tallystick.protocol.demand import Demand
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import dumps, loads

ROUTES = (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES)
MAX_CACHED_BYTES = 4 * MIB
"""Bytes of an answer; larger ones are not kept."""
_NONCE = 12
_LONG_NUMBER = re.compile(rb"\d{17}")
"""Numbers that JSON readers round: two of them may look the same."""


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """An answer as it came, and what its job cost (base units), who did it, its receipt's digest as hex."""

    content_type: str
    body: bytes = field(repr=False)
    job: str
    provider: Address
    model: str
    cost: Amount
    receipt: str


class ResponseCache:
    """See the module's docstring. `limit` is bytes in all, `seconds` how long an answer is good, `now` Unix time."""

    def __init__(self, path: Path, limit: int, seconds: int, wallet: Signer, now: Callable[[], float] = time.time) -> None:
        self._folder, self._seconds, self._now = FileStore(path, limit, "[0-9a-f]{64}"), seconds, now
        derived = HKDF(SHA256(), 64, salt=None, info=b"tallystick response cache 1").derive(wallet.secret)
        self._names, self._box = derived[:32], AESGCM(derived[32:])

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> ResponseCache | None:
        """The one that a config names, if it does."""
        return (
            None
            if config.cache_folder is None
            else cls(config.cache_folder, config.cache_folder_mib * MIB, config.cache_seconds, wallet)
        )

    def name(self, path: str, bodies: Sequence[bytes], demand: Demand, caller: str, *, asked: bool | None) -> str | None:
        """Under which name the answer to a request is kept; None where it is not to be. `bodies`: the request for each model that
        may answer it, `asked`: what it says of the cache.
        """
        if asked is False or path not in ROUTES or _LONG_NUMBER.search(bodies[0]):
            return None
        try:
            request = loads(bodies[0], "request body")
            models = [loads(body, "request body")["model"] for body in bodies]
        except (BadMessage, KeyError, TypeError):
            return None
        if not (asked or request.get("temperature") == 0):
            return None
        held_to = [demand.require.to_json(), sorted(demand.pin), sorted(demand.exclude), demand.min_reputation, demand.min_stake]
        same = [path, caller, held_to, demand.sort, demand.prefer, models, request]
        try:
            plain = orjson.dumps(same, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError:
            return None
        return hmac.new(self._names, plain, hashlib.sha256).hexdigest()

    async def get(self, name: str) -> CachedResponse | None:
        """The answer of that name, unless it is too old."""
        return await asyncio.to_thread(self._get, self._folder.path / name)

    def _get(self, path: Path) -> CachedResponse | None:
        try:
            if path.stat().st_mtime < self._now() - self._seconds:
                return None
            data = path.read_bytes()
            plain = self._box.decrypt(data[:_NONCE], data[_NONCE:], path.name.encode())
        except (OSError, InvalidTag, ValueError):
            return None
        head, _, body = plain.partition(b"\n")
        told: dict[str, Any] = orjson.loads(head)
        return CachedResponse(body=body, cost=Amount(told.pop("cost")), **told)

    async def put(self, name: str, kept: CachedResponse) -> None:
        """Keeps an answer, unless it is too large."""
        if len(kept.body) > MAX_CACHED_BYTES:
            return
        told = {"content_type": kept.content_type, "job": kept.job, "provider": kept.provider, "model": kept.model}
        plain = dumps(told | {"cost": int(kept.cost), "receipt": kept.receipt}) + b"\n" + kept.body
        nonce = os.urandom(_NONCE)
        await self._folder.put(name, nonce + self._box.encrypt(nonce, plain, name.encode()))

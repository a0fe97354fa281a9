"""Caches answers on this machine: opt-in, and encrypted with a key that is derived from the wallet's key.

Two requests share an entry if their route, their JSON (in any order of members), their requirements on providers and their
caller's key are equal. An answer is cached if its request has temperature 0 or asks for it. File names are keyed hashes and
contents are sealed (AES-256-GCM), so that neither tells anything to a reader of the disk who does not have the wallet.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from tallystick.client.config import MIB, ClientConfig
from tallystick.client.gateway.sealed_files import SealedFiles
from tallystick.client.openai.requests import load_body
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.routes import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from tallystick.protocol.types import ZERO_ADDRESS, Address, Amount
from tallystick.protocol.wire import dumps

ROUTES = (CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES)
MAX_CACHED_BYTES = 4 * MIB
"""Answers of more bytes are not cached."""
_LONG_NUMBER = re.compile(rb"\d{17}")
"""Numbers that JSON readers may round, so that two different ones could look equal."""


@dataclass(frozen=True, slots=True)
class CachedResponse:
    """An answer as it came, with its job, provider, model, cost in base units, and its receipt's digest in hex."""

    content_type: str
    body: bytes = field(repr=False)
    job: str
    provider: Address
    model: str
    cost: Amount
    receipt: str


class ResponseCache:
    """A folder of cached answers of at most `limit` bytes in all, each used for `seconds`. `now` is Unix time in seconds."""

    def __init__(self, path: Path, limit: int, seconds: int, wallet: Signer, now: Callable[[], float] = time.time) -> None:
        self._files = SealedFiles(path, wallet, b"tallystick response cache 1", limit=limit, seconds=seconds, now=now)

    @classmethod
    def of(cls, config: ClientConfig, wallet: Signer) -> ResponseCache | None:
        """The cache of a config; None if it has none."""
        if config.cache_folder is None:
            return None
        return cls(config.cache_folder, config.cache_folder_mib * MIB, config.cache_seconds, wallet)

    def name(self, path: str, bodies: Sequence[bytes], demand: Demand, caller: str, *, requested: bool | None) -> str | None:
        """The name under which the answer to a request is cached; None if it must not be cached.

        `bodies`: the request for each model that may answer it. `requested`: what the request itself says about caching.
        """
        if requested is False or path not in ROUTES or _LONG_NUMBER.search(bodies[0]):
            return None
        try:
            request = load_body(bodies[0])
            models = [load_body(body)["model"] for body in bodies]
        except (BadMessage, KeyError, TypeError):
            return None
        if not (requested or request.get("temperature") == 0):
            return None
        # Every criterion but the price, which a cached answer does not have; `models` names the models.
        criteria = replace(demand, model="", max_input_price=None, max_output_price=None).to_json(ZERO_ADDRESS)
        identity = [path, caller, criteria, demand.prefer, models, request]
        try:
            plaintext = orjson.dumps(identity, option=orjson.OPT_SORT_KEYS)
        except orjson.JSONEncodeError:
            return None
        return self._files.name(plaintext)

    async def get(self, name: str) -> CachedResponse | None:
        """The cached answer of that name; None if there is none or it is too old."""
        plaintext = await self._files.get(name)
        if plaintext is None:
            return None
        header, _, body = plaintext.partition(b"\n")
        members: dict[str, Any] = orjson.loads(header)
        return CachedResponse(body=body, cost=Amount(members.pop("cost")), **members)

    async def put(self, name: str, response: CachedResponse) -> None:
        """Caches an answer unless it is too large."""
        if len(response.body) > MAX_CACHED_BYTES:
            return
        members = {
            "content_type": response.content_type,
            "job": response.job,
            "provider": response.provider,
            "model": response.model,
            "cost": int(response.cost),
            "receipt": response.receipt,
        }
        await self._files.put(name, dumps(members) + b"\n" + response.body)

"""Provider affinity: a conversation stays with the provider that has its beginning in its KV cache, unless that costs more.

A conversation is identified by a keyed hash of the name that its caller gives it, else of the request's prompt_cache_key, else of
the messages up to the first user message. The key belongs to this process; neither the key nor a hash leaves it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.messages import Ask, Receipt
from tallystick.protocol.types import Address

MAX_CONVERSATIONS = 10_000
"""Conversations remembered; beyond it the least recently used is forgotten."""
PREFIX = 4_096
"""Characters of a prompt that identify its conversation if the request has no messages."""


class Affinity:
    """The provider that answered each conversation last. `key` is the secret of the hashes."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._last: OrderedDict[bytes, tuple[Address, int]] = OrderedDict()

    def conversation_key(self, request: ApiRequest, name: str | None) -> bytes | None:
        """Identifies a request's conversation, by the caller's `name` if there is one; None if it belongs to no conversation."""
        beginning = [name] if name is not None else _beginning(request)
        if beginning is None:
            return None
        return hmac.digest(self._key, dump_lenient([request.head.path, request.summary.model, beginning]), hashlib.sha256)

    def record(self, conversation: bytes | None, receipt: Receipt) -> None:
        """Remembers the provider that answered, and the percentage of the input that it billed as cached."""
        if conversation is not None:
            percent = 100 * receipt.cached_input_tokens // max(receipt.input_tokens, 1)
            self._last[conversation] = receipt.provider, min(percent, 100)
            self._last.move_to_end(conversation)
            if len(self._last) > MAX_CONVERSATIONS:
                self._last.popitem(last=False)

    def prefer_last(self, conversation: bytes | None, asks: Sequence[Verified[Ask]]) -> tuple[Sequence[Verified[Ask]], bool]:
        """Moves the ask of the provider that answered last to the front. Returns the asks, and whether their order changed.

        The order stays if that ask, with as much cached as its provider billed last, costs more than the first ask without a
        cache.
        """
        provider, percent = self._last.get(conversation, (None, 0)) if conversation is not None else (None, 0)
        last = next((ask for ask in asks if ask.message.provider == provider), None)
        if last is None or last is asks[0] or _price(last.message, percent) > _price(asks[0].message, 0):
            return asks, False
        return [last, *(ask for ask in asks if ask is not last)], True


def _price(ask: Ask, cached_percent: int) -> int:
    """A hundred times the price of a request with three input tokens, `cached_percent` of them cached, for each output token."""
    return 3 * (ask.cached_input_price * cached_percent + ask.input_price * (100 - cached_percent)) + 100 * ask.output_price


def _beginning(request: ApiRequest) -> Any:
    body = request.json
    if body is None:
        return None
    if isinstance(body.get("prompt_cache_key"), str):
        return body["prompt_cache_key"]
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        first = next((n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user"), 0)
        return messages[: first + 1]
    prompt = body.get("prompt", messages)
    return prompt[:PREFIX] if isinstance(prompt, str) else None

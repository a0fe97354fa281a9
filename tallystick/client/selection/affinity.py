"""Conversations stay with the provider that has their beginning in its KV cache, as long as that is not the dearer way.

A conversation is known by a keyed hash: of what its caller names it, else of the prompt_cache_key of its request, else of the
messages up to the first of the user. The key is this process's own, and neither key nor hash leaves it. Pure but for that key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from tallystick.client.openai.requests import ApiRequest
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Ask, Receipt
from tallystick.protocol.types import Address
from tallystick.protocol.wire import dumps

REMEMBERED = 10_000
"""Conversations; the ones that were silent longest go first."""
PREFIX = 4_096
"""Characters of a prompt that tell one from another where there are no messages."""


class Affinity:
    """Who answered each conversation last."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._last: OrderedDict[bytes, tuple[Address, int]] = OrderedDict()

    def tag(self, asked: ApiRequest, named: str | None) -> bytes | None:
        """What a request's conversation is known by; None where it belongs to none."""
        begins = [named] if named is not None else _beginning(asked)
        if begins is None:
            return None
        return hmac.digest(self._key, dumps([asked.head.path, asked.summary.model, begins]), hashlib.sha256)

    def note(self, tag: bytes | None, receipt: Receipt) -> None:
        """A provider answered, and billed so much of the input as cached."""
        if tag is not None:
            percent = 100 * receipt.cached_input_tokens // max(receipt.input_tokens, 1)
            self._last[tag] = receipt.provider, min(percent, 100)
            self._last.move_to_end(tag)
            if len(self._last) > REMEMBERED:
                self._last.popitem(last=False)

    def ordered(self, tag: bytes | None, asks: Sequence[Verified[Ask]]) -> tuple[Sequence[Verified[Ask]], bool]:
        """The asks with the one that answered last first, if it still is among them and not dearer, with as much cached as it
        billed last, than the first is without; and whether the order was changed.
        """
        last, percent = self._last.get(tag, (None, 0)) if tag is not None else (None, 0)
        kept = next((ask for ask in asks if ask.message.provider == last), None)
        if kept is None or kept is asks[0] or _price(kept.message, percent) > _price(asks[0].message, 0):
            return asks, False
        return [kept, *(ask for ask in asks if ask is not kept)], True


def _price(ask: Ask, cached: int) -> int:
    """A hundredfold, for a request that reads three tokens, `cached` percent of them from its cache, for each one it writes."""
    return 3 * (ask.cached_input_price * cached + ask.input_price * (100 - cached)) + 100 * ask.output_price


def _beginning(asked: ApiRequest) -> Any:
    request = asked.json
    if request is None:
        return None
    if isinstance(request.get("prompt_cache_key"), str):
        return request["prompt_cache_key"]
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, list):
        first = next((n for n, one in enumerate(messages) if isinstance(one, dict) and one.get("role") == "user"), 0)
        return messages[: first + 1]
    prompt = request.get("prompt", messages)
    return prompt[:PREFIX] if isinstance(prompt, str) else None

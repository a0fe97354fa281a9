"""Asks with the values that others have too in common with them: many nodes sell the same product at the same price."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from sys import intern
from typing import Any, TypeVar

from tallystick.protocol.eip712 import Verified
from tallystick.protocol.messages import Ask
from tallystick.protocol.types import Address

T = TypeVar("T")


@lru_cache(maxsize=4_096)
def _remembered(value: Any) -> Any:  # the type of the value is not known to the cache
    return value


def shared_value(value: T) -> T:
    """Returns an equal value that other asks have already, if one is remembered."""
    shared: T = _remembered(value)
    return shared


def intern_ask(ask: Verified[Ask], provider: Address, keys: dict[bytes, bytes]) -> Verified[Ask]:
    """Returns the same ask with the values that others have too in common with them. `keys`: the sealing keys of its node's asks,
    to which its own is added.
    """
    message = ask.message
    shared = replace(
        message,
        provider=provider,
        model=intern(message.model),
        input_price=shared_value(message.input_price),
        cached_input_price=shared_value(message.cached_input_price),
        output_price=shared_value(message.output_price),
        sealing_suite=intern(message.sealing_suite),
        sealing_key=keys.setdefault(message.sealing_key, message.sealing_key),
        context_tokens=shared_value(message.context_tokens),
        max_output_tokens=shared_value(message.max_output_tokens),
        valid_from=shared_value(message.valid_from),
        valid_until=shared_value(message.valid_until),
        spec=shared_value(message.spec),
    )
    return Verified(shared, ask.signature, ask.digest)

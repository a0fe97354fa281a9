"""Messages as text for databases: the base64 of their binary form. JSON, as release 0.1 stored them, is read as well."""

from __future__ import annotations

import base64
import binascii
from typing import TypeVar

import orjson

from tallystick.protocol.eip712 import Message, Signed, loads_signed, read_signed_bytes
from tallystick.protocol.errors import BadMessage

M = TypeVar("M", bound=Message)


def store_signed(signed: Signed[Message]) -> str:
    """A signed message as text. Raises BadMessage for one that no peer would read."""
    return base64.b64encode(signed.to_bytes()).decode()


def load_signed(cls: type[M], text: str, field: str = "") -> Signed[M]:
    """Reads what `store_signed` or release 0.1 stored. Raises BadMessage."""
    if text.startswith("{"):
        return loads_signed(cls, text)
    return read_signed_bytes(cls, _decode(text, field or cls.SCHEMA.name.lower()), field)


def store_struct(message: Message) -> str:
    """A struct that is not signed as text. Raises BadMessage for one that no peer would read."""
    return base64.b64encode(message.to_bytes()).decode()


def load_struct(cls: type[M], text: str, field: str = "") -> M:
    """Reads what `store_struct` or release 0.1 stored. Raises BadMessage."""
    where = field or cls.SCHEMA.name.lower()
    if not text.startswith("{"):
        return cls.from_bytes(_decode(text, where), where)
    try:
        return cls.from_json(orjson.loads(text), where)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"{where}: not JSON: {error}") from None


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage(f"{where}: expected base64 or a JSON object") from None

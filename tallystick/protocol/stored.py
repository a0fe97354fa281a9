"""Messages for databases: their binary form, packed as bytes or as base64. JSON, as release 0.1 stored them, is read as well.

Most of an EIP-712 word is zeros, so `pack` writes each run of up to 255 zero bytes as one and the run's length.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TypeVar

import orjson

from tallystick.protocol.eip712 import Message, Signed, loads_signed, read_signed_bytes
from tallystick.protocol.errors import BadMessage

M = TypeVar("M", bound=Message)
_ZEROS, _RUN = re.compile(rb"\0{1,255}"), re.compile(rb"\0(.)", re.DOTALL)
_PACKED = tuple(bytes((0, count)) for count in range(256))
"""A run of so many zeros, packed."""


def pack(data: bytes) -> bytes:
    """Packs runs of zeros; see the module's docstring."""
    return _ZEROS.sub(lambda run: _PACKED[run.end() - run.start()], data)


def unpack(data: bytes) -> bytes:
    """The inverse of `pack`."""
    return _RUN.sub(lambda run: bytes(run[1][0]), data)


def pack_signed(signed: Signed[Message]) -> bytes:
    """A signed message, packed. Raises BadMessage for one that no peer would read."""
    return pack(signed.to_bytes())


def pack_struct(message: Message) -> bytes:
    """A struct that is not signed, packed. Raises BadMessage for one that no peer would read."""
    return pack(message.to_bytes())


def store_signed(signed: Signed[Message]) -> str:
    """A signed message as text. Raises BadMessage for one that no peer would read."""
    return base64.b64encode(signed.to_bytes()).decode()


def load_signed(cls: type[M], stored: str | bytes, field: str = "") -> Signed[M]:
    """Reads what `pack_signed`, `store_signed` or release 0.1 stored. Raises BadMessage."""
    if isinstance(stored, bytes):
        return read_signed_bytes(cls, unpack(stored), field)
    if stored.startswith("{"):
        return loads_signed(cls, stored)
    return read_signed_bytes(cls, _decode(stored, field or cls.SCHEMA.name.lower()), field)


def store_struct(message: Message) -> str:
    """A struct that is not signed as text. Raises BadMessage for one that no peer would read."""
    return base64.b64encode(message.to_bytes()).decode()


def load_struct(cls: type[M], stored: str | bytes, field: str = "") -> M:
    """Reads what `pack_struct`, `store_struct` or release 0.1 stored. Raises BadMessage."""
    where = field or cls.SCHEMA.name.lower()
    if isinstance(stored, bytes):
        return cls.from_bytes(unpack(stored), where)
    if not stored.startswith("{"):
        return cls.from_bytes(_decode(stored, where), where)
    try:
        return cls.from_json(orjson.loads(stored), where)
    except orjson.JSONDecodeError as error:
        raise BadMessage(f"{where}: not JSON: {error}") from None


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadMessage(f"{where}: expected base64 or a JSON object") from None

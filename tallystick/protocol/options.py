"""Options of a binary message: numbered members that may be absent. A later release adds members without a new protocol.

The binary form is 1 byte count, and for each option 1 byte number, 1 byte length and the value, by ascending number. A reader
refuses an option below 128 that it does not know, since leaving it out would change what the sender asked for. It ignores
an unknown one from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tallystick.protocol.codecs import take
from tallystick.protocol.errors import BadMessage

IGNORABLE = 128
MAX_VALUE = 255


@dataclass(frozen=True, slots=True)
class Option:
    """An option. `field` is the member's name in Python, `name` its name in errors and documents.

    `write` returns the bytes of a value. `read` raises BadMessage that begins with the name that it is given.
    """

    number: int
    field: str
    name: str
    write: Callable[[Any], bytes]
    read: Callable[[bytes, str], Any]


def flag(number: int, field: str, name: str) -> Option:
    """An option without a value: it is there or not."""

    def read(value: bytes, where: str) -> bool:
        if value:
            raise BadMessage(f"{where}: expected no bytes, got {len(value)}")
        return True

    return Option(number, field, name, lambda _: b"", read)


def whole_number(number: int, field: str, name: str, low: int = 0, high: int = (1 << 32) - 1) -> Option:
    """A whole number from `low` to `high`, in 4 bytes (big-endian)."""

    def read(value: bytes, where: str) -> int:
        if len(value) != 4:
            raise BadMessage(f"{where}: expected 4 bytes, got {len(value)}")
        count = int.from_bytes(value, "big")
        if not low <= count <= high:
            raise BadMessage(f"{where}: expected a whole number from {low} to {high}, got {count}")
        return count

    def write(value: int) -> bytes:
        if not low <= value <= high:
            raise BadMessage(f"{name}: expected a whole number from {low} to {high}, got {value}")
        return value.to_bytes(4, "big")

    return Option(number, field, name, write, read)


def pack_options(options: Sequence[Option], message: object) -> bytes:
    """The options that a message has. A member that is None or False is absent."""
    parts = []
    for option in options:
        member = getattr(message, option.field)
        if member is not None and member is not False:
            value = option.write(member)
            if len(value) > MAX_VALUE:
                raise BadMessage(f"{option.name}: expected at most {MAX_VALUE} bytes, got {len(value)}")
            parts.append(bytes((option.number, len(value))) + value)
    return bytes((len(parts),)) + b"".join(parts)


def unpack_options(options: Mapping[int, Option], data: bytes, at: int, where: str) -> tuple[dict[str, Any], int]:
    """Reads the options at an offset. Returns the members by their Python names, and the offset after them. Raises BadMessage."""
    count, end, last = take(data, at, 1, f"{where}.options")[0], at + 1, 0
    members: dict[str, Any] = {}
    for _ in range(count):
        number, size = take(data, end, 2, f"{where}.options")
        value, end = take(data, end + 2, size, f"{where}.options"), end + 2 + size
        if number <= last:
            raise BadMessage(f"{where}.options: expected each option once, in ascending order, got {number} after {last}")
        last = number
        option = options.get(number)
        if option is not None:
            members[option.field] = option.read(value, f"{where}.{option.name}")
        elif number < IGNORABLE:
            raise BadMessage(f"{where}.options: option {number} is unknown here; upgrade this side, or leave the option out")
    return members, end

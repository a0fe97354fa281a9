"""The scalar types of the protocol: money, addresses, hashes, job ids, times."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NewType, NoReturn, Self, SupportsIndex

from tallystick.protocol.errors import BadMessage

Address = NewType("Address", str)
"""A 20-byte account address as lower-case hex with 0x. EIP-55 mixed case is for display only."""

Hash = NewType("Hash", bytes)
"""A 32-byte digest or commitment."""

JobId = NewType("JobId", bytes)
"""16 bytes that the payer chooses; the idempotency key of a job. See `new_job_id`."""

Seconds = NewType("Seconds", int)
"""A Unix time in whole seconds."""

ZERO_ADDRESS = Address("0x" + "00" * 20)
ZERO_HASH = Hash(bytes(32))

_ADDRESS = re.compile(r"0x[0-9a-fA-F]{40}")
_MAX_QUOTED = 50


class Amount(int):
    """Money in integer base units of the market's token (6 decimals: 1_000_000 is one test dollar).

    Sums and differences of amounts, and products with an integer, are amounts. True division, powers and a float as the right
    operand raise TypeError. A float as the left operand gives a float.
    """

    __slots__ = ()

    def __new__(cls, value: int = 0) -> Self:
        """An amount of `value` base units. Raises TypeError for floats and booleans."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"Amount: expected an integer of base units, got {type(value).__name__}")
        return int.__new__(cls, value)

    def __add__(self, other: int) -> Amount:
        return _new(Amount, int.__add__(self, other if type(other) in _WHOLE else _whole(other)))

    __radd__ = __add__

    def __sub__(self, other: int) -> Amount:
        return _new(Amount, int.__sub__(self, other if type(other) in _WHOLE else _whole(other)))

    def __rsub__(self, other: int) -> Amount:
        return _new(Amount, int.__rsub__(self, other if type(other) in _WHOLE else _whole(other)))

    def __mul__(self, other: int) -> Amount:
        return _new(Amount, int.__mul__(self, other if type(other) in _WHOLE else _whole(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> int:
        return int.__floordiv__(self, _whole(other))

    def __mod__(self, other: int) -> int:
        return int.__mod__(self, _whole(other))

    def __divmod__(self, other: int) -> tuple[int, int]:
        return int.__divmod__(self, _whole(other))

    def __pow__(self, other: Any, modulo: Any = None) -> NoReturn:
        raise TypeError("Amount: powers are not defined")

    def __neg__(self) -> Amount:
        return _new(Amount, int.__neg__(self))

    def __truediv__(self, other: Any) -> NoReturn:
        raise TypeError("Amount: true division gives a float; use // and choose the rounding")

    __rtruediv__ = __truediv__

    def __float__(self) -> NoReturn:
        raise TypeError("Amount: never a float; use format_amount to show it")

    def __index__(self) -> int:
        return int.__int__(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[Amount], tuple[int]]:
        return Amount, (int(self),)


_new = int.__new__
"""Makes an Amount of what integer arithmetic returned, which needs no check."""
_WHOLE = frozenset({int, Amount})
"""Types of operands that need no further check."""


def _whole(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Amount: expected an integer operand, got {type(value).__name__}")
    return value


def parse_address(value: object, field: str = "address") -> Address:
    """The canonical form of an address in hex. `field` names it in errors. Raises BadMessage."""
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise BadMessage(f"{field}: expected a 20-byte address as 0x and 40 hex digits, got {_quote(value)}")
    return Address(value.lower())


def new_job_id(now_ns: int, random: Callable[[int], bytes]) -> JobId:
    """A UUID of version 7 (RFC 9562): 48 bits of Unix milliseconds, then 74 random bits.

    Databases write ids that grow with time to few pages. `random` returns that many random bytes.
    """
    tail = int.from_bytes(random(10), "big") & ((1 << 80) - 1)
    version_and_a, variant_and_b = 0x7 << 12 | tail >> 68, 0b10 << 62 | tail & ((1 << 62) - 1)
    return JobId(
        (now_ns // 1_000_000 & ((1 << 48) - 1)).to_bytes(6, "big") + (version_and_a << 64 | variant_and_b).to_bytes(10, "big")
    )


def parse_job_id(value: str, field: str = "job") -> JobId:
    """A job id from its 32 hex digits. `field` names it in errors. Raises BadMessage."""
    if not re.fullmatch(r"(0x)?[0-9a-fA-F]{32}", value):
        raise BadMessage(f"{field}: expected 32 hex digits, got {_quote(value)}")
    return JobId(bytes.fromhex(value.removeprefix("0x")))


def _quote(value: object) -> str:
    """A value for an error message. A long text may be a private key, so only its length is shown."""
    if not isinstance(value, str):
        return type(value).__name__
    return repr(value) if len(value) <= _MAX_QUOTED else f"{len(value)} characters"


def parse_amount(text: str, decimals: int = 6, field: str = "amount") -> Amount:
    """Base units from a decimal string such as "1.25". Raises BadMessage for other text or more than `decimals` places."""
    match = re.fullmatch(r"([0-9]{1,30})(?:\.([0-9]+))?", text.strip())
    if not match or len(match[2] or "") > decimals:
        raise BadMessage(f"{field}: expected a decimal number with at most {decimals} places, got {text[:100]!r}")
    return Amount(int(match[1]) * 10**decimals + int((match[2] or "").ljust(decimals, "0") or "0"))


def format_amount(amount: int, decimals: int = 6) -> str:
    """An amount of base units in decimal dollars, for people: "1.25", exact, without trailing zeros."""
    sign, units = ("-" if amount < 0 else ""), abs(int(amount))
    whole, fraction = divmod(units, 10**decimals)
    return f"{sign}{whole}.{fraction:0{decimals}d}".rstrip("0").rstrip(".") if fraction else f"{sign}{whole}"

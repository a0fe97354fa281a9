"""Hex encodings of JSON-RPC, and conversion of eth-tester's records to them (https://ethereum.github.io/execution-apis/)."""

from __future__ import annotations

import re
from typing import Any

_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
_DATA = re.compile(r"0x(?:[0-9a-fA-F]{2})*")


class InvalidParams(Exception):
    """The parameters of a request are invalid."""


def parse_quantity(raw: object) -> int:
    """Reads a number from its hex form, or from a JSON integer. Raises InvalidParams."""
    if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0:
        return raw
    if not isinstance(raw, str) or not _QUANTITY.fullmatch(raw):
        raise InvalidParams(f"expected a number as 0x and hex digits, got {str(raw)[:80]}")
    return int(raw, 16)


def parse_data(raw: object, size: int | None = None) -> bytes:
    """Reads bytes from their hex form; exactly `size` bytes if it is given. Raises InvalidParams."""
    if not isinstance(raw, str) or not _DATA.fullmatch(raw):
        raise InvalidParams(f"expected bytes as 0x and hex digits, got {str(raw)[:80]}")
    value = bytes.fromhex(raw[2:])
    if size is not None and len(value) != size:
        raise InvalidParams(f"expected {size} bytes, got {len(value)}")
    return value


def encode(value: Any) -> Any:
    """Converts numbers and bytes to hex and names to camelCase, recursively."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)
    if isinstance(value, dict):
        return {re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), name): encode(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(member) for member in value]
    return value


def block_json(record: dict[str, Any]) -> dict[str, Any]:
    """Converts a block; its transactions are hashes."""
    bloom = record.pop("logs_bloom")
    converted: dict[str, Any] = encode(record | {"miner": record.pop("coinbase")})
    return converted | {"logsBloom": f"0x{bloom:0512x}"}


def transaction_json(record: dict[str, Any]) -> dict[str, Any]:
    """Converts a mined transaction."""
    converted: dict[str, Any] = encode(record | {"input": record.pop("data"), "to": record["to"] or None})
    return converted


def receipt_json(record: dict[str, Any], bloom: int) -> dict[str, Any]:
    """Converts a receipt with its logs."""
    del record["state_root"]  # since Byzantium a receipt has a status instead
    for log in record["logs"]:
        log["removed"] = False
        del log["type"]
    converted: dict[str, Any] = encode(
        record | {"to": record["to"] or None, "contract_address": record["contract_address"] or None}
    )
    return converted | {"logsBloom": f"0x{bloom:0512x}"}

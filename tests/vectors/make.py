"""Writes the golden vectors: messages.json (the inputs), eth_account.json (what eth_account computes for them), binary.json
(their binary form: eth_account's words, then what the words only hash, written here from the inputs alone), frames.json.

    python -m tests.vectors.make && (cd contracts && node vectors.mjs > ../tests/vectors/viem.json)

Inputs are fixed, extreme values included; neither oracle runs any code of this project, which only writes the inputs down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eth_account import Account
from eth_account._utils.encode_typed_data.encoding_and_hashing import encode_data
from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak

from tallystick.protocol.eip712 import Message
from tallystick.protocol.messages import (
    Access,
    Ask,
    AuditReport,
    Bind,
    Claim,
    ClaimRow,
    Connect,
    Inquiry,
    LogHead,
    Order,
    ProbeSeal,
    Receipt,
    Release,
    ReportAck,
    Spec,
    Terms,
)
from tallystick.protocol.types import Address, Amount, Hash, JobId

FOLDER = Path(__file__).parent
SECRET = "0x" + "4c" * 32
DOMAIN = {"name": "Tallystick", "version": "1", "chainId": 31337, "verifyingContract": "0x" + "5f" * 20}

_LOW, _HIGH = Address("0x" + "00" * 19 + "01"), Address("0x" + "ff" * 20)
_ZERO, _ONES, _ASCENDING = Hash(bytes(32)), Hash(b"\xff" * 32), Hash(bytes(range(32)))


def _row(payer: Address, order: Hash, seq: int, total: int) -> ClaimRow:
    return ClaimRow(payer=payer, order_hash=order, seq=seq, cumulative_cost=Amount(total))


def cases() -> Iterator[tuple[str, Message]]:
    """Every flat struct with all least values, all greatest, and no two fields alike; the others by hand."""
    for cls in (Order, Receipt, Bind, Release, Terms, LogHead, Connect, Inquiry, Access, AuditReport, ReportAck, ProbeSeal):
        for label, make in (("least", _least), ("greatest", _greatest), ("distinct", _distinct)):
            names = [codec.name for codec in cls.SCHEMA.codecs]
            values = [make(name, place) for place, name in enumerate(names, 1)]
            yield f"{cls.__name__} {label}", cls(**dict(zip(cls.SCHEMA.fields, values, strict=True)))
    yield "Spec unknown", Spec()
    yield "Ask", _ask(Spec(revision="r1", precision="fp8", region="eu \u00e9\u4e2d", features=("tools", "json", "")))
    yield "Ask without features", _ask(Spec())
    row = _row(Address("0x" + "a1" * 20), _ASCENDING, 7, 1_234_567)
    extreme = _row(_HIGH, _ONES, (1 << 64) - 1, (1 << 96) - 1)
    yield "Claim empty", Claim(provider=_LOW, rows=())
    yield "Claim one row", Claim(provider=Address("0x" + "b2" * 20), rows=(row,))
    yield "Claim many rows", Claim(provider=_HIGH, rows=(row, extreme, _row(_LOW, _ZERO, 0, 0), row))


def _ask(spec: Spec) -> Ask:
    return Ask(
        provider=_HIGH,
        model="tiny-1",
        input_price=1,
        cached_input_price=2,
        output_price=3,
        context_tokens=4,
        max_output_tokens=5,
        sealing_suite="x25519",
        sealing_key=bytes(range(32)),
        valid_from=6,
        valid_until=7,
        seq=8,
        spec=spec,
    )


def _least(kind: str, _place: int) -> Any:
    return _value(kind, 0)


def _greatest(kind: str, _place: int) -> Any:
    return _value(kind, -1)


def _distinct(kind: str, place: int) -> Any:
    return _value(kind, place * 11)


def _value(kind: str, number: int) -> Any:
    """A number as a value of an EIP-712 type; -1 is the greatest value."""
    if kind == "string":
        return "\U0001f9fe" * 300 if number < 0 else str(number or "")
    size = {"address": 160, "bytes16": 128, "bytes32": 256}.get(kind) or int(kind.removeprefix("uint"))
    number %= 1 << size
    if kind.startswith("uint"):
        return Amount(number) if kind == "uint96" else number
    raw = number.to_bytes(size // 8, "big")
    if kind == "address":
        return Address("0x" + raw.hex())
    return JobId(raw) if kind == "bytes16" else Hash(raw)


def binary(kind: str, value: Any, types: dict[str, list[dict[str, str]]]) -> bytes:
    """The binary form of a struct."""
    tails = [_tail(member["type"], value[member["name"]], types) for member in types[kind]]
    return bytes(encode_data(kind, types, value))[32:] + b"".join(tails)  # without the type hash


def _tail(kind: str, value: Any, types: dict[str, list[dict[str, str]]]) -> bytes:
    if kind.endswith("[]"):
        items = [_item(kind[:-2], item, types) for item in value]
        return len(items).to_bytes(2, "big") + b"".join(items)
    if kind in ("string", "bytes"):
        raw = value.encode() if kind == "string" else bytes.fromhex(value[2:])
        return len(raw).to_bytes(2, "big") + raw
    return binary(kind, value, types) if kind in types else b""


def _item(kind: str, value: Any, types: dict[str, list[dict[str, str]]]) -> bytes:
    if kind not in types and kind != "string":
        raise ValueError(f"no message has an array of {kind}")
    return _tail(kind, value, types)


def frames(types: dict[str, dict[str, list[dict[str, str]]]]) -> Iterator[tuple[str, bytes]]:
    """A submission with all options and two candidates."""
    account, other, zero = Account.from_key(SECRET).address.lower(), "0x" + "c3" * 20, "0x" + "00" * 32
    job = bytes(range(16))

    def sign(kind: str, message: dict[str, Any]) -> bytes:
        signed = Account.sign_message(encode_typed_data(DOMAIN, types[kind], message), SECRET)
        return binary(kind, message, types[kind]) + bytes(signed.signature)

    def candidate(number: int) -> bytes:
        prices = {"inputPrice": "1", "cachedInputPrice": "2", "outputPrice": str(3 + number), "maxCost": str(1 << 95)}
        terms = {"model": "tiny \u20ac", "ask": zero, "maxOutputTokens": 9, "job": "0x" + job.hex(), "requestCommitment": zero}
        terms |= prices
        struct = binary("Terms", terms, types["Terms"])
        times = {"seq": "4", "deadline": "1700000000", "claimBy": "1800000000", "maxFeeBps": 25}
        order = {"payer": account, "provider": other, "ceiling": "7", "reserveTarget": "8", "coordinator": account}
        terms_hash = keccak(encode_data("Terms", types["Terms"], terms))
        signed = sign("Order", order | times | {"termsHash": "0x" + terms_hash.hex()})
        return signed + struct + b"wrapped %d" % number

    options = b"\x03" + b"\x01\x00" + b"\x02\x04" + (120).to_bytes(4, "big") + b"\x03\x04" + (250).to_bytes(4, "big")
    yield "submission", b"\x02" + job + options + b"\x02" + _sized(candidate(0)) + _sized(candidate(1)) + b"sealed request"


def _sized(part: bytes) -> bytes:
    return len(part).to_bytes(2, "big") + part


def main() -> None:
    """Writes all files."""
    made = list(cases())
    types = {m.SCHEMA.name: m.SCHEMA.types() for _, m in made}
    inputs: list[dict[str, Any]] = [{"name": n, "primaryType": m.SCHEMA.name, "message": m.to_json()} for n, m in made]
    document = {"secret": SECRET, "domain": DOMAIN, "types": types, "cases": inputs}
    (FOLDER / "messages.json").write_text(json.dumps(document, indent=2) + "\n")
    vectors = []
    for case in inputs:
        signed = Account.sign_message(encode_typed_data(DOMAIN, types[case["primaryType"]], case["message"]), SECRET)
        digest, signature = bytes(signed.message_hash).hex(), bytes(signed.signature).hex()
        vectors.append({"name": case["name"], "digest": "0x" + digest, "signature": "0x" + signature})
    forms = [
        {"name": case["name"], "binary": binary(case["primaryType"], case["message"], types[case["primaryType"]]).hex()}
        for case in inputs
    ]
    (FOLDER / "frames.json").write_text(json.dumps({name: frame.hex() for name, frame in frames(types)}, indent=2) + "\n")
    (FOLDER / "binary.json").write_text(json.dumps({"vectors": forms}, indent=2) + "\n")
    signer = Account.from_key(SECRET).address.lower()
    (FOLDER / "eth_account.json").write_text(json.dumps({"signer": signer, "vectors": vectors}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The reference of signed messages, from the classes of `tallystick/protocol/messages.py`."""

from __future__ import annotations

import inspect
from typing import Any

from docs.generate.markdown import code, fence, table
from tallystick.protocol import jobs, messages
from tallystick.protocol.eip712 import Message
from tallystick.protocol.messages import Outcome

INTRODUCTION = """# Signed messages

Every signature in the market is an [EIP-712](https://eips.ethereum.org/EIPS/eip-712) signature by a secp256k1 key, checked with
plain `ecrecover`. The domain is `{name: "Tallystick", version: "1", chainId, verifyingContract}`, so a signature is valid on one
chain and for one escrow contract only.

In JSON a signed message is `{"message": {…}, "signature": "0x…"}`. Members have the names below; bytes and addresses are
hexadecimal text, and integers of more than 32 bits are decimal text. Readers are strict: a missing, unknown or ill-typed member
is `bad_message`.

A message without a signer is a part of another message, or is hashed into one.

## Binary form

[Frames](wire.md) and databases have messages in binary form, from which the digest is computed without encoding anything again:

1. EIP-712's `encodeData`: one word of 32 bytes for each member, in the order of the type string.
2. For each member whose word is only a hash, in the same order, what is hashed: a `string` or `bytes` as 2 bytes length
   (big-endian) and the bytes; an array as 2 bytes count and the items, which are words, strings or structs; a struct as its own
   binary form.
3. For a signed message, 65 bytes of signature: `r`, `s`, `v`.

A signed order has 385 bytes, a signed receipt 481. Each message has exactly one binary form. Padding that is not zero, a value
that its word does not hash, and bytes left over are `bad_message`. `tests/vectors/binary.json` has an example of every message.
"""


def pages() -> dict[str, str]:
    """The page of signed messages."""
    classes = [cls for _, cls in inspect.getmembers(messages, inspect.isclass) if issubclass(cls, Message) and cls is not Message]
    classes.sort(key=lambda cls: inspect.getsourcelines(cls)[1])
    parts = [INTRODUCTION, *(_section(cls) for cls in classes), "## Outcomes\n", inspect.getdoc(Outcome) or "", "", _outcomes()]
    return {"messages.md": "\n".join(parts)}


def _section(cls: Any) -> str:
    schema = cls.SCHEMA
    signer = f"Signed by the key of its member `{_wire_name(schema, cls.SIGNER)}`.\n" if cls.SIGNER else "Not signed by itself.\n"
    rows = ((code(name), code(codec.name)) for name, codec in zip(schema.wire_names, schema.codecs, strict=True))
    return "\n".join(
        [
            f"## {schema.name}\n",
            (inspect.getdoc(cls) or "") + "\n",
            signer,
            "Type string:\n",
            fence(schema.type_string.replace(",", ", ").replace(")", ")\n").strip()),
            table(("member", "type"), rows),
        ]
    )


def _wire_name(schema: Any, field: str) -> str:
    return str(schema.wire_names[schema.fields.index(field)])


def _outcomes() -> str:
    rows = ((str(int(outcome)), code(outcome.name.lower()), jobs.CHARGES[outcome].value) for outcome in Outcome)
    return table(("number", "outcome", "charges"), rows)

"""What EIP-712 says of a message class: its type string and hash, and how each of its fields is written, read and checked.

Computed once, when the class is defined (https://eips.ethereum.org/EIPS/eip-712).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from operator import attrgetter
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tallystick.protocol.codecs import SCALARS, WORD, Codec, Tail, array, check_padding, keccak, uint
from tallystick.protocol.word_layout import WordLayout


def _codec(hint: Any) -> Codec:
    if get_origin(hint) is Annotated:
        base, mark = get_args(hint)
        return uint(mark.bits, base)
    if get_origin(hint) is tuple:
        return array(_codec(get_args(hint)[0]))
    struct = _schema_of(hint)
    if struct is not None:
        tail = Tail(lambda v: v.to_bytes(), hint.unpack_struct)
        return Codec(struct.name, lambda v: v.struct_hash(), lambda v: v.to_json(), hint.from_json, tail=tail)
    if isinstance(hint, UnionType) or hint not in SCALARS:
        raise TypeError(f"no EIP-712 type for {hint!r}")
    return SCALARS[hint]


def _schema_of(hint: Any) -> Schema | None:
    """The schema of a message class; None for any other type."""
    schema = getattr(hint, "SCHEMA", None)
    return schema if isinstance(schema, Schema) else None


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


class Schema:
    """The EIP-712 description of a message class, computed once when the class is defined."""

    def __init__(self, cls: type[Any]) -> None:
        hints = get_type_hints(cls, include_extras=True)
        self.name = cls.__name__
        self.fields = tuple(field.name for field in dataclasses.fields(cls))
        self.codecs = tuple(_codec(hints[name]) for name in self.fields)
        self.wire_names = tuple(map(_camel, self.fields))
        self.wire_set = frozenset(self.wire_names)
        self.readers = tuple((f, n, c.from_json) for f, n, c in zip(self.fields, self.wire_names, self.codecs, strict=True))
        self.writers = tuple((n, c.to_json) for n, c in zip(self.wire_names, self.codecs, strict=True))
        self.encoders = tuple(codec.encode for codec in self.codecs)
        self.layout = WordLayout(self.fields, self.codecs)
        self.read = attrgetter(*self.fields)
        self.size = WORD * len(self.fields)
        self.padding = int.from_bytes(b"".join(codec.padding.to_bytes(WORD, "big") for codec in self.codecs), "big")
        self.places = {
            name: (WORD * i, codec.decode)
            for i, (name, codec) in enumerate(zip(self.fields, self.codecs, strict=True))
            if codec.decode is not None
        }
        self.tails = tuple(
            (name, self.wire_names[i], WORD * i, codec.tail)
            for i, (name, codec) in enumerate(zip(self.fields, self.codecs, strict=True))
            if codec.tail is not None
        )
        self.nested = self._nested(hints)
        self.type_string = self.own_string() + "".join(self.nested[n].own_string() for n in sorted(self.nested))
        self.type_hash = keccak(self.type_string.encode())

    def _nested(self, hints: Mapping[str, Any]) -> dict[str, Schema]:
        nested: dict[str, Schema] = {}
        for name in self.fields:
            hint = hints[name]
            inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
            struct = _schema_of(inner)
            if struct is not None:
                nested |= {struct.name: struct} | struct.nested
        return nested

    def own_string(self) -> str:
        """The type string without nested structs."""
        members = ",".join(f"{codec.name} {name}" for codec, name in zip(self.codecs, self.wire_names, strict=True))
        return f"{self.name}({members})"

    def check_words(self, words: bytes, where: str) -> None:
        """Raises BadMessage that names the first field whose word is no encoding of its type."""
        if int.from_bytes(words, "big") & self.padding:
            for i, (name, codec) in enumerate(zip(self.wire_names, self.codecs, strict=True)):
                check_padding(words[WORD * i : WORD * (i + 1)], codec, f"{where}.{name}")

    def types(self) -> dict[str, list[dict[str, str]]]:
        """The `types` section of a typed-data document, without the domain."""
        schemas = {self.name: self} | self.nested
        return {
            name: [{"name": n, "type": c.name} for c, n in zip(s.codecs, s.wire_names, strict=True)]
            for name, s in schemas.items()
        }

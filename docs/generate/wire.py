"""The reference of the wire protocol, from `tallystick/protocol/wire.py` and `tallystick/protocol/link.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from docs.generate.markdown import code, table
from tallystick.protocol import (
    job_link,
    link,
    options,
    plaintext_heads,
    queue_place,
    replicas,
    sealing,
    trace_context,
    versions,
    wire,
)

INTRODUCTION = """# Wire protocol

Clients and nodes keep one WebSocket each open to the coordinator; a client may also post a job over HTTP. All carry binary
frames. The coordinator reads what stands before the sealed bytes and forwards those, which it cannot open.

Numbers are big-endian. Orders, terms and receipts travel as the bytes that are signed: see
[binary form](messages.md#binary-form).

| bytes | layout |
|---|---|
| submission: body of `POST /v1/jobs` | 1 byte protocol, 16 bytes job id, [options](#options), candidates, sealed request |
| candidates | 1 byte number, and each candidate behind its length in 2 bytes |
| candidate | the signed order, the terms, then the wrapped key |
| dispatch: payload of a `DISPATCH` frame | 1 byte protocol, 2 bytes length, match, 2 bytes length, candidate, sealed request |
| match: payload of `MATCH` and `HEDGE` frames | 8 bytes leaf number, 16 bytes secret, 32 bytes order, the leaf |
| payload of a `RECEIPT` or `VOID` frame | the signed receipt |
| payload of a `FAIL` frame | an OpenAI error object as JSON; from a node, also a zero byte and the signed receipt |
| response frame: coordinator to client | 1 byte kind, 4 bytes length, payload |
| link frame: one WebSocket message of a node's link | 1 byte kind, 16 bytes job id, payload |
| message of a client's link | records: 4 bytes stream, 4 bytes length, and that many bytes of response frames |

{protocol}

A job's life in frames is drawn in [the life of a job](../explanation/life-of-a-job.md).
"""


def pages() -> dict[str, str]:
    """The page of the wire protocol."""
    parts = [
        INTRODUCTION.replace("{protocol}", _protocol()),
        "## Options\n",
        (inspect.getdoc(options) or "").partition("\n\n")[2] + "\n",
        table(("number", "option", "value"), _options()),
        "## Frame kinds\n",
        table(("number", "kind", "direction", "payload"), _kinds()),
        "## The link of a client\n",
        (inspect.getdoc(job_link) or "")
        .partition("\n\n")[2]
        .replace("\nclient ->", "\n```text\nclient ->", 1)
        .replace("\n\nOf each", "\n```\n\nOf each", 1)
        + "\n",
        "## Replicas\n",
        (inspect.getdoc(replicas) or "").partition("\n\n")[2] + "\n",
        (inspect.getdoc(replicas.replica_order) or "").partition("\n\n")[2] + "\n",
        "## Limits\n",
        table(("limit", "value"), _limits()),
        "## Headers and payloads\n",
        "The members of each structure; JSON payloads use these names. `Signed[X]` is a [signed message](messages.md).\n",
        *_structures(wire),
        *_structures(plaintext_heads),
        *_structures(queue_place),
        *_structures(link),
        *_structures(replicas),
        "### TraceContext\n",
        (inspect.getdoc(trace_context) or "") + "\n",
        "## Sealing\n",
        (inspect.getdoc(sealing) or "") + "\n",
    ]
    return {"wire.md": "\n".join(parts)}


def _protocol() -> str:
    return (
        f"The protocol is version {versions.PROTOCOL}, which release {versions.SINCE} introduced. `GET /v1/info`,\n"
        "`CHALLENGE` and `HELLO` name it as `protocol`; version 1, whose submissions were JSON, did not. A peer of\n"
        "another version gets an error that says which side to upgrade."
    )


def _options() -> Iterator[tuple[str, str, str]]:
    docs = {"ranked": "nothing: the option is there or not", "hints": "JSON of at most 255 bytes: `RankingHints`"}
    docs |= {"batch": docs["ranked"], "trace": "25 bytes: trace id (16), span id (8), flags (1), of W3C Trace Context"}
    for option in wire.SUBMISSION_OPTIONS:
        yield str(option.number), code(option.name), docs.get(option.field, "4 bytes, a whole number")


def _kinds() -> Iterator[tuple[str, str, str, str]]:
    for name, number, comment in re.findall(r"^    ([A-Z_]+) = (\d+)  # (.*)$", inspect.getsource(wire.Kind), re.MULTILINE):
        direction, _, payload = comment.replace("->", "→").partition(": ")
        yield number, code(name), direction, re.sub(r"(Signed\[\w+\]|\{.*?\})", r"`\1`", payload)


def _limits() -> Iterator[tuple[str, str]]:
    for module in (wire, link, job_link, replicas):
        for name, value in vars(module).items():
            if (
                re.match(r"(MAX|INITIAL|WINDOW|CREDIT)_", name)
                and isinstance(value, int)
                and module.__name__ in _home(module, name)
            ):
                yield code(name), f"{value:,}" if value < 1 << 40 else f"2^{value.bit_length()} - 1"


def _home(module: Any, name: str) -> str:
    return module.__name__ if re.search(rf"^(.*, )?{name}\b.* = ", inspect.getsource(module), re.MULTILINE) else ""


def _structures(module: Any) -> Iterator[str]:
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    for cls in sorted(classes, key=lambda cls: inspect.getsourcelines(cls)[1]):
        if dataclasses.is_dataclass(cls):
            yield f"### {cls.__name__}\n"
            yield (inspect.getdoc(cls) or "") + "\n"
            yield table(("member", "type"), _members(cls))


def _members(cls: Any) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(cls):
        if field.compare and field.repr:
            head, *rest = field.name.split("_")
            yield (
                code(head + "".join(part.capitalize() for part in rest)),
                code(re.sub(r"tuple\[(.*), \.\.\.\]", r"list of \1", str(field.type))),
            )

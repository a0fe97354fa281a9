"""Heads of the plaintexts that only client and node see.

The plaintext of a request is a JSON line (`RequestHead`) followed by the client's body. The plaintext of a response is a JSON
object (`ResponseHead`) as the first chunk, followed by the engine's body in chunks. Only client and node see these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_content_type, read_count, read_flag, read_members, read_text
from tallystick.protocol.wire import dumps, loads


@dataclass(frozen=True, slots=True)
class RequestHead:
    """The first line of a request's plaintext: the OpenAI route, and the content type of the body.

    `log_head`: the newest head of the coordinator's match log that the client knows, as in `ResponseHead`. `evidence`: whether
    the client wants the rows of evidence (token_evidence.py) with the response.
    """

    path: str
    content_type: str = "application/json"
    log_head: bytes = b""
    evidence: bool = False


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The first chunk of a response's plaintext: the engine's HTTP status and content type.

    `log_head`: the newest head of the coordinator's match log that the node knows (match_log.pack_head). The coordinator can
    neither read it nor leave it out.
    """

    status: int
    content_type: str
    log_head: bytes = b""


def join_request(head: RequestHead, body: bytes) -> bytes:
    """The plaintext of a request."""
    members: dict[str, Any] = {"path": head.path, "contentType": head.content_type}
    if head.log_head:
        members["logHead"] = head.log_head.hex()
    if head.evidence:
        members["evidence"] = True
    return dumps(members) + b"\n" + body


def split_request(plain: bytes) -> tuple[RequestHead, bytes]:
    """Splits the plaintext of a request into its head and its body. Raises BadMessage."""
    line, separator, body = plain.partition(b"\n")
    if not separator:
        raise BadMessage("request: expected a head line that ends with LF")
    raw = loads(line, "request head")
    path, content_type = read_members(raw, "request head", "path", "contentType")
    head = RequestHead(
        read_text(path, "request.path"),
        read_content_type(content_type, "request.contentType"),
        read_log_head(raw, "request.logHead"),
        read_flag(raw.get("evidence", False), "request.evidence"),
    )
    return head, body


def dump_response_head(head: ResponseHead) -> bytes:
    """The first plaintext chunk of a response."""
    members: dict[str, Any] = {"status": head.status, "contentType": head.content_type}
    if head.log_head:
        members["logHead"] = head.log_head.hex()
    return dumps(members)


def read_log_head(raw: dict[str, Any], where: str) -> bytes:
    """The member `logHead` of an object: a head as match_log.pack_head gives it, unread; empty if absent. Raises BadMessage."""
    packed = raw.get("logHead")
    try:
        return b"" if packed is None else bytes.fromhex(read_text(packed, where))
    except ValueError:
        raise BadMessage(f"{where}: expected hex digits") from None


def load_response_head(chunk: bytes) -> ResponseHead:
    """Reads the first plaintext chunk of a response. Raises BadMessage."""
    raw = loads(chunk, "response head")
    status, content_type = read_members(raw, "response head", "status", "contentType")
    return ResponseHead(
        read_count(status, "response.status", 100, 599),
        read_content_type(content_type, "response.contentType"),
        read_log_head(raw, "response.logHead"),
    )

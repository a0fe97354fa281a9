"""The link between a client and a coordinator: one WebSocket (LINK_PATH) that carries many jobs. Pure.

A binary message is one or more records. A record is 4 bytes stream, 4 bytes length, and that many bytes of whole response frames
(wire.py). Numbers are big-endian. The client numbers the streams upwards from 1, and uses no number twice; stream 0 is the link's
own. The handshake is HELLO from the client and WELCOME, both on stream 0 and with the sender's protocol.

client -> coordinator
    SUBMIT   opens a stream: 4 bytes linger in seconds (NO_LINGER: the job ends with its client), then the Submission
    CREDIT   4 bytes: so many further bytes of frames were read
    CANCEL   stops the job; its receipt still ends the stream. Only for a job that ends with its client
    ORDERS   further orders for a job that waits; ADDED answers them
    LEAVE    the client reads no further. An ordinary job is cancelled, one that lingers goes on for a while
coordinator -> client
    the frames of the response, as POST /v1/jobs answers them; END ends the stream after the last one
    ERROR    ends the stream: the job was refused, or its frames can no longer be had. On stream 0 it ends the link

Of each stream, WINDOW_BYTES of frames may be on their way: the coordinator sends no more until it has CREDIT for them. So a
stream that is read slowly holds no other one up.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from tallystick.protocol.codecs import pack_sized, unpack_sized
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.json_members import read_text
from tallystick.protocol.versions import PROTOCOL, check_protocol
from tallystick.protocol.wire import MAX_FRAME, Candidate, Kind, dumps, loads, read_kind

LINK_PATH = "/v1/link"
LAST_FRAMES = frozenset((Kind.RECEIPT, Kind.FAIL))
"""Frames that end a job."""
LINK_STREAM = 0
MAX_STREAM = (1 << 32) - 1
NO_LINGER = (1 << 32) - 1
MAX_SUBMISSION = 192 * 1024
"""Bytes of a submission on the link. A larger one is posted to /v1/jobs, so that it holds no other job up."""
MAX_CLIENT_MESSAGE = 256 * 1024
"""Bytes of a client's message, after its HELLO."""
MAX_HELLO_MESSAGE = 4_096
MAX_COORDINATOR_MESSAGE = 2 * MAX_FRAME
"""Bytes of a coordinator's message."""
WINDOW_BYTES = 256 * 1024
"""Bytes of one stream's frames that the client has not read."""
CREDIT_BYTES = WINDOW_BYTES // 4
"""Bytes that a client reads before it grants more."""
MAX_SOFTWARE = 64
_RECORD, _FRAME, _ONE_FRAME, _SUBMIT = struct.Struct(">II"), struct.Struct(">BI"), struct.Struct(">IIBI"), struct.Struct(">I")
RECORD_HEAD, FRAME_HEAD, ONE_FRAME_HEAD = _RECORD.size, _FRAME.size, _ONE_FRAME.size


def record_head(stream: int, kind: int, size: int) -> bytes:
    """What precedes the payload of `size` bytes of a record of one frame."""
    return _ONE_FRAME.pack(stream, FRAME_HEAD + size, kind, size)


def pack_record(stream: int, kind: Kind, payload: bytes = b"") -> bytes:
    """A record of one frame."""
    return record_head(stream, kind, len(payload)) + payload


def frames_head(stream: int, size: int) -> bytes:
    """What precedes `size` bytes of packed frames in a record."""
    return _RECORD.pack(stream, size)


def read_records(message: bytes) -> Iterator[tuple[int, Kind, bytes]]:
    """Yields stream, kind and payload of each frame of a message. Raises BadMessage."""
    at, end = 0, len(message)
    if not end:
        raise BadMessage("link: expected at least one record, got an empty message")
    while at < end:
        if end - at < RECORD_HEAD:
            raise BadMessage(f"link: expected the {RECORD_HEAD} bytes that begin a record, got {end - at}")
        stream, size = _RECORD.unpack_from(message, at)
        at += RECORD_HEAD
        stop = at + size
        if stop > end or not size:
            raise BadMessage(f"link: expected a record of 1 to {end - at} bytes, got {size}")
        while at < stop:
            if stop - at < FRAME_HEAD:
                raise BadMessage(f"link: expected the {FRAME_HEAD} bytes that begin a frame, got {stop - at}")
            number, size = _FRAME.unpack_from(message, at)
            at += FRAME_HEAD
            if at + size > stop:
                raise BadMessage(f"link: expected a frame of at most {stop - at} bytes, got {size}")
            yield stream, read_kind(number), message[at : at + size]
            at += size


def split_frames(frames: bytes, limit: int) -> Iterator[bytes]:
    """Cuts packed frames into pieces of whole frames, each of at most `limit` bytes or of one frame. Raises BadMessage."""
    begin, at, end = 0, 0, len(frames)
    if end <= limit:
        yield frames
        return
    while at < end:
        if end - at < FRAME_HEAD:
            raise BadMessage("frames: cut off in the head of a frame")
        after = at + FRAME_HEAD + _FRAME.unpack_from(frames, at)[1]
        if after > end:
            raise BadMessage("frames: cut off in a frame")
        if after - begin > limit and at > begin:
            yield frames[begin:at]
            begin = at
        at = after
    yield frames[begin:]


def pack_greeting(software: str = "") -> bytes:
    """The payload of HELLO, with the client's `software`, and of WELCOME."""
    return dumps({"protocol": PROTOCOL} | ({"software": software} if software else {}))


def read_greeting(payload: bytes, where: str, peer: str) -> str:
    """The peer's software, "" if it did not say. `peer`: such as "the client". Raises BadMessage, also for another protocol."""
    raw = loads(payload, where)
    if not isinstance(raw, dict):
        raise BadMessage(f"{where}: expected a JSON object")
    check_protocol(raw.get("protocol"), where, peer)
    return read_text(raw.get("software", ""), f"{where}.software", MAX_SOFTWARE)


def pack_submit(submission: bytes, linger: int | None) -> bytes:
    """The payload of SUBMIT. `linger`: seconds for which the job goes on without a client; None: not at all."""
    return _SUBMIT.pack(NO_LINGER if linger is None else linger) + submission


def read_submit(payload: bytes) -> tuple[int | None, bytes]:
    """Reads a SUBMIT's payload: the linger in seconds, None without one, and the submission. Raises BadMessage."""
    linger = read_number(payload[: _SUBMIT.size], "submit.linger")
    return None if linger == NO_LINGER else linger, payload[_SUBMIT.size :]


def pack_number(number: int) -> bytes:
    """The payload of CREDIT."""
    return _SUBMIT.pack(number)


def read_number(payload: bytes, where: str) -> int:
    """Reads a number of 4 bytes. Raises BadMessage."""
    if len(payload) != _SUBMIT.size:
        raise BadMessage(f"{where}: expected {_SUBMIT.size} bytes, got {len(payload)}")
    return int.from_bytes(payload, "big")


def pack_orders(candidates: Sequence[Candidate]) -> bytes:
    """The payload of ORDERS. Raises BadMessage."""
    return b"".join(pack_sized(candidate.to_bytes()) for candidate in candidates)


def read_orders(payload: bytes) -> list[Candidate]:
    """Reads an ORDERS' payload: 1 to MAX_CANDIDATES candidates. Raises BadMessage."""
    at, candidates = 0, list[Candidate]()
    while at < len(payload):
        if len(candidates) == MAX_CANDIDATES:
            raise BadMessage(f"orders: expected at most {MAX_CANDIDATES} candidates")
        where = f"orders[{len(candidates)}]"
        raw, at = unpack_sized(payload, at, where)
        candidates.append(Candidate.from_bytes(raw, where))
    if not candidates:
        raise BadMessage("orders: expected at least one candidate")
    return candidates

"""Decodes the content codings of request bodies (RFC 9110, 8.4.1; zstd: RFC 8878; br: RFC 7932), in bounded memory. Pure.

A few bytes may decode to gigabytes. Therefore decoders return at most STEP_BYTES at a time, and no stage of several codings
returns more than the caller's limit in all.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import brotli

from tallystick.protocol.errors import BadMessage, Code, Refusal

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

STEP_BYTES: Final = 64 * 1024
"""Bytes that a decoder returns at a time. Brotli may return twice as many."""
MAX_CODINGS: Final = 4
"""The most codings that one body may have."""
MAX_MEMBERS: Final = 1_024
"""The most gzip members or zstd frames of one body (those of parallel encoders)."""
_SLICE_BYTES = 16 * 1024
"""Bytes that a decoder gets at a time. zlib copies what is left of them at every step."""
_ZSTD_WINDOW_LOG = 23
"""The largest window that a zstd content coding may need, as a power of two (RFC 9659)."""
_NO_CODINGS = frozenset({"", "identity", "utf-8", "utf8"})
"""Names that stand for no coding. Some clients take the header for that of the character set."""
_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15


def read_codings(headers: Iterable[str]) -> tuple[str, ...]:
    """The codings that the values of Content-Encoding headers list, in the order in which they were applied.

    Raises Refusal (unsupported_encoding) for an unknown coding, BadMessage for more than MAX_CODINGS.
    """
    names = [name.strip().lower() for value in headers for name in value.split(",")]
    codings = tuple(name.removeprefix("x-") for name in names if name not in _NO_CODINGS)
    for coding in codings:
        if coding not in SUPPORTED:
            supported = ", ".join(SUPPORTED)
            text = (
                f"Content-Encoding: expected some of {supported}, got {coding[:60]!r}; send the body in one of them, or as it is"
            )
            raise Refusal(Code.UNSUPPORTED_ENCODING, text)
    if len(codings) > MAX_CODINGS:
        raise BadMessage(f"Content-Encoding: expected at most {MAX_CODINGS} codings, got {len(codings)}")
    return codings


def decode(body: bytes, codings: Iterable[str], limit: int, setting: str = "the most") -> Iterator[bytes]:
    """Decodes a body piece by piece. The last of `codings` is decoded first. `setting`: what sets the limit, for errors.

    Raises BadMessage for data that does not decode or is cut off, and Refusal if a stage returns more than `limit` bytes.
    """
    pieces: Iterable[bytes] = (body[at : at + _SLICE_BYTES] for at in range(0, len(body), _SLICE_BYTES))
    for coding in reversed(tuple(codings)):
        pieces = _stage(coding, pieces, limit, setting)
    yield from pieces


def _stage(coding: str, pieces: Iterable[bytes], limit: int, setting: str) -> Iterator[bytes]:
    size = 0
    try:
        for piece in _DECODERS[coding](pieces):
            size += len(piece)
            if size > limit:
                text = f"request body: expected at most {limit} bytes after decoding {coding} ({setting})"
                raise Refusal(Code.BODY_TOO_LARGE, text)
            yield piece
    except (zlib.error, brotli.error, zstd.ZstdError, EOFError) as error:
        text = f"request body: expected {coding} data, as its Content-Encoding says, got data that does not decode: {error}"
        raise BadMessage(text) from None


def _inflate(pieces: Iterable[bytes], window: int, members: int) -> Iterator[bytes]:
    """Decodes up to `members` zlib streams, one after another."""
    decoder: Any = None
    ended = 0
    for piece in pieces:
        data = piece
        while data:
            if ended == members:
                raise EOFError(f"more data follows the end of {members} streams")
            decoder = decoder or zlib.decompressobj(window)
            output = decoder.decompress(data, STEP_BYTES)
            while output:
                yield output
                output = b"" if decoder.eof else decoder.decompress(decoder.unconsumed_tail, STEP_BYTES)
            data = decoder.unused_data
            if decoder.eof:
                ended, decoder = ended + 1, None
    if decoder is not None:
        raise EOFError("it is cut off")


def _gunzip(pieces: Iterable[bytes]) -> Iterator[bytes]:
    return _inflate(pieces, _GZIP, MAX_MEMBERS)


def _undeflate(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Decodes zlib data (RFC 1950) or, as some clients send it, bare deflate data (RFC 1951)."""
    remaining = iter(pieces)
    head = b""
    while len(head) < 2 and (piece := next(remaining, b"")):
        head += piece
    is_zlib = len(head) > 1 and head[0] & 0x0F == zlib.DEFLATED and int.from_bytes(head[:2], "big") % 31 == 0
    return _inflate(_chain(head, remaining), _ZLIB if is_zlib else _RAW_DEFLATE, 1)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


def _unbrotli(pieces: Iterable[bytes]) -> Iterator[bytes]:
    decoder = brotli.Decompressor()
    fed = False
    for piece in pieces:
        fed = fed or bool(piece)
        output = decoder.process(piece, output_buffer_limit=STEP_BYTES)
        while output or not decoder.can_accept_more_data():
            yield output
            if decoder.is_finished():
                break
            output = decoder.process(b"", output_buffer_limit=STEP_BYTES)
    if fed and not decoder.is_finished():
        raise EOFError("it is cut off")


def _unzstd(pieces: Iterable[bytes]) -> Iterator[bytes]:
    decoder: Any = None
    ended = 0
    for piece in pieces:
        data = piece
        while data or (decoder is not None and not decoder.needs_input):
            if ended == MAX_MEMBERS:
                raise EOFError(f"more data follows the end of {MAX_MEMBERS} frames")
            decoder = decoder or zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG})
            if output := decoder.decompress(data, STEP_BYTES):
                yield output
            data = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                ended, decoder = ended + 1, None
    if decoder is not None:
        raise EOFError("it is cut off")


_DECODERS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    "gzip": _gunzip,
    "deflate": _undeflate,
    "br": _unbrotli,
    "zstd": _unzstd,
}
SUPPORTED: Final = tuple(_DECODERS)
"""The codings that are decoded, as Accept-Encoding lists them."""

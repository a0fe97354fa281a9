"""Content codings: each coding and their combinations, data that does not decode, and data that decodes to too much."""

from __future__ import annotations

import gzip
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest

from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.runtime.content_encoding import MAX_CODINGS, MAX_MEMBERS, STEP_BYTES, SUPPORTED, decode, read_codings

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT = b'{"model": "m"}'
LONG = random.Random(7).randbytes(300_000) + bytes(700_000)
LIMIT = 1 << 30


def _bare_deflate(data: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(data) + encoder.flush()


def _without_size(data: bytes) -> bytes:
    """A zstd frame as streams have it, which does not tell its size."""
    encoder = zstd.ZstdCompressor()
    return encoder.compress(data[:10], zstd.ZstdCompressor.FLUSH_BLOCK) + encoder.compress(data[10:]) + encoder.flush()


def _with_checksum(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip, two members": ("gzip", lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:])),
    "deflate": ("deflate", zlib.compress),
    "deflate, level 0": ("deflate", lambda data: zlib.compress(data, 0)),
    "deflate without a head": ("deflate", _bare_deflate),
    "br": ("br", lambda data: brotli.compress(data, quality=4)),
    "br, small window": ("br", lambda data: brotli.compress(data, quality=4, lgwin=10)),
    "zstd": ("zstd", zstd.compress),
    "zstd, two frames": ("zstd", lambda data: zstd.compress(data[:5]) + zstd.compress(data[5:])),
    "zstd, no size": ("zstd", _without_size),
    "zstd, checksum": ("zstd", _with_checksum),
}


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize("data", [b"", TEXT, LONG, LONG[: STEP_BYTES * 2]], ids=len)
def test_each_coding_is_decoded(form: str, data: bytes) -> None:
    """Whatever its form, a body decodes to what was encoded, in pieces of bounded size."""
    coding, encode = ENCODERS[form]
    pieces = list(decode(encode(data), [coding], LIMIT))
    assert b"".join(pieces) == data
    assert all(len(piece) <= 2 * STEP_BYTES for piece in pieces)


@pytest.mark.parametrize("outer", ENCODERS)
@pytest.mark.parametrize("inner", ENCODERS)
def test_combinations_are_decoded_in_reverse(inner: str, outer: str) -> None:
    """Codings are listed in the order in which they were applied."""
    body = ENCODERS[outer][1](ENCODERS[inner][1](LONG))
    assert b"".join(decode(body, [ENCODERS[inner][0], ENCODERS[outer][0]], LIMIT)) == LONG


def test_no_coding_leaves_the_body() -> None:
    """Without a coding the body is as it came."""
    assert b"".join(decode(TEXT, [], LIMIT)) == TEXT


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize("data", [TEXT, LONG], ids=len)
def test_what_is_cut_off(form: str, data: bytes) -> None:
    """Data that ends too early is refused at every place, and the coding is named."""
    coding, encode = ENCODERS[form]
    body = encode(data)
    for size in (1, 2, len(body) // 3, len(body) - 1):
        with pytest.raises(BadMessage, match=f"expected {coding} data, as its Content-Encoding says"):
            list(decode(body[:size], [coding], LIMIT))


@pytest.mark.parametrize("form", ENCODERS)
@pytest.mark.parametrize("junk", [TEXT, b"junk", b"\0", b"\xff" * 40], ids=repr)
def test_what_is_not_encoded_so(form: str, junk: bytes) -> None:
    """Data of another kind is refused, alone and behind whole data."""
    coding, encode = ENCODERS[form]
    for body in (junk, encode(TEXT) + junk):
        with pytest.raises(BadMessage, match="Content-Encoding"):
            list(decode(body, [coding], LIMIT))


@pytest.mark.parametrize("form", [form for form in ENCODERS if form in ("gzip", "deflate", "zstd, checksum")])
def test_what_was_altered(form: str) -> None:
    """A changed byte is found by the coding's checksum."""
    coding, encode = ENCODERS[form]
    body = bytearray(encode(LONG))
    body[1_000] ^= 1
    with pytest.raises(BadMessage, match="Content-Encoding"):
        list(decode(bytes(body), [coding], LIMIT))


@pytest.mark.parametrize("form", [form for form in ENCODERS if "level 0" not in form])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_bomb_is_refused_before_the_memory_grows(form: str, layers: int) -> None:
    """Decoding ends at the limit, also within codings, with little memory used and the coding named."""
    coding, encode = ENCODERS[form]
    body = encode(bytes(1 << 24))
    for _ in range(layers - 1):
        body = encode(body)
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match=f"at most 1000000 bytes after decoding {coding}") as caught:
            for _ in decode(body, [coding] * layers, 1_000_000):
                pass
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert caught.value.code is Code.BODY_TOO_LARGE


def test_a_bomb_within_a_small_answer() -> None:
    """A stage between counts too: what decodes to little may be gigabytes on its way."""
    inner = gzip.compress(b"")
    inner = inner[:3] + b"\x08" + inner[4:10] + b"n" * 1_000_000 + b"\0" + inner[10:]  # a file's name, which is no output
    assert b"".join(decode(inner, ["gzip"], 1)) == b""
    with pytest.raises(Refusal, match="after decoding br"):
        list(decode(brotli.compress(inner, quality=4), ["gzip", "br"], 1_000_000))


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_members_are_limited(form: str) -> None:
    """Empty members cost a decoder each, so their number is limited."""
    coding, encode = ENCODERS[form]
    assert b"".join(decode(encode(b"a") * MAX_MEMBERS, [coding], LIMIT)) == b"a" * MAX_MEMBERS
    with pytest.raises(BadMessage, match=f"follows the end of {MAX_MEMBERS}"):
        list(decode(encode(b"") * (MAX_MEMBERS + 1), [coding], LIMIT))


@pytest.mark.parametrize("form", ENCODERS)
def test_the_limit_is_inclusive(form: str) -> None:
    """A body of exactly the limit is decoded, one byte more is refused."""
    coding, encode = ENCODERS[form]
    assert len(b"".join(decode(encode(LONG), [coding], len(LONG)))) == len(LONG)
    with pytest.raises(Refusal):
        list(decode(encode(LONG), [coding], len(LONG) - 1))


def test_a_huge_window_is_refused() -> None:
    """A zstd frame may not make the decoder reserve more than 8 MiB (RFC 9659)."""
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    encoder = zstd.ZstdCompressor(options=options)
    with pytest.raises(BadMessage, match="zstd"):
        list(decode(encoder.compress(LONG) + encoder.flush(), ["zstd"], LIMIT))


@pytest.mark.parametrize(
    ("headers", "codings"),
    [
        ([], ()),
        ([""], ()),
        (["identity"], ()),
        (["UTF-8"], ()),
        (["utf8, gzip"], ("gzip",)),
        (["GZIP"], ("gzip",)),
        (["x-gzip"], ("gzip",)),
        (["X-GZip, Identity , br"], ("gzip", "br")),
        (["zstd", " deflate"], ("zstd", "deflate")),
        (["gzip," * MAX_CODINGS], ("gzip",) * MAX_CODINGS),
    ],
)
def test_headers_are_read(headers: list[str], codings: tuple[str, ...]) -> None:
    """Case, spaces, `identity`, `x-` and several headers are as in RFC 9110."""
    assert read_codings(headers) == codings


@pytest.mark.parametrize("name", ["compress", "x-compress", "lz4", "utf-16", "gzip;q=1", "aws-chunked"])
def test_unknown_codings(name: str) -> None:
    """An unknown coding is named, with the supported ones."""
    with pytest.raises(Refusal, match="gzip, deflate, br, zstd") as caught:
        read_codings(["gzip", name])
    assert caught.value.code is Code.UNSUPPORTED_ENCODING
    assert name.removeprefix("x-") in str(caught.value)


def test_too_many_codings() -> None:
    """A body with more codings than anybody needs is refused."""
    with pytest.raises(BadMessage, match=f"at most {MAX_CODINGS} codings, got {MAX_CODINGS + 1}"):
        read_codings(["gzip"] * (MAX_CODINGS + 1))
    assert SUPPORTED == ("gzip", "deflate", "br", "zstd")

"""Sealed requests and responses, which the coordinator can forward but not read, alter, reorder or correlate."""

from __future__ import annotations

import base64
import hashlib
import os
import random
from itertools import permutations

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol import sealing
from tallystick.protocol.errors import BadSeal
from tallystick.protocol.sealing import (
    HYBRID,
    KEY_BYTES,
    MAX_SESSIONS,
    SUITES,
    X25519,
    ContentKey,
    KeySession,
    Opener,
    Sealer,
    SealingKey,
    Transcript,
    bucket,
    commit_request,
    is_evidence,
    wrap_key,
)
from tallystick.protocol.types import Address, Hash, JobId
from tests.protocol.strategies import few, many, some

JOB, OTHER_JOB = JobId(b"j" * 16), JobId(b"k" * 16)
ORDER, OTHER_ORDER = Hash(b"o" * 32), Hash(b"p" * 32)
PROVIDER, OTHER_PROVIDER = Address("0x" + "11" * 20), Address("0x" + "22" * 20)
KEY = ContentKey(bytes(range(32)))
OTHER_KEY = ContentKey(bytes(range(1, 33)))
SEALING = {suite: SealingKey(suite, bytes(range(SealingKey.secret_bytes(suite)))) for suite in SUITES}
OVERHEAD = 16
bodies = st.binary(max_size=600)
keys = st.binary(min_size=32, max_size=32).map(ContentKey)
chunk_lists = st.lists(st.binary(max_size=300), min_size=1, max_size=6)


def sealed_stream(chunks: list[bytes], key: ContentKey = KEY, order: Hash = ORDER) -> list[bytes]:
    """Seals all chunks of a response, with the last one marked."""
    sealer = Sealer(key, JOB, order)
    return [sealer.seal(chunk, last=i == len(chunks) - 1) for i, chunk in enumerate(chunks)]


def flipped(data: bytes, bit: int) -> bytes:
    """Returns the data with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# Reasons


@given(keys, st.text(max_size=300))
@some
def test_a_reason_opens_with_its_key_and_order(key: ContentKey, reason: str) -> None:
    """A node's words about a failed order open for its client alone; equal words look different."""
    first, second = key.seal_reason(ORDER, reason), key.seal_reason(ORDER, reason)
    assert first != second
    assert key.open_reason(ORDER, first) == reason.encode(errors="replace").decode()
    for opener, order in ((OTHER_KEY, ORDER), (key, OTHER_ORDER)):
        with pytest.raises(BadSeal):
            opener.open_reason(order, first)


@pytest.mark.parametrize("sealed", ["", "!", "YQ==", base64.b64encode(bytes(200)).decode(), "é" * 40])
def test_garbage_is_no_reason(sealed: str) -> None:
    """What does not open is refused, whatever it is."""
    with pytest.raises(BadSeal):
        KEY.open_reason(ORDER, sealed)


def test_only_the_bucket_of_a_reason_shows() -> None:
    """Reasons of similar length have the same size."""
    assert len({len(KEY.seal_reason(ORDER, "x" * size)) for size in (0, 1, 60, 124)}) == 1


# Requests


@given(keys, bodies)
@some
def test_a_request_opens_with_its_key_and_job(key: ContentKey, body: bytes) -> None:
    """A sealed request opens to the same bytes."""
    assert key.open_request(JOB, key.seal_request(JOB, body)) == body


@pytest.mark.parametrize("size", [0, 1, 123, 124, 125, 16_380, 16_381, 1_000_000])
def test_requests_of_every_size_travel(size: int) -> None:
    """Requests of sizes around the bucket edges, and large ones, survive sealing."""
    body = os.urandom(size)
    assert KEY.open_request(JOB, KEY.seal_request(JOB, body)) == body


@given(bodies, st.data())
@many
def test_a_request_with_any_bit_flipped_does_not_open(body: bytes, data: st.DataObject) -> None:
    """One changed bit in text, padding or tag raises BadSeal."""
    sealed = KEY.seal_request(JOB, body)
    with pytest.raises(BadSeal):
        KEY.open_request(JOB, flipped(sealed, data.draw(st.integers(0, len(sealed) * 8 - 1))))


@given(bodies, st.data())
@some
def test_a_request_cut_or_grown_does_not_open(body: bytes, data: st.DataObject) -> None:
    """A request with bytes removed or added at the end, also an empty one, raises BadSeal."""
    sealed = KEY.seal_request(JOB, body)
    for wrong in (sealed[: data.draw(st.integers(0, len(sealed) - 1))], sealed + b"\0", b""):
        with pytest.raises(BadSeal):
            KEY.open_request(JOB, wrong)


def test_a_request_is_bound_to_its_job_and_key() -> None:
    """A request does not open with another job id or another key."""
    sealed = KEY.seal_request(JOB, b"body")
    with pytest.raises(BadSeal, match="the request was altered"):
        KEY.open_request(OTHER_JOB, sealed)
    with pytest.raises(BadSeal, match="the request was altered"):
        OTHER_KEY.open_request(JOB, sealed)


@given(st.binary(max_size=2_000))
@some
def test_random_bytes_are_no_request_and_no_chunk(garbage: bytes) -> None:
    """Bytes that were never sealed raise BadSeal and nothing else."""
    with pytest.raises(BadSeal):
        KEY.open_request(JOB, garbage)
    with pytest.raises(BadSeal):
        Opener(KEY, JOB, ORDER).open(garbage)


# Sizes


@given(st.integers(0, 2_000_000))
@many
def test_buckets_hide_sizes(size: int) -> None:
    """A bucket holds its size; it is a power of two from 128 on or a multiple of 16 KiB, and above 128 more than half full."""
    padded = bucket(size)
    assert padded >= size
    assert padded >= 128
    if padded <= 16_384:
        assert padded & (padded - 1) == 0
        assert padded == 128 or padded < 2 * size
    else:
        assert padded % 16_384 == 0
        assert padded - size < 16_384
    assert bucket(padded) == padded, "a full bucket is not padded further"


@given(st.integers(0, 20_000), st.integers(0, 20_000))
@some
def test_only_the_bucket_shows_outside(first_size: int, second_size: int) -> None:
    """Two bodies, or two chunks, of one bucket have ciphertexts of equal length, which reveals only the bucket."""
    for size in (first_size, second_size):
        assert len(KEY.seal_request(JOB, bytes(size))) == bucket(size + 4) + OVERHEAD
        assert len(Sealer(KEY, JOB, ORDER).seal(bytes(size))) == 1 + bucket(size + 4) + OVERHEAD
    same = bucket(first_size + 4) == bucket(second_size + 4)
    assert (len(KEY.seal_request(JOB, bytes(first_size))) == len(KEY.seal_request(JOB, bytes(second_size)))) == same


@given(st.text(min_size=4, max_size=200).map(str.encode))
@some
def test_nothing_of_the_text_is_in_the_ciphertext(text: bytes) -> None:
    """No four bytes of a prompt or an answer appear in the ciphertext."""
    carried = KEY.seal_request(JOB, text) + b"".join(sealed_stream([text, text]))
    assert not any(text[i : i + 4] in carried for i in range(len(text) - 3))


def test_a_false_length_in_the_padding_is_refused() -> None:
    """A sealed length beyond the padding, which only a key holder could write, raises BadSeal."""
    cipher = KEY.response_cipher(ORDER)
    for plain in (b"", b"\0", b"\0\0\0\1", b"\xff\xff\xff\xff" + bytes(124)):
        lying = b"\0" + cipher.encrypt(bytes(12), plain, JOB + ORDER + b"\0")
        with pytest.raises(BadSeal, match="padding"):
            Opener(KEY, JOB, ORDER).open(lying)


# Responses


@given(keys, chunk_lists)
@some
def test_a_response_opens_in_order(key: ContentKey, chunks: list[bytes]) -> None:
    """Every chunk opens to its plaintext, and only the last one finishes the stream."""
    opener = Opener(key, JOB, ORDER)
    for i, sealed in enumerate(sealed_stream(chunks, key)):
        assert not opener.finished
        assert opener.open(sealed) == chunks[i]
    assert opener.finished


@given(chunk_lists, st.data())
@many
def test_a_chunk_with_any_bit_flipped_does_not_open(chunks: list[bytes], data: st.DataObject) -> None:
    """One changed bit, including the flag byte, raises BadSeal."""
    stream = sealed_stream(chunks)
    at = data.draw(st.integers(0, len(stream) - 1))
    opener = Opener(KEY, JOB, ORDER)
    for sealed in stream[:at]:
        opener.open(sealed)
    bit = data.draw(st.integers(0, 7) | st.integers(0, len(stream[at]) * 8 - 1))
    with pytest.raises(BadSeal, match=f"chunk {at} is altered"):
        opener.open(flipped(stream[at], bit))


def test_no_reordering_of_a_response_opens() -> None:
    """Of all orders of four equal chunks, only the right one opens."""
    stream = sealed_stream([b"same"] * 4)
    opened = 0
    for order in permutations(stream):
        opener = Opener(KEY, JOB, ORDER)
        try:
            opened += [opener.open(sealed) for sealed in order] == [b"same"] * 4
        except BadSeal:
            continue
    assert opened == 1


@given(st.integers(2, 6), st.data())
@some
def test_a_dropped_or_repeated_chunk_is_seen(count: int, data: st.DataObject) -> None:
    """A response with a chunk missing or repeated does not open beyond it; a response cut at its end is never finished."""
    stream = sealed_stream([bytes((i,)) for i in range(count)])
    at = data.draw(st.integers(0, count - 2))
    with pytest.raises(BadSeal, match=f"chunk {at} "):
        _open_all(stream[:at] + stream[at + 1 :])
    with pytest.raises(BadSeal, match=f"chunk {at + 1} "):
        _open_all([*stream[: at + 1], *stream[at:]])
    assert not _open_all(stream[: at + 1]).finished


def test_nothing_follows_the_last_chunk() -> None:
    """Neither side continues after the end."""
    opener = _open_all(sealed_stream([b"a", b"b"]))
    assert opener.finished
    with pytest.raises(BadSeal, match="follows the last one"):
        opener.open(sealed_stream([b"a", b"b", b"c"])[2])
    sealer = Sealer(KEY, JOB, ORDER)
    sealer.seal(b"", last=True)
    with pytest.raises(ValueError, match="sealed already"):
        sealer.seal(b"more")


@given(st.lists(st.integers(0, 5) | st.none(), max_size=30))
@many
def test_opened_chunks_are_always_a_prefix(arrivals: list[int | None]) -> None:
    """With chunks in any order, repeated, or mixed with garbage, what opens is a prefix of the response."""
    chunks = [bytes((i,)) * 3 for i in range(6)]
    stream = sealed_stream(chunks)
    opener, opened = Opener(KEY, JOB, ORDER), list[bytes]()
    for number in arrivals:
        try:
            opened.append(opener.open(os.urandom(150) if number is None else stream[number]))
        except BadSeal:
            continue
    assert opened == chunks[: len(opened)]
    assert opener.finished == (len(opened) == len(chunks))


def test_a_response_is_bound_to_key_job_and_order() -> None:
    """A chunk does not open with another key, job or order."""
    (sealed,) = sealed_stream([b"answer"])
    for opener in (Opener(OTHER_KEY, JOB, ORDER), Opener(KEY, OTHER_JOB, ORDER), Opener(KEY, JOB, OTHER_ORDER)):
        with pytest.raises(BadSeal):
            opener.open(sealed)


@given(keys, st.binary(max_size=300), st.integers(0, 3))
@some
def test_two_providers_of_a_shortlist_never_share_a_key_stream(key: ContentKey, chunk: bytes, number: int) -> None:
    """The same key, counter and plaintext under another order give another ciphertext; their XOR is not that of the
    plaintexts.
    """
    first = sealed_stream([chunk] * 4, key)[number]
    second = sealed_stream([chunk] * 4, key, OTHER_ORDER)[number]
    assert len(first) == len(second)
    assert first[1:17] != second[1:17], "with one key stream, equal texts would show as equal"


@given(keys, st.binary(max_size=300))
@some
def test_equal_chunks_look_different(key: ContentKey, chunk: bytes) -> None:
    """Repeated text in one response, or in request and response, gives different ciphertexts."""
    first, second, _ = sealed_stream([chunk] * 3, key)
    assert len({first[1:17], second[1:17], key.seal_request(JOB, chunk)[:16]}) == 3


def test_evidence_is_in_its_place_and_cannot_be_left_out() -> None:
    """A chunk of evidence says so, opens only in its order, and nothing after it opens if it is missing or passed off as text."""
    sealer = Sealer(KEY, JOB, ORDER)
    stream = [sealer.seal(b"a"), sealer.seal_evidence(b"rows"), sealer.seal(b"end", last=True)]
    opener = Opener(KEY, JOB, ORDER)
    assert [(opener.open(chunk), is_evidence(chunk), opener.finished) for chunk in stream] == [
        (b"a", False, False),
        (b"rows", True, False),
        (b"end", False, True),
    ]
    assert b"rows" not in stream[1]
    with pytest.raises(ValueError, match="last chunk"):
        sealer.seal_evidence(b"more")
    for changed in ([stream[0], stream[2]], [stream[0], b"\0" + stream[1][1:]], [stream[0], b"\1" + stream[1][1:]]):
        with pytest.raises(BadSeal):
            _open_all(changed)


def test_sealed_bytes_are_these() -> None:
    """Labels, nonces, padding and associated data are fixed, so a newer peer opens what an older one sealed."""
    parts = (
        KEY.seal_request(JOB, b"body"),
        *sealed_stream([b"first", b"last"]),
        KEY.commitment_key,
        commit_request(KEY.commitment_key, JOB, b"body"),
        _transcript([b"first", b"last"]),
    )
    assert [hashlib.sha256(part).hexdigest()[:16] for part in parts] == [
        "c2e354fdc4327494",
        "032a92b251709fe2",
        "b9bbb783619d538d",
        "88b928b1fe9f57e1",
        "a560f835e79991e3",
        "8f0902bf60656b3f",
    ]


@pytest.mark.parametrize(
    ("suite", "wrapped"),
    [
        (
            X25519,
            "Bfd6Ia5oW+W0YE8XGYOQfNkwxhORCjY8wEJlV/8sW1qTqMGYH73tr75akerce1/FEtv+ztK4gMJgyAE8VXyG6Lnt42lmktxNMnrKlFDAGTc=",
        ),
        (
            HYBRID,
            (
                "wqnhsgG/eha4DvDZdB/zDkx5JppK4W67xNgP6GQbOmV5L+DEPxNoldDeRvxz63PShGFbtauSkApIU6qyMqbEdD8AXymIia/nRYASfEtJ7zlpSa"
                "cJmGccA9g8CtZLgvy3+ai4QgMrzk6UkcopwjxzghS7EAtJx0c5jjkgjD4jXkQELlwdUj57HrC9VDuNLgy7WLEBDVu0W1MyDjk2oODCnVNyvTz4"
                "+WQZS3MeKh96T8tsfwtrJaApukTGUFM/lVdrJ4gdoyCB4jmcm6tuh1oy9PKjAVFwlp0jZD2O0ymdUCNdKDLdRmopmsgyf3fId6jGSi2i7tu1ug"
                "yB6RJ1r+Rq9mI2C23tcDoCrIk8lz6O9fJAgk4lvZXL+zC6SLnSA+/tcIdp9ah9AAZvjHqVJQT2hJ36LXxMHsm7EBqXiILy0cIhqxVpM4CeuITj"
                "xobjEty2mlamq0xmkz9zqmUjIlAhPN6gh//yBnXVEEgVYhBWMsLsaLlPOrGUwP2fBa35FgmggqzRWGjAw3RGFp07u8tTM9UQIdwTlP33tQWtZG"
                "nGV3L6f9eBocjWmZ7BVk44g1C//jhsAdHMmWDSqVXCywyzwmKf/aYMc8T/phOUMMdDaI7SVB6qBy9LIcX7CoiyH1+EaLwzHJlSiiEEipUIIYfZ"
                "SYofhLTUkffgEpgNtIQLelARgKZ19d/473sooEHh00wcez+3EE3EwubtAEw5l7vNowD9ziyJTDMsNmPBBrLSjrgsrsE4kmh/YoGeZkd5DRVuj3"
                "7eYeM0fkyf6qT3KhhV00nfCi5VnAnG9eF5U8y7ujDU+NrpiLCSMjiwqW746mOc57sAH0qqKv5hPPSm7LqL5zMgaUb4eILzG5fC2F4GxQ4fDtmC"
                "73VmahK3QWgaepT7If92OOIaK5b9jP6jjp/ZXiOhcvUnT0ror9YjCV5VSVQOZB1+/b7A8MG35aIHG9EIX42P6vtBu5QEBm5HPqOVoYtdsRvpR1"
                "D2VUQyiRxwwZcfK/ZxBAUAaDV42FV2X3vAqBhA5XTZ0atA0Yh+NjEP9oykMEMkgD5ZU57hWXV3XKmpGCZvs5kwBkeGTVDDN3s9pybKhAHVzbug"
                "F6jmf1R2xgXfUKEyZXBom7ehTTDiqBTfXNjbilmgzXq+7gmXim64NA5FWQeg5Vk0IwRAMhFXhcK6ya9ogw8rZWQycJvSkQXaELoz+0oAHsZOA2"
                "GFoagbrxOyJ/g2scGxx2q+8UPPo6B3+9/jb2/M8BaxaSEeVA57rfONNrgSAa9rezs7XV3cdRrCGIB1A2gEZ8TRSi9wI6w+S4XBguwkO93FpMgd"
                "Fhh5BMf2uwiIzOsX9vDlUZt4hkyAeXYRm7XbNp7lg3nxPrHn0O5DzMOYeoGgfpztxqgL0fwvP7HODBHP3ESqIMWFAAaKqZtOQg1Tt3Oldbu7Kc"
                "IYaXvhsLDnQLQ7ZAis3m7hgjr8MBq81p2DIHEvbBt2hxYZCjXB04NrAQ037z9MaC4SyF8FhkQndKeVh/Ve2pchvUAmzUHx5KwCBPcC8xjvfbkX"
                "UH7ai3PLsEf6DOHUQQ=="
            ),
        ),
    ],
)
def test_a_key_that_was_wrapped_long_ago_still_opens(suite: str, wrapped: str) -> None:
    """Wrapped keys of each suite, stored when this test was written, still open."""
    sealed = base64.b64decode(wrapped)
    assert SEALING[suite].unwrap(sealed, job=JOB, order_hash=ORDER, provider=PROVIDER) == KEY


# Wrapped keys


@pytest.mark.parametrize("suite", sorted(SUITES))
@given(keys)
@few
def test_a_wrapped_key_opens_for_its_provider(suite: str, key: ContentKey) -> None:
    """With both suites the provider gets the same content key, and two wraps of one key differ."""
    sealing = SEALING[suite]
    wraps = [wrap_key(key, suite, sealing.public, job=JOB, order_hash=ORDER, provider=PROVIDER) for _ in range(2)]
    assert wraps[0] != wraps[1]
    for wrapped in wraps:
        assert sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER) == key
        assert key.secret not in wrapped


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_a_wrapped_key_is_bound_to_job_order_and_provider(suite: str) -> None:
    """A wrapped key opens with no other job, order, provider or sealing key."""
    sealing = SEALING[suite]
    wrapped = wrap_key(KEY, suite, sealing.public, job=JOB, order_hash=ORDER, provider=PROVIDER)
    for job, order, provider in (
        (OTHER_JOB, ORDER, PROVIDER),
        (JOB, OTHER_ORDER, PROVIDER),
        (JOB, ORDER, OTHER_PROVIDER),
    ):
        with pytest.raises(BadSeal, match="wrapped for another provider or order"):
            sealing.unwrap(wrapped, job=job, order_hash=order, provider=provider)
    stranger = SealingKey(suite, os.urandom(SealingKey.secret_bytes(suite)))
    with pytest.raises(BadSeal, match="wrapped for another provider or order"):
        stranger.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", sorted(SUITES))
@given(st.data())
@few
def test_a_damaged_wrapped_key_does_not_open(suite: str, data: st.DataObject) -> None:
    """A flipped bit, a cut, an extension and random bytes raise BadSeal and nothing else."""
    sealing = SEALING[suite]
    wrapped = wrap_key(KEY, suite, sealing.public, job=JOB, order_hash=ORDER, provider=PROVIDER)
    for wrong in (
        flipped(wrapped, data.draw(st.integers(0, len(wrapped) * 8 - 1))),
        wrapped[: data.draw(st.integers(0, len(wrapped) - 1))],
        wrapped + b"\0",
        bytes(len(wrapped)),
        b"\xff" * len(wrapped),
        data.draw(st.binary(max_size=200)),
    ):
        with pytest.raises(BadSeal):
            sealing.unwrap(wrong, job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("size", [0, 1, 31, 33, 1_000])
def test_a_content_key_of_another_size_is_refused(suite: str, size: int) -> None:
    """A wrapped content key that is not 32 bytes long is refused."""
    sealing = SEALING[suite]
    wrapped = wrap_key(ContentKey(bytes(size)), suite, sealing.public, job=JOB, order_hash=ORDER, provider=PROVIDER)
    with pytest.raises(BadSeal, match=f"expected a content key of 32 bytes, got {size}"):
        sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", [*sorted(SUITES), "", "rot13", "X25519"])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 1_184, 1_216, 4_096])
def test_an_unusable_sealing_key_is_named(suite: str, size: int) -> None:
    """Unknown suites, keys of a wrong size, and invalid points (all zero, all ones) are the ask's fault."""
    for raw in (bytes(size), b"\xff" * size):
        if (suite, raw) == (X25519, b"\xff" * 32):
            continue  # allowed: RFC 7748 masks the top bit
        for _ in range(2):  # whether or not it was seen before
            with pytest.raises(BadSeal, match=r"ask\.sealingKey: expected a usable"):
                wrap_key(KEY, suite, raw, job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_a_sealing_key_is_made_from_exactly_its_secret(suite: str) -> None:
    """A secret always gives the same key; a secret of another size is refused and never cut."""
    size = SealingKey.secret_bytes(suite)
    assert SealingKey(suite, bytes(range(size))).public == SEALING[suite].public
    for wrong in (size - 1, size + 1, 128 - size):
        with pytest.raises(ValueError, match="secret of"):
            SealingKey(suite, bytes(wrong))


def test_the_suites_have_these_sizes() -> None:
    """The sizes of sealing keys and wrapped keys are those that the wire allows."""
    sizes = {
        s: (len(k.public), len(wrap_key(KEY, s, k.public, job=JOB, order_hash=ORDER, provider=PROVIDER)))
        for s, k in SEALING.items()
    }
    assert sizes == {X25519: (32, 80), HYBRID: (1_216, 1_168)}


# Sessions


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_the_jobs_of_a_session_open_one_by_one(suite: str) -> None:
    """A session wraps many keys. Each opens for its own job, order and provider alone, and shows neither key."""
    sealing, session = SEALING[suite], KeySession(suite, SEALING[suite].public)
    other = ContentKey(bytes(range(32)))
    first = session.wrap(KEY, job=JOB, order_hash=ORDER, provider=PROVIDER)
    second = session.wrap(other, job=OTHER_JOB, order_hash=OTHER_ORDER, provider=PROVIDER)
    assert sealing.unwrap(second, job=OTHER_JOB, order_hash=OTHER_ORDER, provider=PROVIDER) == other
    assert sealing.unwrap(first, job=JOB, order_hash=ORDER, provider=PROVIDER) == KEY
    size = len(first) - 48
    assert first[:size] == second[:size]
    assert first[size:] != second[size:]
    assert KEY.secret not in first
    for wrapped in (second, first[:size] + second[size:]):
        with pytest.raises(BadSeal, match="wrapped for another provider or order"):
            sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER)
    for job, order, provider in ((OTHER_JOB, ORDER, PROVIDER), (JOB, OTHER_ORDER, PROVIDER), (JOB, ORDER, OTHER_PROVIDER)):
        with pytest.raises(BadSeal, match="wrapped for another provider or order"):
            sealing.unwrap(first, job=job, order_hash=order, provider=provider)
    stranger = SealingKey(suite, os.urandom(SealingKey.secret_bytes(suite)))
    with pytest.raises(BadSeal, match="wrapped for another provider or order"):
        stranger.unwrap(first, job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_sessions_share_nothing(suite: str) -> None:
    """Two sessions with one provider have different keys, and neither opens what the other wrapped."""
    sealing = SEALING[suite]
    wraps = [KeySession(suite, sealing.public).wrap(KEY, job=JOB, order_hash=ORDER, provider=PROVIDER) for _ in range(2)]
    assert wraps[0][-48:] != wraps[1][-48:]
    with pytest.raises(BadSeal):
        sealing.unwrap(wraps[0][:-48] + wraps[1][-48:], job=JOB, order_hash=ORDER, provider=PROVIDER)


@pytest.mark.parametrize("suite", sorted(SUITES))
@given(st.data())
@few
def test_a_damaged_wrapped_key_of_a_session_does_not_open(suite: str, data: st.DataObject) -> None:
    """A flipped bit, a cut, an extension and a session that HPKE did not wrap raise BadSeal, also once the session is known."""
    sealing = SEALING[suite]
    wrapped = KeySession(suite, sealing.public).wrap(KEY, job=JOB, order_hash=ORDER, provider=PROVIDER)
    if data.draw(st.booleans()):
        sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER)
    direct = wrap_key(KEY, suite, sealing.public, job=JOB, order_hash=ORDER, provider=PROVIDER)
    for wrong in (
        flipped(wrapped, data.draw(st.integers(0, len(wrapped) * 8 - 1))),
        wrapped[: data.draw(st.integers(0, len(wrapped) - 1))],
        wrapped + b"\0",
        direct + wrapped[-48:],
        bytes(len(wrapped)),
    ):
        with pytest.raises(BadSeal):
            sealing.unwrap(wrong, job=JOB, order_hash=ORDER, provider=PROVIDER)
    assert sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER) == KEY


def test_a_provider_remembers_a_bounded_number_of_sessions() -> None:
    """Each session is decrypted once while it is among those used last; what does not decrypt is not remembered."""
    sealing = SealingKey(X25519, bytes(range(32)))
    decrypted: list[bytes] = []
    suite = sealing._suite

    class Counting:
        """The suite, which notes what it decrypts."""

        def decrypt(self, wrapped: bytes, key: object, *, info: bytes) -> bytes:
            """See Suite."""
            decrypted.append(wrapped)
            return suite.decrypt(wrapped, key, info=info)  # type: ignore[arg-type]

    sealing._suite = Counting()  # type: ignore[assignment]

    def unwrap(wrapped: bytes) -> None:
        assert sealing.unwrap(wrapped, job=JOB, order_hash=ORDER, provider=PROVIDER) == KEY

    wraps = [
        KeySession(X25519, sealing.public).wrap(KEY, job=JOB, order_hash=ORDER, provider=PROVIDER)
        for _ in range(MAX_SESSIONS + 1)
    ]
    for wrapped in wraps[:-1]:
        unwrap(wrapped)
    assert len(decrypted) == MAX_SESSIONS
    unwrap(wraps[0])  # now the one that was used last
    with pytest.raises(BadSeal):
        sealing.unwrap(bytes(128), job=JOB, order_hash=ORDER, provider=PROVIDER)
    assert len(decrypted) == MAX_SESSIONS + 1
    unwrap(wraps[-1])  # takes the place of the second one
    decrypted.clear()
    for wrapped in (wraps[0], wraps[-1], wraps[2]):
        unwrap(wrapped)
    assert not decrypted
    unwrap(wraps[1])
    assert decrypted == [wraps[1][:80]]


@pytest.mark.parametrize("suite", [*sorted(SUITES), "", "rot13"])
def test_no_session_begins_with_an_unusable_sealing_key(suite: str) -> None:
    """That is the ask's fault, as with a single job."""
    with pytest.raises(BadSeal, match=r"ask\.sealingKey: expected a usable"):
        KeySession(suite, bytes(32))


# Commitments


@given(chunk_lists)
@some
def test_the_transcript_depends_on_every_chunk(chunks: list[bytes]) -> None:
    """A changed, dropped, added or swapped chunk gives another commitment; the same chunks give the same one."""
    right = _transcript(chunks)
    assert _transcript(list(chunks)) == right
    for i, chunk in enumerate(chunks):
        assert _transcript([*chunks[:i], chunk + b"\0", *chunks[i + 1 :]]) != right
        assert _transcript([*chunks[:i], *chunks[i + 1 :]]) != right
        assert _transcript([*chunks[:i], b"", *chunks[i:]]) != right
    if chunks[0] != chunks[-1]:
        assert _transcript([chunks[-1], *chunks[1:-1], chunks[0]]) != right


@given(st.binary(min_size=1, max_size=60), st.data())
@some
def test_the_transcript_depends_on_the_boundaries(text: bytes, data: st.DataObject) -> None:
    """The same bytes with other boundaries give another transcript."""
    cuts = data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2, unique=True))
    first, second = (_transcript([text[:cut], text[cut:]]) for cut in cuts)
    assert first != second
    assert _transcript([text]) not in {first, second}


def test_commitments_are_keyed_and_bound() -> None:
    """Without the key nobody can confirm a guessed prompt or answer; another job or order gives another commitment."""
    first_key, second_key = KEY.commitment_key, OTHER_KEY.commitment_key
    assert (
        len({commit_request(k, job, body) for k in (first_key, second_key) for job in (JOB, OTHER_JOB) for body in (b"", b"a")})
        == 8
    )
    assert len({_transcript([b"a"], k, order) for k in (first_key, second_key) for order in (ORDER, OTHER_ORDER)}) == 4


def test_the_commitment_key_opens_commitments_only() -> None:
    """The derived key that a payer may reveal differs from the content key and does not open sealed data."""
    revealed = KEY.commitment_key
    assert len(revealed) == KEY_BYTES
    assert revealed != KEY.secret
    with pytest.raises(BadSeal):
        ContentKey(revealed).open_request(JOB, KEY.seal_request(JOB, b"body"))


# Secrets


def test_a_content_key_shows_nothing() -> None:
    """Neither repr nor str of a content key, or of its container, contains the secret."""
    key = ContentKey(b"SecretSecretSecretSecretSecret!!")
    shown = f"{key!r} {key} {[key]!r} {(key,)} {KEY!r}"
    assert "Secret" not in shown
    assert key.secret.hex() not in shown
    assert repr(KEY.secret) not in shown


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_a_sealing_key_shows_nothing(suite: str) -> None:
    """The repr of a sealing key contains no part of its secret."""
    secret = b"0123456789abcdef" * (SealingKey.secret_bytes(suite) // 16)
    key = SealingKey(suite, secret)
    shown = f"{key!r} {key} {vars(key)}"
    assert "0123456789abcdef" not in shown
    assert secret[:8].hex() not in shown


def test_a_fresh_key_comes_from_the_given_randomness() -> None:
    """`ContentKey.new` takes 32 bytes from its source, by default the system's."""
    assert ContentKey.new(random.Random(1).randbytes) == ContentKey(random.Random(1).randbytes(32))
    assert ContentKey.new() != ContentKey.new()
    assert len(ContentKey.new().secret) == KEY_BYTES


def _open_all(stream: list[bytes]) -> Opener:
    opener = Opener(KEY, JOB, ORDER)
    for sealed in stream:
        opener.open(sealed)
    return opener


def _transcript(chunks: list[bytes], key: bytes = KEY.commitment_key, order: Hash = ORDER) -> Hash:
    transcript = Transcript(key, order)
    for chunk in chunks:
        transcript.add(chunk)
    return transcript.commitment


@given(st.binary(min_size=1, max_size=80))
@some
def test_keys_are_derived_with_hkdf_expand(label: bytes) -> None:
    """The derivation is that of an independent implementation of RFC 5869."""
    derived = HKDFExpand(SHA256(), KEY_BYTES, label).derive(bytes(range(32)))
    assert sealing._derive(bytes(range(32)), label) == derived

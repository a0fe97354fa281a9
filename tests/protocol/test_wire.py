"""Wire formats: round trips, and the refusal of malformed bytes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.codecs import keccak
from tallystick.protocol.criteria import MAX_CANDIDATES
from tallystick.protocol.eip712 import Domain, Signed, Signer
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.link import MAX_CHAIN_ID, Beat, Capacity, Challenge, ClaimRequest, Hello, Listing, read_asks
from tallystick.protocol.messages import Claim, ClaimRow, Connect, Order, Terms
from tallystick.protocol.options import IGNORABLE
from tallystick.protocol.plaintext_heads import (
    RequestHead,
    ResponseHead,
    dump_response_head,
    join_request,
    load_response_head,
    split_request,
)
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.trace_context import TraceContext
from tallystick.protocol.types import ZERO_ADDRESS, ZERO_HASH, Address, Amount, Hash, JobId
from tallystick.protocol.wire import (
    COPIED_BYTES,
    INITIAL_CREDIT,
    LINK_HEAD,
    MAX_BODY,
    MAX_FRAME,
    MAX_HEADER,
    MAX_WRAPPED,
    NO_JOB,
    Candidate,
    Dispatch,
    Failure,
    FrameReader,
    Kind,
    Submission,
    dumps,
    loads,
    pack_frame,
    pack_link,
    read_kind,
    unpack_link,
)
from tests.builders import build_ask, build_match, build_order, build_receipt, build_terms
from tests.protocol.strategies import addresses, few, hashes, job_ids, json_values, many, messages, mutated, some, uints

DOMAIN = Domain(31_337, Address("0x" + "5f" * 20))
PAYER, PROVIDER, COORDINATOR = (Signer(keccak(name)) for name in (b"payer", b"provider", b"coordinator"))
JOB = JobId(b"j" * 16)

TERMS = build_terms(job=JOB)


def order_for(terms: Terms, payer: Signer = PAYER) -> Signed[Order]:
    """An order of `payer` that commits to these terms."""
    order = build_order(
        payer.address,
        PROVIDER.address,
        reserve_target=Amount(1),
        coordinator=COORDINATOR.address,
        terms_hash=terms.struct_hash(),
    )
    signed = payer.sign(order, DOMAIN)
    return Signed(signed.message, signed.signature)


def unverified(signed: Any) -> Any:
    """A signed message after a JSON round trip."""
    return Signed(signed.message, signed.signature)


CANDIDATE = Candidate(order_for(TERMS), TERMS, b"wrapped")
SUBMISSION = Submission(JOB, (CANDIDATE, CANDIDATE), b"sealed")
FULL_SUBMISSION = Submission(JOB, (CANDIDATE,), b"sealed", ranked=True, wait=7, hedge_after_ms=1_500)
ASK = unverified(PROVIDER.sign(build_ask(PROVIDER.address), DOMAIN))
MATCH = build_match(CANDIDATE.order.verify(DOMAIN), TERMS)
RECEIPT = unverified(PROVIDER.sign(build_receipt(PAYER.address, PROVIDER.address), DOMAIN))
CONNECT = unverified(
    PROVIDER.sign(
        Connect(provider=PROVIDER.address, coordinator=COORDINATOR.address, challenge=Hash(bytes(32)), endpoint="c.example:443"),
        DOMAIN,
    )
)
DISPATCH = Dispatch(MATCH, CANDIDATE, b"sealed")
CHALLENGE = Challenge(Hash(b"c" * 32), COORDINATOR.address, 31_337, DOMAIN.contract)
CAPACITIES = {7: Capacity(3, 4, 100, 250), 8: Capacity(9, 4, 0, 0, 5)}
HELLO = Hello(CONNECT, Listing((ASK, ASK), (8, 7), CAPACITIES), "tally/1")
CLAIM_REQUEST = ClaimRequest(
    unverified(
        PROVIDER.sign(
            Claim(
                provider=PROVIDER.address,
                rows=(ClaimRow(payer=PAYER.address, order_hash=ZERO_HASH, seq=1, cumulative_cost=Amount(1)),) * 2,
            ),
            DOMAIN,
        )
    ),
    (CANDIDATE.order, CANDIDATE.order),
)

TREES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "Challenge": (CHALLENGE, Challenge.from_json),
    "Listing": (HELLO.listing, Listing.from_json),
    "Hello": (HELLO, Hello.from_json),
    "ClaimRequest": (CLAIM_REQUEST, ClaimRequest.from_json),
}
BINARIES: dict[str, tuple[Any, Callable[[bytes], Any]]] = {
    "Submission": (SUBMISSION, Submission.loads),
    "Submission with options": (FULL_SUBMISSION, Submission.loads),
    "Dispatch": (DISPATCH, Dispatch.loads),
}


def orjson_or_nothing(value: Any) -> bytes:
    """A value as JSON, or nothing if JSON cannot represent it."""
    try:
        return orjson.dumps(value)
    except (TypeError, orjson.JSONEncodeError):
        return b""


# Round trips


@given(messages(Terms, job=JOB), st.binary(max_size=2_000), st.binary(max_size=300), st.integers(1, MAX_CANDIDATES))
@few
def test_submissions_and_dispatches_survive_the_journey(terms: Terms, sealed: bytes, wrapped: bytes, count: int) -> None:
    """Coordinator and node read what client and coordinator wrote, with the sealed bytes unchanged."""
    candidate = Candidate(order_for(terms), terms, wrapped)
    submission = Submission(JOB, (candidate,) * count, sealed)
    assert Submission.loads(submission.dumps()) == submission
    dispatch = Dispatch(MATCH, candidate, sealed)
    assert Dispatch.loads(dispatch.dumps()) == dispatch


@pytest.mark.parametrize("name", TREES)
def test_json_messages_survive_the_journey(name: str) -> None:
    """Every JSON payload of the link survives a round trip."""
    subject, read = TREES[name]
    assert read(loads(dumps(subject.to_json()), name)) == subject


@given(hashes, addresses, st.integers(0, MAX_CHAIN_ID), addresses, st.lists(uints(32), min_size=6, max_size=6))
@some
def test_challenges_and_capacities_of_any_value_survive(
    nonce: Hash, coordinator: Address, chain: int, contract: Address, counts: list[int]
) -> None:
    """Chain ids may exceed 32 bits, as on real chains; counts use all of their 32 bits."""
    challenge = Challenge(nonce, coordinator, chain, contract)
    assert Challenge.from_json(loads(dumps(challenge.to_json()), "challenge")) == challenge
    for log_head in (b"", nonce):
        beat = Beat({counts[0]: Capacity(*counts[1:])}, log_head)
        assert Beat.from_json(loads(dumps(beat.to_json()), "beat")) == beat


printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=256)


@given(st.text(max_size=256), printable, st.binary(max_size=500), st.integers(100, 599))
@some
def test_heads_survive_the_journey(path: str, content_type: str, body: bytes, status: int) -> None:
    """Request and response heads survive a round trip with any bytes in the body, including newlines."""
    head = RequestHead(path, content_type, body[:113])
    assert split_request(join_request(head, body)) == (head, body)
    answer = ResponseHead(status, content_type, body[:113])
    assert load_response_head(dump_response_head(answer)) == answer


@given(st.sampled_from(Kind), job_ids, st.binary(max_size=300))
@some
def test_link_frames_survive_the_journey(kind: Kind, job: JobId, payload: bytes) -> None:
    """Kind, job and payload of a link frame survive a round trip."""
    assert unpack_link(pack_link(kind, job, payload)) == (kind, job, payload)
    assert unpack_link(pack_link(kind)) == (kind, NO_JOB, b"")


def test_the_numbers_of_the_kinds_are_the_wire() -> None:
    """Frame kinds are sent as these numbers; a change would break older peers."""
    assert {kind.name: kind.value for kind in Kind} == {
        "MATCH": 1,
        "CHUNK": 2,
        "RECEIPT": 3,
        "FAIL": 4,
        "BEAT": 5,
        "VOID": 6,
        "HEDGE": 7,
        "CHALLENGE": 16,
        "HELLO": 17,
        "WELCOME": 18,
        "ASKS": 19,
        "DISPATCH": 20,
        "ACCEPT": 21,
        "CANCEL": 22,
        "CREDIT": 23,
        "RECEIPT_ACK": 24,
        "CLAIM": 25,
        "ERROR": 26,
        "RECEIPT_REFUSED": 27,
        "LATE_RECEIPT": 28,
        "RECALL": 29,
        "RECALLED": 30,
        "SUBMIT": 31,
        "LEAVE": 32,
        "ORDERS": 33,
        "ADDED": 34,
        "END": 35,
        "REPLICAS": 36,
        "TRACE": 37,
        "RESUME": 38,
    }


def test_the_layout_is_this_one() -> None:
    """An example of each binary layout, byte for byte."""
    assert pack_frame(Kind.CHUNK, b"abc") == b"\x02\x00\x00\x00\x03abc"
    assert pack_link(Kind.CREDIT, JOB, b"\0\0\0\1") == b"\x17" + b"j" * 16 + b"\0\0\0\1"
    assert join_request(RequestHead("/v1/x"), b"{}") == b'{"path":"/v1/x","contentType":"application/json"}\n{}'
    head = RequestHead("/v1/x", "a", b"\x01\xff")
    assert join_request(head, b"{}") == b'{"path":"/v1/x","contentType":"a","logHead":"01ff"}\n{}'
    assert dumps(Beat({}, b"\x01\xff").to_json()) == b'{"capacity":[],"logHead":"01ff"}'
    candidate = CANDIDATE.order.to_bytes() + CANDIDATE.terms.to_bytes() + b"wrapped"
    sized = len(candidate).to_bytes(2, "big") + candidate
    assert SUBMISSION.dumps() == b"\x02" + JOB + b"\0" + b"\x02" + sized + sized + b"sealed"
    options = b"\x03" + b"\x01\0" + b"\x02\x04\0\0\0\x07" + b"\x03\x04\0\0\x05\xdc"
    assert FULL_SUBMISSION.dumps() == b"\x02" + JOB + options + b"\x01" + sized + b"sealed"
    assert DISPATCH.dumps() == b"\x02" + len(MATCH.dumps()).to_bytes(2, "big") + MATCH.dumps() + sized + b"sealed"
    assert DISPATCH.frame(JOB) == pack_link(Kind.DISPATCH, JOB, DISPATCH.dumps())
    error = Unavailable(Code.NODE_BUSY, "full")
    assert Failure(error).dumps() == dumps(error.as_json())
    assert Failure(error, RECEIPT).dumps() == dumps(error.as_json()) + b"\0" + RECEIPT.to_bytes()


def test_a_submission_is_that_of_an_independent_encoder() -> None:
    """The golden vector, which was written without code of this project and signed by eth_account."""
    frame = bytes.fromhex(json.loads((Path(__file__).parent.parent / "vectors" / "frames.json").read_text())["submission"])
    read = Submission.loads(frame)
    assert (read.ranked, read.wait, read.hedge_after_ms, len(read.candidates)) == (True, 120, 250, 2)
    candidate = read.candidates[1]
    assert candidate.order.verify(DOMAIN).message.max_fee_bps == 25
    assert (candidate.terms.model, candidate.wrapped_key) == ("tiny \u20ac", b"wrapped 1")
    assert read.sealed == b"sealed request"
    assert replace(read, **_without_raw(read)).dumps() == frame


def _without_raw(read: Submission | Dispatch) -> dict[str, Any]:
    """The candidates, to be encoded again."""
    if isinstance(read, Dispatch):
        return {"candidate": replace(read.candidate, raw=None)}
    return {"candidates": tuple(replace(candidate, raw=None) for candidate in read.candidates)}


# Frames of a response


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=200)), max_size=12), st.data())
@many
def test_frames_are_cut_the_same_from_any_split_of_the_stream(frames: list[tuple[Kind, bytes]], data: st.DataObject) -> None:
    """For any split of the stream the same frames are read, each as soon as its last byte has arrived."""
    stream = b"".join(pack_frame(*frame) for frame in frames)
    ends = [0]
    for _, payload in frames:
        ends.append(ends[-1] + 5 + len(payload))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, parsed = FrameReader(), list[tuple[Kind, bytes]]()
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        parsed += reader.feed(stream[start:end])
        whole = sum(1 for at in ends[1:] if at <= end)
        assert parsed == frames[:whole]
        assert reader.pending == end - ends[whole]
    assert parsed == frames
    assert reader.pending == 0


@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=20)), min_size=2, max_size=6))
@few
def test_frames_may_be_taken_one_at_a_time(frames: list[tuple[Kind, bytes]]) -> None:
    """A consumer that stops in the middle of `feed` loses nothing: the next call continues there."""
    reader = FrameReader()
    first = next(reader.feed(b"".join(pack_frame(*frame) for frame in frames)))
    assert [first, *reader.feed(b"")] == frames


@given(st.integers(0, 40), st.integers(0, 60))
@some
def test_an_oversized_frame_is_refused_by_its_head(limit: int, size: int) -> None:
    """A frame above the limit is refused before its payload is read; a frame at the limit passes."""
    reader = FrameReader(limit)
    head = b"\x02" + size.to_bytes(4, "big")
    if size > limit:
        with pytest.raises(BadMessage, match=f"frame: expected at most {limit} bytes, got {size}"):
            list(reader.feed(head))
    else:
        assert list(reader.feed(head + bytes(size))) == [(Kind.CHUNK, bytes(size))]


def test_the_reader_holds_at_most_one_frame() -> None:
    """A peer that announces the largest frame and sends it slowly makes the reader hold only that frame."""
    reader = FrameReader()
    assert not list(reader.feed(b"\x02" + MAX_FRAME.to_bytes(4, "big")))
    for _ in range(15):
        assert not list(reader.feed(bytes(MAX_FRAME // 16)))
    assert reader.pending <= MAX_FRAME + 5
    assert len(list(reader.feed(bytes(MAX_FRAME // 16)))) == 1
    assert reader.pending == 0


@pytest.mark.parametrize("number", sorted(set(range(256)) - set(Kind)))
def test_unknown_kinds_are_refused(number: int) -> None:
    """Unknown kinds are refused on both kinds of connection."""
    with pytest.raises(BadMessage, match="frame: expected a known kind"):
        list(FrameReader().feed(bytes((number, 0, 0, 0, 0))))
    with pytest.raises(BadMessage, match="frame: expected a known kind"):
        unpack_link(bytes((number,)) + JOB)
    with pytest.raises(BadMessage):
        read_kind(number)


@given(st.lists(st.binary(max_size=60), max_size=8))
@many
def test_random_bytes_as_frames_raise_nothing_but_badmessage(pieces: list[bytes]) -> None:
    """Any stream consists of frames, an unfinished frame, or raises BadMessage."""
    reader = FrameReader(100)
    with contextlib.suppress(BadMessage):
        for piece in pieces:
            for kind, payload in reader.feed(piece):
                assert isinstance(kind, Kind)
                assert len(payload) <= 100


@given(st.binary(max_size=60) | st.text(max_size=60))
@some
def test_random_link_frames_raise_nothing_but_badmessage(data: bytes | str) -> None:
    """Text messages, messages shorter than a head, and unknown kinds are refused."""
    if isinstance(data, str) or len(data) < LINK_HEAD:
        with pytest.raises(BadMessage, match="at least 17 bytes"):
            unpack_link(data)
    else:
        with contextlib.suppress(BadMessage):
            assert unpack_link(data)[2] == data[LINK_HEAD:]


# Hostile payloads


READERS: list[Callable[[bytes], Any]] = [Submission.loads, Dispatch.loads, split_request, load_response_head]


@pytest.mark.parametrize("read", READERS, ids=["submission", "dispatch", "request", "response head"])
@given(
    st.binary(max_size=400)
    | st.binary(max_size=400).map(lambda rest: b"\x02" + rest)
    | st.tuples(json_values, st.binary(max_size=20)).map(lambda pair: orjson_or_nothing(pair[0]) + b"\n" + pair[1])
)
@some
def test_random_bytes_raise_nothing_but_badmessage(read: Callable[[bytes], Any], data: bytes) -> None:
    """Random bytes, and any JSON in place of a header, are refused."""
    with contextlib.suppress(BadMessage):
        read(data)


@pytest.mark.parametrize("name", TREES)
@given(st.data())
@many
def test_mutated_json_raises_nothing_but_badmessage(name: str, data: st.DataObject) -> None:
    """Any JSON, and a valid payload with a node replaced, removed, renamed or added, is read or refused."""
    subject, read = TREES[name]
    for raw in (data.draw(mutated(subject.to_json())), data.draw(json_values)):
        with contextlib.suppress(BadMessage):
            assert isinstance(read(raw), type(subject))


@pytest.mark.parametrize("name", BINARIES)
@given(st.data())
@some
def test_what_is_read_is_what_was_written(name: str, data: st.DataObject) -> None:
    """Changed bytes are refused, or they are the one wire form of what is read from them."""
    subject, read = BINARIES[name]
    right = bytearray(subject.dumps())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 30) | st.integers(0, len(right) - 1))
        right[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(BadMessage):
        result = read(bytes(right))
        again = replace(result, **_without_raw(result)).dumps()
        assert again == right or (len(again) < len(right) and name != "Dispatch"), "only ignored options are left out"


@pytest.mark.parametrize("name", BINARIES)
@given(st.data())
@some
def test_damaged_bytes_raise_nothing_but_badmessage(name: str, data: st.DataObject) -> None:
    """A submission or dispatch with any byte changed or cut off is read or refused; one with a cut head is refused."""
    subject, read = BINARIES[name]
    right = subject.dumps()
    at = data.draw(st.integers(0, 3) | st.integers(0, len(right) - 1))
    with contextlib.suppress(BadMessage):
        read(right[:at] + bytes((data.draw(st.integers(0, 255)),)) + right[at + 1 :])
    with pytest.raises(BadMessage):
        read(right[: data.draw(st.integers(0, len(right) - len(b"sealed") - 1))])


@given(st.data())
@some
def test_mutated_heads_raise_nothing_but_badmessage(data: st.DataObject) -> None:
    """Mutated request and response heads are read or refused."""
    for written, read in (
        ({"path": "/v1/x", "contentType": "a"}, split_request),
        ({"status": 200, "contentType": "a"}, load_response_head),
    ):
        with contextlib.suppress(BadMessage):
            read(orjson_or_nothing(data.draw(mutated(written))) + b"\n")


@given(json_values | st.lists(json_values, max_size=3))
@some
def test_any_json_as_asks_raises_nothing_but_badmessage(raw: Any) -> None:
    """A list of asks is read completely or refused."""
    with contextlib.suppress(BadMessage):
        assert read_asks(raw) == ()


@pytest.mark.parametrize(
    "data", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"nan", b"1" * 5_000 + b"x", '"\ud800"', b"{} {}"]
)
def test_invalid_json_is_named(data: bytes | str) -> None:
    """Deep nesting, wrong encodings and cut texts raise BadMessage that names the document."""
    with pytest.raises(BadMessage, match=r"^hello: not JSON: "):
        loads(data, "hello")


# Rules that the readers enforce


def test_an_order_must_commit_to_the_terms_beside_it() -> None:
    """Swapped terms are refused by name."""
    other = Terms(**({n: getattr(TERMS, n) for n in Terms.SCHEMA.fields} | {"max_cost": Amount(2)}))
    with pytest.raises(BadMessage, match=r"candidates\[0\]\.order\.termsHash: expected the hash of the "):
        Submission.loads(Submission(JOB, (Candidate(CANDIDATE.order, other, b""),), b"").dumps())
    with pytest.raises(BadMessage, match=r"dispatch\.candidate\.order\.termsHash"):
        Dispatch.loads(Dispatch(MATCH, Candidate(CANDIDATE.order, other, b""), b"").dumps())


def test_a_submission_is_of_one_payer_one_model_and_one_job() -> None:
    """Orders of two payers, terms of two models or of another job, no candidate and too many candidates are refused."""
    stranger = Candidate(order_for(TERMS, Signer(keccak(b"stranger"))), TERMS, b"")
    other = build_terms(job=JOB, model="another")
    cases: list[tuple[str, Submission]] = [
        ("several payers", Submission(JOB, (CANDIDATE, stranger), b"")),
        ("several models", Submission(JOB, (CANDIDATE, Candidate(order_for(other, PAYER), other, b"")), b"")),
        ("another job", Submission(JobId(bytes(16)), (CANDIDATE,), b"")),
        ("at least one", Submission(JOB, (), b"")),
        (f"at most {MAX_CANDIDATES}", Submission(JOB, (CANDIDATE,) * (MAX_CANDIDATES + 1), b"")),
    ]
    for named, submission in cases:
        with pytest.raises(BadMessage, match=named):
            Submission.loads(submission.dumps())


def test_a_node_reads_the_largest_dispatch_from_its_head() -> None:
    """The longest model name and wrapped key: what a node reads to refuse a request contains all but the sealed part."""
    terms = Terms(
        **({n: getattr(TERMS, n) for n in Terms.SCHEMA.fields} | {"model": "\u20ac" * 1_024, "max_cost": Amount(2**96 - 1)})
    )
    candidate = Candidate(order_for(terms), terms, bytes(MAX_WRAPPED))
    assert Dispatch.loads(Dispatch(MATCH, candidate, bytes(MAX_HEADER)).dumps()[:MAX_HEADER]).candidate == candidate
    submission = Submission(JOB, (candidate,) * MAX_CANDIDATES, b"")
    assert Submission.loads(submission.dumps()) == submission


def test_the_limits_are_these() -> None:
    """The limits are part of the wire format: a peer with lower ones would break others."""
    assert (MAX_HEADER, MAX_BODY, MAX_FRAME) == (32_768, 33_554_432, 1_048_576)
    assert (MAX_CANDIDATES, MAX_WRAPPED, INITIAL_CREDIT, LINK_HEAD) == (8, 4_096, 64, 17)


@pytest.mark.parametrize("read", [Submission.loads, Dispatch.loads])
def test_an_older_and_a_newer_protocol_are_told_what_to_upgrade(read: Callable[[bytes], Any]) -> None:
    """Protocol 1 began with the length of a JSON header. A later one has another first byte."""
    header = dumps({"job": JOB.hex(), "candidates": []})
    with pytest.raises(
        BadMessage, match=r"expected protocol 2, got protocol 1; the \w+ is too old: upgrade it to Tallystick 0\.2\.0"
    ):
        read(len(header).to_bytes(4, "big") + header + b"sealed")
    with pytest.raises(
        BadMessage, match=r"got protocol 3; the .* is newer: upgrade this side to a release .* that speaks protocol 3"
    ):
        read(b"\x03" + SUBMISSION.dumps()[1:])
    with pytest.raises(BadMessage, match="cut off"):
        read(b"")


@pytest.mark.parametrize(("name", "read"), [("Challenge", Challenge.from_json), ("Hello", Hello.from_json)])
def test_a_handshake_of_another_protocol_is_refused(name: str, read: Callable[[Any], Any]) -> None:
    """Protocol 1 named none. The error says which side to upgrade, and to which release."""
    raw = TREES[name][0].to_json()
    where, peer = ("challenge", "the coordinator") if name == "Challenge" else ("hello", "the node")
    older, newer = dict(raw, protocol=1), dict(raw, protocol=3)
    for old in (older, {member: value for member, value in raw.items() if member != "protocol"}):
        with pytest.raises(
            BadMessage, match=rf"^{where}\.protocol: expected 2, got 1; {peer} is too old: upgrade it to .* 0\.2\.0"
        ):
            read(old)
    with pytest.raises(BadMessage, match=rf"^{where}\.protocol: expected 2, got 3; {peer} is newer: upgrade this side"):
        read(newer)
    for wrong in ("2", 2.0, True, -1):
        with pytest.raises(BadMessage, match=rf"^{where}\.protocol: expected a whole number"):
            read(dict(raw, protocol=wrong))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (b"\x01\x04\0", "submission.options: option 4 is unknown here; upgrade this side, or leave the option out"),
        (b"\x01\x7f\x01x", "submission.options: option 127 is unknown here"),
        (b"\x02\x01\0\x01\0", "submission.options: expected each option once, in ascending order, got 1 after 1"),
        (b"\x02\x02\x04\0\0\0\0\x01\0", "submission.options: expected each option once, in ascending order, got 1 after 2"),
        (b"\x01\0\0", "submission.options: expected each option once, in ascending order, got 0 after 0"),
        (b"\x01\x01\x01\0", "submission.ranked: expected no bytes, got 1"),
        (b"\x01\x02\x03\0\0\0", "submission.wait: expected 4 bytes, got 3"),
        (b"\x01\x03\x04\0\0\0\0", "submission.hedgeAfterMs: expected a whole number from 1 to 600000, got 0"),
        (b"\x01\x03\x04\0\x09\x27\xc1", "submission.hedgeAfterMs: expected a whole number from 1 to 600000, got 600001"),
        (b"\x01\x02\xff\0", "submission.options: cut off"),
        (b"\xff\xff", "submission.options: cut off"),
    ],
)
def test_options_have_one_form(options: bytes, error: str) -> None:
    """Unknown, repeated, unordered and ill-formed options are refused by name."""
    frame = SUBMISSION.dumps()
    tail = frame[18:] if "cut off" not in error else b""
    with pytest.raises(BadMessage, match=f"^{re.escape(error)}"):
        Submission.loads(frame[:17] + options + tail)


def test_a_later_release_may_add_options_that_others_ignore() -> None:
    """Options from 128 on do not change what the sender asked for."""
    frame = FULL_SUBMISSION.dumps()
    assert frame[17] == 3
    end = 18 + 2 + 6 + 6
    more = frame[:17] + b"\x04" + frame[18:end] + b"\xff\x02xy" + frame[end:]
    assert Submission.loads(more) == FULL_SUBMISSION


def test_a_number_that_no_reader_accepts_is_not_written() -> None:
    """The error names the member."""
    for wrong, member in ((replace(SUBMISSION, wait=-1), "wait"), (replace(SUBMISSION, hedge_after_ms=600_001), "hedgeAfterMs")):
        with pytest.raises(BadMessage, match=f"^{member}: expected a whole number"):
            wrong.dumps()


def test_the_sealed_request_is_not_copied() -> None:
    """It is a view of what arrived. What outlives a job, such as its orders, is copied and keeps no large body alive."""
    for subject, read in BINARIES.values():
        body = replace(subject, sealed=bytes(100_000)).dumps()
        before = sys.getrefcount(body)
        result = read(body)
        assert isinstance(result.sealed, memoryview)
        assert result.sealed.obj is body
        candidate = result.candidate if isinstance(result, Dispatch) else result.candidates[0]
        del result
        assert candidate.order.message.payer == PAYER.address
        assert sys.getrefcount(body) == before


def test_a_submission_without_candidates_keeps_no_body() -> None:
    """One that waits holds its options and its request, not the body that it was read from. A large request is not copied."""
    for size, kept in ((0, 0), (COPIED_BYTES, 0), (COPIED_BYTES + 1, 1)):
        body = replace(SUBMISSION, sealed=bytes(size), ranked=True, wait=9).dumps()
        before = sys.getrefcount(body)
        read = Submission.loads(body)
        assert read.candidates[0].order.message.payer == PAYER.address  # decoded before
        candidates, bare = read.candidates, read.without_candidates()
        assert bare == replace(read, candidates=())
        del read
        assert sys.getrefcount(body) == before + kept
        assert replace(bare, candidates=candidates).dumps() == body


def test_json_is_kept_in_no_more_memory_than_it_takes() -> None:
    """Orjson returns bytes that hold 4 KiB at least; thousands of them may be kept."""
    tracemalloc.start()
    try:
        kept = [dumps({"position": number}) for number in range(100)]
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 200 * len(kept)


def test_the_receipt_in_a_failure_is_read_apart_from_its_error() -> None:
    """A receipt that cannot be read is refused by name; an error that cannot be read leaves the receipt readable."""
    error = Unavailable(Code.NODE_BUSY, "full \0 of zero bytes")
    for receipt in (None, RECEIPT):
        read = Failure.loads(Failure(error, receipt).dumps())
        assert (read.error.code, str(read.error), read.receipt) == (Code.NODE_BUSY, str(error), receipt)
    assert Failure.split(Failure(error, RECEIPT).dumps()) == (error.as_json(), RECEIPT.to_bytes())
    assert Failure.split(b"{\0" + RECEIPT.to_bytes()) == ({}, RECEIPT.to_bytes())
    assert Failure.split(b"[]") == ({}, None)
    assert Failure.split(b"{}\0") == ({}, b"")
    for receipt_bytes in (b"", RECEIPT.to_bytes()[:-1], RECEIPT.to_bytes() + b"x"):
        with pytest.raises(BadMessage, match=r"^failure\.receipt"):
            Failure.loads(dumps(error.as_json()) + b"\0" + receipt_bytes)


def test_a_claim_brings_one_order_a_row() -> None:
    """A claim with too few or too many orders is refused."""
    for count in (0, 1, 3):
        with pytest.raises(BadMessage, match="expected one per row"):
            ClaimRequest.from_json(ClaimRequest(CLAIM_REQUEST.claim, (CANDIDATE.order,) * count).to_json())


def test_a_wrapped_key_has_a_limit() -> None:
    """The longest one is read, and a longer one is refused by name."""
    longest = replace(CANDIDATE, wrapped_key=bytes(MAX_WRAPPED))
    assert Candidate.from_bytes(longest.to_bytes()) == longest
    with pytest.raises(BadMessage, match=r"^candidate\.wrappedKey: expected at most 4096 bytes, got 4097"):
        Candidate.from_bytes(longest.to_bytes() + b"x")


@pytest.mark.parametrize(
    ("member", "values"),
    [
        ("challenge", ["", "zz" * 32, "00" * 31, "00" * 33, 5, None]),
        ("coordinator", ["", "0x", 5, None]),
        ("contract", ["0x" + "0" * 39, ZERO_ADDRESS[2:]]),
        ("chainId", [-1, 1 << 63, "1", 1.0, True, None]),
    ],
)
def test_each_member_of_a_challenge_is_checked_by_name(member: str, values: list[object]) -> None:
    """A node signs nothing for an unreadable challenge."""
    for value in values:
        with pytest.raises(BadMessage, match=rf"^challenge\.{member}: expected"):
            Challenge.from_json({**CHALLENGE.to_json(), member: value})


@pytest.mark.parametrize("member", ["group", "free", "slots", "queue", "tokensPerSecond", "firstTokenMs"])
@pytest.mark.parametrize("value", [-1, 1 << 32, 1.0, True, "1", None])
def test_each_member_of_a_capacity_is_checked_by_name(member: str, value: object) -> None:
    """A capacity consists of whole numbers of 32 bits."""
    with pytest.raises(BadMessage, match=rf"^beat.capacity\[1\]\.{member}: expected a whole number from 0 to 4294967295"):
        Beat.from_json({"capacity": [CAPACITIES[7].to_json(7), {**CAPACITIES[8].to_json(8), member: value}]})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"groups": [7]}, "hello.groups: expected one slot group per ask, 2 in all, got 1"),
        ({"groups": [7, 9]}, "hello.capacity: expected the capacities of the groups that the asks name, and no others"),
        ({"groups": [7, 7]}, "group 8 is in one of them alone"),
        ({"groups": [7, -1]}, r"hello.groups\[1\]: expected a whole number"),
        ({"groups": [7] * 257}, "hello.groups: expected a list of at most 256 items"),
        ({"capacity": [CAPACITIES[7].to_json(7)] * 2}, r"hello.capacity\[1\].group: expected each slot group once, got 7 again"),
        ({"capacity": [CAPACITIES[7].to_json(n) for n in range(257)]}, "hello.capacity: expected a list of at most 256 items"),
        ({"capacity": {"free": 1, "slots": 1, "tokensPerSecond": 0, "firstTokenMs": 0}}, "hello.capacity: expected a list"),
    ],
)
def test_a_listing_whose_groups_do_not_fit_is_refused(changes: dict[str, Any], problem: str) -> None:
    """Each ask has one slot group, whose capacity is told once. The form of older nodes is named as such."""
    with pytest.raises(BadMessage, match=problem):
        Hello.from_json({**HELLO.to_json(), **changes})


def test_an_older_node_is_told_that_it_is_older() -> None:
    """A HELLO with the capacity of a whole node, of before protocol 2, gets the words that say what to do."""
    older = {**HELLO.to_json(), "capacity": {"free": 1, "slots": 1, "tokensPerSecond": 0, "firstTokenMs": 0}}
    del older["groups"], older["protocol"]
    with pytest.raises(BadMessage, match=r"hello.protocol: expected 2, got 1; .*upgrade"):
        Hello.from_json(older)


def test_members_that_a_newer_peer_adds_are_ignored() -> None:
    """Unsigned envelopes may have unknown members (signed messages may not)."""
    for name, (subject, read) in TREES.items():
        if name != "Candidate":
            assert read({**subject.to_json(), "later": 1}) == subject


@pytest.mark.parametrize("hints", [RankingHints(), RankingHints(7, holder=Address("0x" + "ab" * 20), cached_tokens=5)])
def test_hints_are_read_as_they_were_written_each_time(hints: RankingHints) -> None:
    """Also a second time, when both are known; and what is no hint is refused each time."""
    submission = replace(SUBMISSION, hints=hints)
    for _ in range(2):
        assert Submission.loads(submission.dumps()).hints == hints
    packed = replace(SUBMISSION, hints=RankingHints(123_456)).dumps()
    for _ in range(2):
        with pytest.raises(BadMessage, match=r"submission\.hints"):
            Submission.loads(packed.replace(b"123456", b"-12345"))


TRACE = TraceContext(b"\1" * 16, b"\2" * 8)


def test_a_submission_may_carry_a_trace_context() -> None:
    """As an option that older coordinators ignore."""
    submission = replace(SUBMISSION, trace=TRACE)
    assert Submission.loads(submission.dumps()).trace == TRACE
    assert Submission.loads(SUBMISSION.dumps()).trace is None
    packed = submission.dumps()
    at = packed.index(TRACE.pack())
    assert packed[at - 2] == IGNORABLE + 2
    assert submission.without_candidates().trace == TRACE


@pytest.mark.parametrize("value", [b"", bytes(25), b"\1" * 24, b"\1" * 26, b"\1" * 255, bytes(16) + b"\1" * 9])
def test_a_trace_context_that_is_not_valid_is_left_out(value: bytes) -> None:
    """No job is refused because of its trace."""
    packed = replace(SUBMISSION, trace=TRACE).dumps()
    odd = packed.replace(bytes((25,)) + TRACE.pack(), bytes((len(value),)) + value)
    assert odd != packed
    assert Submission.loads(odd) == SUBMISSION


def test_a_node_announces_that_it_takes_traces() -> None:
    """Nodes that do not say so get none."""
    assert Hello.from_json(replace(HELLO, trace=True).to_json()).trace
    assert not Hello.from_json(HELLO.to_json()).trace
    assert "trace" not in HELLO.to_json()
    with pytest.raises(BadMessage, match=r"^hello\.trace"):
        Hello.from_json(HELLO.to_json() | {"trace": 1})

"""Fuzz targets for all parsers of untrusted bytes, which may raise only errors of this project. `scripts/fuzz` runs them
guided by coverage, and tests/test_fuzz.py runs them with every test run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from coordinator.domain.log_check import LogReplay
from node.domain.requests import prepare
from node.domain.upstream_models import read_models
from node.engines.kinds import read_load
from tallystick.client.dialects.registry import DIALECTS
from tallystick.client.openai.answers import read_text
from tallystick.client.openai.errors import read_engine_error
from tallystick.client.openai.message_text import answer_texts, request_texts
from tallystick.client.openai.requests import summarise
from tallystick.client.receipts.evidence import EvidenceFile
from tallystick.client.receipts.proof import Proof, read_proof
from tallystick.protocol.audit_reports import AuditVerdict, ReportRequest, build_report, check_report
from tallystick.protocol.eip712 import Domain, Message, Signed, loads_signed, read_signed_bytes
from tallystick.protocol.errors import BadSeal, TallyError, error_from_json
from tallystick.protocol.job_link import (
    pack_greeting,
    pack_orders,
    pack_record,
    pack_submit,
    read_greeting,
    read_orders,
    read_records,
    read_submit,
    split_frames,
)
from tallystick.protocol.link import Beat, Capacity, Challenge, ClaimRequest, Hello, LateReceipt, Listing, read_asks
from tallystick.protocol.log_evidence import Fraud, LogEvidence, judge
from tallystick.protocol.match_log import Match, load_leaf
from tallystick.protocol.merkle import leaf_hash
from tallystick.protocol.messages import Ask, Claim, LogHead, Order, Receipt, Spec, Terms
from tallystick.protocol.openai_wire import read_completion, read_other_answer
from tallystick.protocol.plaintext_heads import (
    RequestHead,
    ResponseHead,
    dump_response_head,
    join_request,
    load_response_head,
    split_request,
)
from tallystick.protocol.routes import MESSAGES, RESPONSES, SCORES
from tallystick.protocol.sealing import X25519, ContentKey, KeySession, Opener, Sealer, SealingKey, wrap_key
from tallystick.protocol.sse import EventReader, MalformedAnswer, event_data
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse, ScoreRow
from tallystick.protocol.types import ZERO_ADDRESS, Address, Hash, JobId
from tallystick.protocol.wire import Dispatch, FrameReader, Kind, Submission, dumps, loads, pack_frame, pack_link, unpack_link
from tests.builders import build_match
from tests.coordinator.harness import make_ask, make_claim, make_order, make_receipt, make_submission, make_terms, person
from tests.node.harness import OFFER

Target = Callable[[bytes], None]

JOB, ORDER, PROVIDER = JobId(bytes(16)), Hash(bytes(32)), Address("0x" + "11" * 20)
KEY = ContentKey(bytes(range(32)))
SEALING_KEY = SealingKey(X25519, bytes(range(1, 33)))
DOMAIN = Domain(31_337, ZERO_ADDRESS)


def frames(data: bytes) -> None:
    """A job's response, split anywhere."""
    whole, parts = FrameReader(limit=1_024), FrameReader(limit=1_024)
    expected = _read(whole, [data])
    cut = data[0] if data else 0
    assert _read(parts, [data[:cut], data[cut:]]) == expected
    assert whole.pending <= len(data)


def _read(reader: FrameReader, parts: list[bytes]) -> list[object]:
    results: list[object] = []
    try:
        for part in parts:
            results.extend(reader.feed(part))
    except TallyError as error:
        results.append(type(error))
    return results


def link(data: bytes) -> None:
    """A message of the node link and its possible payloads."""
    _, _, payload = unpack_link(data)
    raw = loads(payload, "payload")
    readers = (Challenge, Hello, Capacity, ClaimRequest, LateReceipt)
    for read in (*(reader.from_json for reader in readers), read_asks):
        with contextlib.suppress(TallyError):
            read(raw)


def job_link(data: bytes) -> None:
    """A message of the link between client and coordinator, cut into frames as both ends do, and the payloads in it."""
    readers = (read_submit, read_orders, lambda payload: read_greeting(payload, "hello", "the client"))
    for _, kind, payload in read_records(data):
        for read in readers:
            with contextlib.suppress(TallyError):
                read(payload)
        with contextlib.suppress(TallyError):
            assert b"".join(split_frames(payload, 64)) == payload
        assert list(FrameReader(len(payload)).feed(pack_frame(kind, payload))) == [(kind, payload)]


def submission(data: bytes) -> None:
    """A posted job, which is written again as it was read."""
    read = Submission.loads(data)
    assert Submission.loads(read.dumps()) == read
    for candidate in read.candidates:
        with contextlib.suppress(TallyError):
            candidate.order.verify(DOMAIN)


def dispatch(data: bytes) -> None:
    """A job as a node receives it."""
    assert Dispatch.loads(Dispatch.loads(data).dumps()) == Dispatch.loads(data)


def signed(data: bytes) -> None:
    """Signed messages as JSON."""
    for kind in (Ask, Order, Receipt, Claim, LogHead):
        with contextlib.suppress(TallyError):
            message = loads_signed(kind, data)
            with contextlib.suppress(TallyError):
                message.verify(DOMAIN)
    with contextlib.suppress(TallyError):
        Terms.from_json(loads(data, "terms"))


def binary(data: bytes) -> None:
    """Messages in binary form, of which each has exactly one."""
    for kind in (Ask, Order, Receipt, Claim, LogHead):
        with contextlib.suppress(TallyError):
            message = read_signed_bytes(kind, data)
            assert message.to_bytes() == data
            assert kind.from_json(message.message.to_json()).to_bytes() == message.message.to_bytes()
            with contextlib.suppress(TallyError):
                message.verify(DOMAIN)
    with contextlib.suppress(TallyError):
        assert Terms.from_bytes(data).to_bytes() == data


def match_log(data: bytes) -> None:
    """Matches, their leaves, and evidence about the log that they are in; each has one form, and a replay judges any leaf."""
    with contextlib.suppress(TallyError):
        assert Match.loads(data).dumps() == data
    with contextlib.suppress(TallyError):
        assert load_leaf(data).dumps() == data
    with contextlib.suppress(TallyError):
        judge(LogEvidence.loads(data))
    list(LogReplay().add(leaf_hash(data), data))


def reports(data: bytes) -> None:
    """Reports of audits, as the coordinator reads them."""
    read = ReportRequest.from_json(loads(data, "report"))
    assert ReportRequest.from_json(loads(dumps(read.to_json()), "report")) == read
    check_report(read, DOMAIN, PROVIDER, 1_700_000_000)


def seals(data: bytes) -> None:
    """Bytes that pretend to be sealed: only sealed ones open, and others change nothing."""
    with contextlib.suppress(BadSeal):
        KEY.open_request(JOB, data)
    with contextlib.suppress(BadSeal):
        SEALING_KEY.unwrap(data, job=JOB, order_hash=ORDER, provider=PROVIDER)
    opener, sealer = Opener(KEY, JOB, ORDER), Sealer(KEY, JOB, ORDER)
    with contextlib.suppress(BadSeal):
        opener.open(data)
    assert opener.open(sealer.seal(b"first")) == b"first"
    with contextlib.suppress(TallyError):
        split_request(data)
    with contextlib.suppress(TallyError):
        load_response_head(data)


def events(data: bytes) -> None:
    """An engine's event stream, split anywhere, and the contents of its events."""
    try:
        whole = list(_events([data]))
        cut = data[0] if data else 0
        assert list(_events([data[:cut], data[cut:]])) == whole
    except MalformedAnswer:
        return
    for event in whole:
        text = event_data(event)
        if text is not None:
            with contextlib.suppress(MalformedAnswer):
                read_completion(text)


def _events(parts: list[bytes]) -> Iterator[bytes]:
    reader = EventReader(4_096)
    for part in parts:
        yield from reader.feed(part)


def answers(data: bytes) -> None:
    """An engine's documents, as the node and as the client read them, and anybody's error documents."""
    for read in (read_completion, read_other_answer, read_models, read_load):
        with contextlib.suppress(MalformedAnswer, TallyError):
            read(data)
    with contextlib.suppress(TallyError):
        read_text(data)
    read_engine_error(500, data)
    with contextlib.suppress(TallyError):
        error_from_json(loads(data, "error"), 502)


SELLS_ALL = replace(OFFER, spec=Spec(features=("/v1/responses", "/v1/audio/transcriptions", SCORES)))
SCORE_REQUEST = ScoreRequest("m", {"prompt": "a"}, (1, 2), (0, 2))


def scores(data: bytes) -> None:
    """A request for scores as a node reads it, and a referee's answer."""
    raw = loads(data, "scores")
    with contextlib.suppress(TallyError):
        request = ScoreRequest.from_json(raw)
        assert ScoreRequest.from_json(request.to_json()) == request
    response = ScoreResponse.from_json(raw, SCORE_REQUEST)
    assert len(ScoreResponse.from_json(response.to_json(), SCORE_REQUEST).rows) == 2


def requests(data: bytes) -> None:
    """A caller's request, as the client and as the node read it."""
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/audio/transcriptions",
        SCORES,
    ):
        for kind in ("application/json", "multipart/form-data; boundary=b"):
            with contextlib.suppress(TallyError):
                summarise(path, data, kind)
            with contextlib.suppress(TallyError):
                prepare(RequestHead(path, kind), data, SELLS_ALL, 100)


def proofs(data: bytes) -> None:
    """A proof file."""
    read_proof(data).check()


def evidence(data: bytes) -> None:
    """An evidence file."""
    raw = loads(data, "file")
    EvidenceFile.from_json(raw if isinstance(raw, dict) else {}).check()


def texts(data: bytes) -> None:
    """The texts of requests and answers for a recount of tokens."""
    for path in ("/v1/chat/completions", "/v1/completions"):
        request_texts(path, data)
    for kind in ("application/json", "text/event-stream"):
        answer_texts(kind, data)


def dialects(data: bytes) -> None:
    """Requests in other dialects than OpenAI's chat; answers, errors and streams, split anywhere, translated to them."""
    for path, dialect in DIALECTS.items():
        with contextlib.suppress(TallyError):
            assert dialect.translate(data).body == dialect.translate(data).body
        dialect.engine_error(400, data, request_id="x")
        translation = dialect.translate(DIALECT_REQUESTS[path])
        with contextlib.suppress(TallyError):
            translation.answer(data, job="ab", billed=None)
        whole, parts, cut = translation.open_stream(job="ab"), translation.open_stream(job="ab"), data[0] if data else 0
        output = parts.feed(data[:cut]) + parts.feed(data[cut:]) + parts.finish(None)
        assert whole.feed(data) + whole.finish(None) == output


DIALECT_REQUESTS = {
    MESSAGES: b'{"model":"m","max_tokens":5,"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"stream":true}',
    RESPONSES: b'{"model":"m","input":[{"role":"user","content":"hi"}],"tools":[{"type":"function","name":"t"}],"stream":true}',
}

TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        frames,
        link,
        job_link,
        submission,
        dispatch,
        signed,
        binary,
        match_log,
        reports,
        seals,
        events,
        answers,
        requests,
        scores,
        proofs,
        evidence,
        texts,
        dialects,
    )
}
"""All of them by name."""


def seeds() -> dict[str, list[bytes]]:
    """Valid inputs of each target, as seeds."""
    ann, job = person("ann"), JobId(bytes(16))
    ask = make_ask(ann)
    terms = make_terms(ask, job)
    order = make_order(terms, ann.address)
    placed, receipt, claim = make_submission(ask), make_receipt(ann, order, terms), make_claim(ann, (order, 1, 20))
    head, chunk = ResponseHead(200, "application/json"), b'data: {"choices":[{"delta":{"content":"hi"}}]}\n\n'
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 5}
    match = build_match(order, terms)
    log_head = LogHead(coordinator=ann.address, size=2, root=match.leaf_hash, signed_at=1_700_000_000)
    messages: tuple[Signed[Message], ...] = (ask, order, receipt, claim.claim, ann.sign(log_head, DOMAIN))
    listed = [signed.dumps().encode() for signed in messages]
    whole = dumps({"choices": [{"message": {"content": "hi"}}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    proof = Proof(DOMAIN, order, terms, receipt, bytes(32), join_request(RequestHead("/v1/x"), b"{}"), (chunk,))
    report = ann.sign(
        replace(
            build_report(receipt, PROVIDER, job, ("m", "f16"), AuditVerdict.PASS, reported_at=1, random=bytes), payer=ann.address
        ),
        DOMAIN,
    )
    listing = Listing.of_one_group((ask,), Capacity(1, 2))
    return {
        "frames": [pack_frame(Kind.MATCH, match.dumps()) + pack_frame(Kind.CHUNK, chunk) + pack_frame(Kind.RECEIPT, listed[2])],
        "link": [
            pack_link(Kind.HELLO, payload=dumps({"connect": {}, **listing.to_json(), "software": "x", "protocol": 2})),
            pack_link(Kind.ASKS, payload=dumps(listing.to_json())),
            pack_link(Kind.CLAIM, payload=dumps(claim.to_json())),
            pack_link(Kind.BEAT, payload=dumps(Beat({0: Capacity(1, 2)}).to_json())),
            pack_link(Kind.LATE_RECEIPT, payload=dumps(LateReceipt(receipt, order, terms).to_json())),
        ],
        "job_link": [
            pack_record(0, Kind.HELLO, pack_greeting("x")),
            pack_record(1, Kind.SUBMIT, pack_submit(placed.dumps(), 60)) + pack_record(1, Kind.CREDIT, bytes(4)),
            pack_record(1, Kind.ORDERS, pack_orders(placed.candidates)),
            pack_record(1, Kind.CHUNK, pack_frame(Kind.MATCH, match.dumps()) + pack_frame(Kind.CHUNK, chunk)),
        ],
        "submission": [placed.dumps()],
        "dispatch": [Dispatch(match, placed.candidates[0], b"sealed").dumps()],
        "binary": [*(signed.to_bytes() for signed in messages), terms.to_bytes()],
        "match_log": [
            match.dumps(),
            match.leaf,
            LogEvidence(
                Fraud.MISSING, DOMAIN, ann.address, (ann.sign(log_head, DOMAIN),), match, placed.candidates[0].order
            ).dumps(),
        ],
        "signed": [*listed, dumps(terms.to_json())],
        "reports": [dumps(ReportRequest(report, receipt).to_json())],
        "seals": [
            KEY.seal_request(JOB, b"body"),
            Sealer(KEY, JOB, ORDER).seal(b"chunk"),
            wrap_key(KEY, X25519, SEALING_KEY.public, job=JOB, order_hash=ORDER, provider=PROVIDER),
            KeySession(X25519, SEALING_KEY.public).wrap(KEY, job=JOB, order_hash=ORDER, provider=PROVIDER),
            join_request(RequestHead("/v1/chat/completions"), b"{}"),
            dump_response_head(head),
        ],
        "events": [chunk + b": beat\r\n\r\n" + b"event: x\ndata: 1\ndata: 2\n\n" + b"data: [DONE]\n\n"],
        "answers": [whole, dumps({"data": [{"id": "m", "max_model_len": 5}]}), dumps({"error": {"message": "no", "code": "x"}})],
        "requests": [dumps(chat), dumps({"model": "m", "prompt": ["a", [1, 2]]}), dumps({"model": "m", "input": "a"})],
        "scores": [
            dumps(SCORE_REQUEST.to_json()),
            dumps(ScoreResponse("m", 1, (1, 2), (ScoreRow.of(0, 1, {1: -0.5, 7: -2.0}, 5), None)).to_json()),
        ],
        "proofs": [proof.dumps()],
        "evidence": [EvidenceFile(DOMAIN, "because", order, terms, receipt, (receipt,), proof).dumps()],
        "dialects": [*DIALECT_REQUESTS.values(), whole, chunk],
        "texts": [dumps(chat), whole, chunk, dumps({"prompt": ["a", "b"]})],
    }


def run(target: Target, data: bytes) -> None:
    """Runs one input, which may raise only errors of this project."""
    with contextlib.suppress(TallyError):
        target(data)

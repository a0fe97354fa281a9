"""Answers and requests that a provider, or an application, can send, and what becomes of the audits beside theirs."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tallystick.client.audit_settings import OwnReferee, PromptConsent
from tallystick.client.audits import conduct, referees
from tallystick.client.audits.auditor import MAX_PACKED
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.records import KnownAudit
from tallystick.client.audits.schema import AuditKind, AuditState
from tallystick.client.audits.subject import Subject
from tallystick.client.sdk.audits import MarketAudits
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.lenient_json import load_lenient
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tests.client.audits.parties import ALICE, HONEST, REQUEST, SHARED, prove, sold
from tests.client.audits.test_auditor import World
from tests.client.audits.test_conduct import honest_market
from tests.client.parties import MODEL, NOW_S

WORDS = b"1 2 3 4 5 6 7 8 9 10 " * 6
HUGE = b"1" + b"0" * 400
DEEP = b"[" * 400 + b"]" * 400


def answer_of(
    message: bytes = b"", *, content: bytes = b'"' + WORDS + b'"', finish: bytes = b'"stop"', more: bytes = b""
) -> bytes:
    """The bytes of an answer with these members."""
    return b'{"choices":[{"index":0,"message":{"role":"assistant","content":%b%b},"finish_reason":%b}]%b}' % (
        content,
        message,
        finish,
        more,
    )


def request_of(**members: bytes) -> bytes:
    """The bytes of a request with these members, each as it is spelled."""
    body = orjson.dumps(REQUEST)[:-1]
    for name, value in members.items():
        body += b',"%b":%b' % (name.encode(), value)
    return body + b"}"


def bare(answer: bytes, request: bytes = orjson.dumps(REQUEST), consent: PromptConsent = SHARED) -> KeptJob:
    """An answer of these bytes without evidence."""
    proof = prove(ALICE, CHAT, request, answer, usage=Usage(5, 0, 60))
    return KeptJob(proof, b"", Signed(ALICE.ask.message, ALICE.ask.signature), "", consent, NOW_S)


ANSWERS = {
    "half a character": answer_of(content=b'"' + WORDS + b'\\ud83d"'),
    "other half": answer_of(content=b'"\\udc00' + WORDS + b'"'),
    "invalid UTF-8": answer_of(content=b'"' + WORDS + b'\xff\xfe"'),
    "content that is a number": answer_of(content=HUGE),
    "content that is deep": answer_of(content=DEEP),
    "finish that is huge": answer_of(finish=HUGE),
    "finish that is half a character": answer_of(finish=b'"\\ud800"'),
    "reasoning": answer_of(b',"reasoning":" "'),
    "tool calls": answer_of(b',"tool_calls":[{}]'),
    "no choices": b"{}",
    "choices of a number": b'{"choices":7}',
    "no JSON": b"\xff{",
    "a short one": answer_of(content=b'"no"'),
    "NUL": answer_of(content=b'"' + WORDS + b'\\u0000"'),
}
REQUESTS = {
    "a huge temperature": request_of(temperature=HUGE),
    "a temperature beyond floats": request_of(temperature=b"1e400"),
    "a temperature that is none": request_of(temperature=b"NaN"),
    "a huge top_k": request_of(top_k=HUGE, top_p=HUGE, min_p=HUGE),
    "a huge seed": request_of(seed=HUGE),
    "half a character": request_of(messages=b'[{"role":"user","content":"\\ud83d"}]'),
    "deep tools": request_of(tools=DEEP),
    "deep options": request_of(stream_options=DEEP),
    "a huge number in a schema": request_of(tools=b'[{"type":"function","function":{"name":"f","maximum":%b}}]' % HUGE),
    "messages of other kinds": request_of(messages=b"[1,null,{}]"),
    "messages that are none": request_of(messages=b"5"),
    "a model that is none": request_of(model=b"5"),
    "limits that are none": request_of(max_tokens=b'"x"', max_completion_tokens=HUGE),
}
JOBS = {f"answer: {name}": bare(answer) for name, answer in ANSWERS.items()} | {
    f"request: {name}": bare(answer_of(), request) for name, request in REQUESTS.items()
}


class OwnEngine:
    """A scorer of the user's own."""

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """See Scorer."""
        return HONEST.score(request)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A world in which every job is drawn."""
    world = World(tmp_path, honest_market())
    world.draws = bytes
    await world.open()
    yield world
    await world.close()


def use_own_engine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets an engine of the user's own judge."""

    async def found(_api: Any, _model: str) -> OwnEngine:
        return OwnEngine()

    monkeypatch.setattr(referees, "find_scorer", found)
    own = OwnReferee(name="mine", url="http://127.0.0.1:1", model=MODEL, precision="bf16")
    world.config = replace(world.config, referees=(own,))


async def audits_of(world: World, *jobs: KeptJob) -> list[KnownAudit]:
    """Draws jobs, audits for hours, and returns the audits, the oldest first."""
    auditor = world.auditor()
    for kept in jobs:
        auditor.offer(kept)
    for _ in range(10):
        await auditor.work_once()
        world.now += 3_600
    return (await (await auditor.store()).latest(64))[::-1]


@pytest.fixture(autouse=True)
def _no_work_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests take what was drawn themselves, however long that takes on a busy machine."""
    monkeypatch.setattr("tallystick.client.audits.auditor.WORK_SECONDS", 3_600.0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", JOBS)
async def test_no_job_stops_the_audits_of_others(world: World, monkeypatch: pytest.MonkeyPatch, name: str, own: bool) -> None:
    """Its own audit may fail; whatever is drawn after it is judged, and nothing waits for ever."""
    if own:
        use_own_engine(world, monkeypatch)
    others = [sold(ALICE, HONEST) for _ in range(2)]
    audits = await audits_of(world, JOBS[name], *others)
    assert all(audit.state is not AuditState.PENDING for audit in audits)
    assert {audit.job for audit in audits if audit.state is AuditState.DONE} >= {kept.job.hex() for kept in others}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["half a character", "other half", "invalid UTF-8"])
async def test_no_spelling_of_a_text_exempts_it(world: World, monkeypatch: pytest.MonkeyPatch, name: str, own: bool) -> None:
    """A referee gets a text that any tokenizer reads, and judges it."""
    if own:
        use_own_engine(world, monkeypatch)
    (audit,) = await audits_of(world, bare(ANSWERS[name]))
    assert (audit.kind, audit.state) == (AuditKind.JOB, AuditState.DONE)
    for _, request in world.market.asked:
        assert isinstance(request.completion, str)
        assert request.completion.encode()


@pytest.mark.parametrize("name", ["half a character", "a huge number in a schema"])
async def test_no_spelling_of_a_prompt_exempts_its_answer(world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a referee was asked and said is kept as it was."""
    use_own_engine(world, monkeypatch)
    (audit,) = await audits_of(world, bare(answer_of(), REQUESTS[name]))
    assert (audit.kind, audit.state) == (AuditKind.JOB, AuditState.DONE)


@pytest.mark.parametrize("name", ["half a character", "a huge number in a schema"])
async def test_a_prompt_is_shown_as_it_was(name: str) -> None:
    """The scoring job that is ordered has the same prompt, however the application spelled it."""
    bodies: list[bytes] = []

    async def submit(_path: str, body: bytes, **_: Any) -> Any:
        bodies.append(body)
        raise Unavailable(Code.COORDINATOR_UNAVAILABLE, "down")

    market = MarketAudits(submit, Any, Any, Any, now=lambda: NOW_S, fetch_evidence=Any)  # type: ignore[arg-type]
    asked = Subject.of(bare(answer_of(), REQUESTS[name])).question(8, bytes)
    with pytest.raises(Unavailable):
        await market.score(ALICE.ask, asked, "audit-1")
    assert ScoreRequest.from_json(load_lenient(bodies[0])) == asked


async def test_halves_of_a_character_are_joined() -> None:
    """Engines that stream by UTF-16 units send one character in two events."""
    (text,) = {
        audit_text(bare(answer_of(content=b'"' + WORDS + spelled + b'"')))
        for spelled in (b"\\ud83d\\ude00", "\U0001f600".encode())
    }
    assert text.endswith("\U0001f600")


def audit_text(kept: KeptJob) -> str:
    """What a referee reads."""
    return Subject.of(kept).text


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("name", "size"), [*((name, 10) for name in ANSWERS), ("no JSON", 700_000), ("NUL", 700_000), ("NUL", MAX_PACKED + 1_000)]
)
async def test_no_form_or_size_exempts_a_provider(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, size: int, own: bool
) -> None:
    """What cannot be audited itself is audited by a request of its shape, which is as long."""
    if own:
        use_own_engine(world, monkeypatch)
    request = REQUEST | {"messages": [{"role": "user", "content": "secret " * (size // 7 + 1)}]}
    auditor = world.auditor()
    auditor.offer(bare(ANSWERS[name], orjson.dumps(request)))
    await auditor._take_drawn()
    (audit,) = await (await auditor.store()).latest(5)
    assert audit.state is AuditState.PENDING
    assert audit.kept is not None
    if audit.kind is AuditKind.SYNTHETIC:
        assert len(audit.kept) < 16_384
        assert b"secret" not in audit.kept
        world.now += 600
        await auditor.work_once()
        (placed,) = world.market.placed
        assert abs(len(placed["messages"][0]["content"]) - size) < 300
    else:
        assert size == 10


@pytest.mark.parametrize("member", [{"n": 2}, {"max_tokens": 1}, {"max_completion_tokens": 4}])
async def test_no_request_is_made_up_in_vain(world: World, member: dict[str, Any]) -> None:
    """The user asked for what cannot be audited, so one of its shape could not be either."""
    assert await audits_of(world, bare(ANSWERS["a short one"], orjson.dumps(REQUEST | member))) == []


async def test_a_bug_is_one_audits_failure(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of whatever kind; and a verdict that was reached before it stays. The log says where it was, and nothing of a prompt."""
    real = conduct.Conductor._conclude
    bad = sold(ALICE, HONEST)

    async def conclude(self: conduct.Conductor, audit: KnownAudit, *rest: Any) -> Any:
        concluded = await real(self, audit, *rest)
        if audit.job == bad.job.hex():
            raise ZeroDivisionError("\ud83d")
        return concluded

    monkeypatch.setattr(conduct.Conductor, "_conclude", conclude)
    audits = await audits_of(world, bad, sold(ALICE, HONEST))
    assert [audit.state for audit in audits] == [AuditState.DONE] * 2

    async def broken(*_: Any) -> Any:
        raise ZeroDivisionError("\ud83d")

    await world.auditors[0].close()
    monkeypatch.setattr(conduct.Conductor, "_conclude", broken)
    capsys.readouterr()
    failed = (await audits_of(world, sold(ALICE, HONEST)))[-1]
    logged = capsys.readouterr().out
    assert "ZeroDivisionError" in logged
    assert "What is a tally?" not in logged
    assert failed.state is AuditState.FAILED
    assert "a bug in this client: ZeroDivisionError" in failed.reason


async def test_a_draw_waits_for_its_file_and_for_nothing_else(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is locked now keeps the draws; a bug loses the one that it is about."""
    auditor = world.auditor()
    kept = [sold(ALICE, HONEST) for _ in range(2)]
    for job in kept:
        auditor.offer(job)
    errors: list[Exception] = [Unavailable(Code.COORDINATOR_UNAVAILABLE, "locked"), ZeroDivisionError()]
    real = auditor._record_draw

    async def record(job: KeptJob, number: float) -> None:
        if errors:
            raise errors.pop(0)
        await real(job, number)

    monkeypatch.setattr(auditor, "_record_draw", record)
    with pytest.raises(Unavailable):
        await auditor.work_once()
    assert await auditor.work_once() == 1
    (audit,) = await (await auditor.store()).latest(5)
    assert audit.job == kept[1].job.hex()


NATIVE = {
    "/v1/responses": {
        "model": MODEL,
        "instructions": "Be brief.",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "secret " * 40}]}],
        "max_output_tokens": 200,
        "temperature": 0.5,
    },
    "/v1/messages": {
        "model": MODEL,
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "secret " * 40}],
        "max_tokens": 200,
        "temperature": 0.5,
    },
}


def native(path: str, **changes: Any) -> KeptJob:
    """A job of a route that is not a chat's."""
    proof = prove(ALICE, path, orjson.dumps(NATIVE[path] | changes), b'{"output":[]}', usage=Usage(5, 0, 60))
    return KeptJob(proof, b"", Signed(ALICE.ask.message, ALICE.ask.signature), "", SHARED, NOW_S)


@pytest.mark.parametrize("path", NATIVE)
async def test_other_apis_are_audited_by_chats_of_their_shape(world: World, path: str) -> None:
    """A provider does not escape because its caller speaks another API. No word of the request is used."""
    auditor, kept = world.auditor(), native(path)
    assert auditor.auditable(path)
    with pytest.raises(BadMessage, match=f"{path} cannot be audited.*as a chat"):
        await auditor.audit(kept)
    world.draws = bytes
    auditor.offer(kept)
    await auditor._take_drawn()
    world.now += 3_600
    world.draws = random.Random(7).randbytes
    assert await auditor.work_once() == 1
    (placed,) = world.market.placed
    assert (placed["model"], placed["temperature"]) == (MODEL, 0.5)
    assert {placed.get("max_tokens"), placed.get("max_completion_tokens")} == {None, 200}
    assert [message["role"] for message in placed["messages"]] == ["system", "user"]
    assert 200 < len(placed["messages"][1]["content"]) < 400
    assert "secret" not in repr(placed)
    (audit,) = await (await auditor.store()).latest(9)
    assert (audit.kind, audit.state) == (AuditKind.SYNTHETIC, AuditState.DONE)


@pytest.mark.parametrize("changes", [{"max_output_tokens": 3}, {"tools": [{"type": "web_search"}]}, {"input": 7}])
async def test_what_no_chat_can_ask_is_left_out(world: World, changes: dict[str, Any]) -> None:
    """Such as a tool that runs at OpenAI; the audits after it go on."""
    auditor = world.auditor()
    world.draws = bytes
    auditor.offer(native("/v1/responses", **changes))
    auditor.offer(native("/v1/responses"))
    await auditor._take_drawn()
    assert len(await (await auditor.store()).latest(9)) == 1

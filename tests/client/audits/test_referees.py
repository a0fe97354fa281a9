from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest

from tallystick.audit.verdicts import Verdict
from tallystick.client.audit_settings import OwnReferee, PromptConsent
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.planning import RefereeChoice
from tallystick.client.audits.referees import BadScores, ask_referee
from tallystick.client.audits.store import AuditStore
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, TallyError, Unavailable
from tallystick.protocol.messages import Ask
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import SCORES
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.token_scores import ScoreRequest
from tests.client.audits.parties import ALICE, HONEST, REQUEST, Referees, build_bench, prove, seller, sold
from tests.client.audits.test_conduct import conduct
from tests.client.parties import MODEL
from tests.scoring.engines import FakeEngine, llama_cpp, logprobs, refused, serving, template, text_only, tokens_of, vllm

ANSWER = "A tally is a stick with notches, split in two."
PROMPT = tokens_of(template(REQUEST["messages"]))


def sold_by_the_engine_of_bytes(*, honest: bool) -> KeptJob:
    """An answer whose rows are those of the fake engines' model, or of no model."""
    tokens = tokens_of(ANSWER)
    rows = tuple(
        EvidenceRow.of(token, (logprobs(PROMPT + tokens[:at]) if honest else {1: -0.5, 2: -1.5, 3: -3.0}).items())
        for at, token in enumerate(tokens)
    )
    kept = sold(ALICE, HONEST, consent=PromptConsent())
    answer = {"choices": [{"index": 0, "message": {"content": ANSWER}, "finish_reason": "stop"}]}
    proof = prove(
        ALICE,
        "/v1/chat/completions",
        orjson.dumps(REQUEST | {"temperature": None}),
        orjson.dumps(answer),
        usage=Usage(len(PROMPT), 0, len(tokens)),
        rows=rows,
    )
    assert proof.receipt.message.evidence_root == evidence_root(rows)
    return replace(kept, proof=proof, evidence=pack_evidence(rows))


@pytest.mark.parametrize("engine", [llama_cpp, vllm])
@pytest.mark.parametrize("honest", [True, False])
async def test_an_engine_of_ones_own_judges(store: AuditStore, engine: Callable[[], FakeEngine], honest: bool) -> None:
    """Without anybody's consent, since nobody else sees the prompt, and without cost."""
    async with serving(engine()) as url:
        own = (OwnReferee(name="desk", url=url, model=MODEL, served_model="toy", precision="bf16"),)
        bench = build_bench(store, Referees(), own=own)
        verdict = await conduct(bench, sold_by_the_engine_of_bytes(honest=honest))
    assert verdict is (Verdict.PASS if honest else Verdict.SUSPECT)
    conclusion, _ = bench.conclusions[0]
    assert [opinion.referee for opinion in conclusion.opinions] == ["own:desk"]
    assert conclusion.audit.cost == 0


@pytest.mark.parametrize("referee", [{"model": "another"}, {"precision": "fp8"}])
def test_an_engine_judges_what_it_has(referee: dict[str, Any]) -> None:
    """Another model, or another class of it, is another product."""
    own = OwnReferee(**({"name": "desk", "url": "http://a", "model": MODEL} | referee))
    assert not own.serves(MODEL, "bf16")


async def test_an_engine_that_cannot_score_is_named() -> None:
    """The error says what is expected of it."""
    async with serving(text_only()) as url:
        own = OwnReferee(name="desk", url=url, model=MODEL)
        with pytest.raises(Unavailable, match="desk cannot score: expected an engine such as"):
            await ask_referee(Referees(), RefereeChoice(own=own), ScoreRequest.of(REQUEST, (1, 2), (0,)), "audit-1")


async def test_an_engine_that_is_down_is_asked_later(store: AuditStore) -> None:
    """That is no verdict."""
    own = (OwnReferee(name="desk", url="http://127.0.0.1:1", model=MODEL, timeout_seconds=5),)
    with pytest.raises(Unavailable):
        await conduct(build_bench(store, Referees(), own=own), sold(ALICE, HONEST))


@pytest.mark.parametrize(
    ("body", "output", "error"),
    [
        (b"{}", 0, BadScores),
        (b"not JSON", 0, BadScores),
        (b'{"object": "score", "model": "m", "prompt_tokens": 1, "tokens": [1, 2], "rows": []}', 0, BadScores),
        (b"[" * 100_000, 0, BadScores),
        (b" " * (5 << 20), 0, BadScores),
        (b"{}", 7, BadScores),
    ],
)
async def test_a_referee_that_takes_money_for_nothing(body: bytes, output: int, error: type[BadMessage]) -> None:
    """The error has what it cost."""
    bob = seller("bob")
    request = ScoreRequest.of(REQUEST, (1, 2), (0, 1))

    class Market(Referees):
        async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
            return prove(bob, SCORES, orjson.dumps(request.to_json()), body, usage=Usage(9, 0, output))

    with pytest.raises(error) as caught:
        await ask_referee(Market(), RefereeChoice(ask=bob.ask), request, "audit-1")
    assert isinstance(caught.value, BadScores)
    assert caught.value.cost > 0


async def test_a_refusal_is_no_fault() -> None:
    """An engine may be unable to read this text."""
    bob = seller("bob")

    class Market(Referees):
        async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
            return prove(bob, SCORES, b"{}", b"{}", usage=Usage(0, 0, 0), status=400)

    with pytest.raises(BadMessage, match="cannot score this answer") as caught:
        await ask_referee(Market(), RefereeChoice(ask=bob.ask), ScoreRequest.of(REQUEST, (1, 2), (0,)), "audit-1")
    assert not isinstance(caught.value, BadScores)


@pytest.mark.parametrize("status", [400, 429, 500, 503])
async def test_errors_name_the_referee(status: int) -> None:
    """Whoever has several must know which one failed, and why."""
    engine = vllm()
    engine.endpoints = dict.fromkeys(engine.endpoints, lambda _body: refused(status))
    async with serving(engine) as url:
        referee = OwnReferee(name="desk", url=url, model=MODEL, served_model="toy")
        request = ScoreRequest.of(REQUEST, "one two", (0, 1))
        with pytest.raises(TallyError, match="referee own:desk"):
            await ask_referee(Referees(), RefereeChoice(own=referee), request, "")
    with pytest.raises(Unavailable, match="the referee own:desk: the engine cannot be asked for scores: Client"):
        await ask_referee(Referees(), RefereeChoice(own=referee), request, "")


async def test_errors_of_the_market_name_the_referee() -> None:
    """Also where another provider's job fails."""

    class Down(Referees):
        async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
            raise Unavailable(Code.PROVIDER_FAILED, "the job failed", fault=Fault.PROVIDER)

    choice = RefereeChoice(ask=ALICE.ask)
    with pytest.raises(Unavailable, match=f"the referee {ALICE.address}: the job failed"):
        await ask_referee(Down(), choice, ScoreRequest.of(REQUEST, "one two", (0, 1)), "audit-1")

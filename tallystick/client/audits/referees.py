"""Asks referees: an engine of the user's own over HTTP, or another provider by an ordinary job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import orjson

from tallystick.client.audit_settings import OwnReferee
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.planning import RefereeChoice, own_name
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import BadMessage, Code, Fault, Unavailable
from tallystick.protocol.lenient_json import dump_lenient, parse_lenient
from tallystick.protocol.messages import Ask
from tallystick.protocol.plaintext_heads import load_response_head
from tallystick.protocol.token_scores import ScoreRequest, ScoreResponse
from tallystick.protocol.types import Amount, JobId
from tallystick.scoring.detect import find_scorer
from tallystick.scoring.engine_api import EngineApi, NoSuchRoute, naming

MAX_SCORES_BYTES = 4 << 20
"""Bytes of a referee's answer."""


class BadScores(BadMessage):
    """A referee was paid and sent no scores. `cost` is in base units."""

    def __init__(self, message: str, cost: Amount) -> None:
        super().__init__(message, fault=Fault.PROVIDER)
        self.cost = cost


@dataclass(frozen=True, slots=True)
class Scored:
    """A referee's answer. `document`: its bytes for the file: the proof of a provider's job, or an own engine's bare JSON."""

    response: ScoreResponse
    document: bytes
    cost: Amount = Amount(0)


class AuditMarket(Protocol):
    """What audits need of the market. Every wait is bounded by the config's timeouts."""

    async def scoring_asks(self, model: str) -> Sequence[Verified[Ask]]:
        """The asks of providers that sell scoring of a model. Empty if there are none. Raises TallyError."""
        ...

    async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
        """Pays a provider for scoring. `key`: an idempotency key of the job. Raises TallyError."""
        ...

    async def place_synthetic(self, path: str, body: bytes) -> KeptJob:
        """Runs an ordinary job, at whichever provider gets it, and returns it as it would be kept. Raises TallyError."""
        ...

    async def fetch_evidence(self, job: JobId) -> bytes:
        """The packed evidence of a job, which did not come with its answer. Empty if its provider does not hand it over.

        Raises Unavailable if it may do so later.
        """
        ...


async def ask_referee(market: AuditMarket, choice: RefereeChoice, request: ScoreRequest, key: str) -> Scored:
    """Asks one referee. Raises TallyError, which names it; BadMessage for numbers that are none."""
    with naming(f"the referee {choice.name}"):
        if choice.own is not None:
            return await _ask_own(choice.own, request)
        if choice.ask is None:
            raise BadMessage("referee: expected an engine or an ask")
        return await _ask_provider(market, choice, choice.ask, request, key)


async def _ask_provider(
    market: AuditMarket, choice: RefereeChoice, ask: Verified[Ask], request: ScoreRequest, key: str
) -> Scored:
    proof = await market.score(ask, request, key)
    cost = proof.receipt.message.cost
    if not proof.response or load_response_head(proof.response[0]).status != 200:
        raise BadMessage(f"the referee {choice.name} cannot score this answer", fault=Fault.PROVIDER)
    if proof.receipt.message.output_tokens:
        raise BadScores(f"the referee {choice.name} bills output, and scoring has none", cost)
    try:
        document = dump_lenient({"job": orjson.loads(proof.dumps()), "ask": Signed(ask.message, ask.signature).to_json()})
        return Scored(read_scores(proof, request), document, cost)
    except BadMessage as error:
        raise BadScores(f"the referee {choice.name} sent no scores: {error}", cost) from error


def read_scores(proof: Proof, request: ScoreRequest) -> ScoreResponse:
    """The scores that a provider signed for. Raises BadMessage."""
    body = b"".join(proof.response[1:])
    if len(body) > MAX_SCORES_BYTES:
        raise BadMessage(f"score response: expected at most {MAX_SCORES_BYTES} bytes, got {len(body)}")
    return ScoreResponse.from_json(parse_lenient(body, "score response"), request)


async def _ask_own(referee: OwnReferee, request: ScoreRequest) -> Scored:
    served = referee.served_model or referee.model
    async with EngineApi.open(referee.url, referee.read_key(), referee.timeout_seconds) as api:
        scorer = await find_scorer(api, served)
        if scorer is None:
            text = f"the referee {own_name(referee)} cannot score: expected an engine such as vLLM, SGLang or llama.cpp's server"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.CLIENT)
        try:
            response = await scorer.score(request)
        except NoSuchRoute:
            text = f"the referee {own_name(referee)} did not answer as an engine that scores"
            raise Unavailable(Code.ENGINE_UNAVAILABLE, text, fault=Fault.CLIENT) from None
    document = {"referee": referee.name, "request": request.to_json(), "response": response.to_json()}
    return Scored(response, dump_lenient(document))

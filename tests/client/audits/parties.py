"""Providers that sell answers of toy models, and referees that judge them: with real orders, receipts, seals and evidence."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from tallystick.client.audit_settings import AuditSettings, OwnReferee, PromptConsent
from tallystick.client.audits.conduct import Conclusion, Conductor
from tallystick.client.audits.kept_job import KeptJob
from tallystick.client.audits.store import AuditStore
from tallystick.client.audits.threshold_table import ThresholdTable
from tallystick.client.orders.signing import sign_order, terms_for
from tallystick.client.orders.tab import Tab
from tallystick.client.receipts.proof import Proof
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.errors import TallyError
from tallystick.protocol.lenient_json import dump_lenient
from tallystick.protocol.messages import Ask, Spec
from tallystick.protocol.plaintext_heads import (
    RequestHead,
    ResponseHead,
    dump_response_head,
    join_request,
    split_request,
)
from tallystick.protocol.pricing import Usage
from tallystick.protocol.routes import CHAT, SCORES
from tallystick.protocol.sealing import Transcript, commit_request
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence
from tallystick.protocol.token_scores import PROMPT_MEMBERS, ScoreRequest, ScoreResponse
from tallystick.protocol.types import JobId
from tests.builders import receipt_for
from tests.client.audits.toy_model import ToyModel
from tests.client.parties import COORDINATOR, DOMAIN, MODEL, NOW, NOW_S, PAYER, POLICY, Provider

SPEC = Spec(precision="bf16", features=(SCORES,))
SHARED = PromptConsent(may_share=True)
KEY = b"k" * 32
SEEDS = itertools.count(1_000)
"""Seeds of answers, which `restart_seeds` sets back: chance must not decide whether a test passes."""
REQUEST: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "What is a tally?"}], "temperature": 0.7}


def restart_seeds() -> None:
    """Makes the answers of a test the same in every run."""
    global SEEDS  # noqa: PLW0603 - one sequence for all answers of a test
    SEEDS = itertools.count(1_000)


def seller(name: str, **changes: Any) -> Provider:
    """A provider of the model in bf16, which sells scoring too."""
    return Provider.make(name, **({"spec": SPEC} | changes))


def prove(
    provider: Provider,
    path: str,
    body: bytes,
    response: bytes,
    *,
    usage: Usage,
    rows: Sequence[EvidenceRow] = (),
    status: int = 200,
    job: JobId | None = None,
) -> Proof:
    """A job at a provider, as its payer can prove it."""
    job = job or JobId(os.urandom(16))
    plaintext = join_request(RequestHead(path), body)
    terms = terms_for(
        provider.ask, job=job, commitment=commit_request(KEY, job, plaintext), output_tokens=4_096, body_bytes=1 << 20
    )
    placed = sign_order(
        Tab(),
        terms,
        signer=PAYER,
        provider=provider.address,
        coordinator=COORDINATOR,
        domain=DOMAIN,
        policy=POLICY,
        now_ns=NOW,
    )
    chunks = (dump_response_head(ResponseHead(status, "application/json")), response)
    transcript = Transcript(KEY, placed.order.digest)
    for chunk in chunks:
        transcript.add(chunk)
    changes = {"result_commitment": transcript.commitment, "evidence_root": evidence_root(rows), "finished_at": NOW_S}
    receipt = provider.signer.sign(receipt_for(placed.order, terms, usage, **changes), DOMAIN)
    return Proof(
        DOMAIN,
        Signed(placed.order.message, placed.order.signature),
        terms,
        Signed(receipt.message, receipt.signature),
        KEY,
        plaintext,
        chunks,
    )


def sold(
    provider: Provider,
    model: ToyModel,
    *,
    writer: ToyModel | None = None,
    request: dict[str, Any] | None = None,
    consent: PromptConsent = SHARED,
    tokens: Sequence[int] | None = None,
    evidence: bool = True,
    billed: int | None = None,
    length: int = 64,
    seed: int = 0,
    finish: str = "stop",
    keep: Callable[[tuple[EvidenceRow, ...]], tuple[EvidenceRow, ...]] = tuple,
) -> KeptJob:
    """An answer that a provider sold: `model` says how probable its tokens are, `writer` (else the same) wrote them.

    `keep`: what its provider commits to of the evidence.
    """
    request = request or REQUEST
    question = ScoreRequest.of(request, (0,), (0,))
    prompt = repr(sorted(question.prompt.items()))
    if tokens is None:
        draw = random.Random(seed or next(SEEDS))
        tokens = (writer or model).answer(prompt, length, request.get("temperature", 1.0), draw)
    rows = keep(model.rows(prompt, tokens)) if evidence else ()
    text = " ".join(map(str, tokens))
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    usage = Usage(len(prompt.split()), 0, len(tokens) if billed is None else billed)
    proof = prove(provider, CHAT, orjson.dumps(request), orjson.dumps(answer), usage=usage, rows=rows)
    ask = Signed(provider.ask.message, provider.ask.signature)
    return KeptJob(proof, pack_evidence(rows), ask, "", consent, NOW_S)


Score = Callable[[ScoreRequest], ScoreResponse]


@dataclass
class Referees:
    """An `AuditMarket`: referees by name, each with its way to score. `asked`: who was asked what."""

    providers: dict[str, Provider] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    asked: list[tuple[str, ScoreRequest]] = field(default_factory=list)
    placed: list[dict[str, Any]] = field(default_factory=list)
    served: ToyModel = field(default_factory=ToyModel)
    """What a provider of made-up requests serves."""
    seller: Provider | None = None
    failure: TallyError | None = None
    evidence: bytes = b""
    """What a provider hands over of evidence that did not come with the answer."""
    fetched: list[JobId] = field(default_factory=list)

    def add(self, name: str, score: Score, **changes: Any) -> Provider:
        """A referee."""
        provider = seller(name, **changes)
        self.providers[name], self.scores[name] = provider, score
        return provider

    async def scoring_asks(self, model: str) -> Sequence[Verified[Ask]]:
        """See AuditMarket."""
        if self.failure is not None:
            raise self.failure
        return [provider.ask for provider in self.providers.values() if provider.ask.message.model == model]

    async def score(self, ask: Verified[Ask], request: ScoreRequest, key: str) -> Proof:
        """See AuditMarket."""
        assert key.startswith("audit-")
        name = next(name for name, provider in self.providers.items() if provider.address == ask.message.provider)
        self.asked.append((name, request))
        response = self.scores[name](request)
        body = orjson.dumps(response.to_json())
        usage = Usage(response.prompt_tokens + len(response.tokens), 0, 0)
        return prove(self.providers[name], SCORES, dump_lenient(request.to_json()), body, usage=usage)

    async def place_synthetic(self, path: str, body: bytes) -> KeptJob:
        """See AuditMarket."""
        assert path == CHAT
        request = orjson.loads(body)
        self.placed.append(request)
        kept = sold(self.seller or ALICE, self.served, request=request)
        return KeptJob(kept.proof, kept.evidence, kept.ask, "audits", SHARED, NOW_S, synthetic=True)

    async def fetch_evidence(self, job: JobId) -> bytes:
        """See AuditMarket."""
        self.fetched.append(job)
        return self.evidence


ALICE = seller("alice")
HONEST = ToyModel(1)


@dataclass
class Bench:
    """A conductor with its store, and what it concluded."""

    conductor: Conductor
    store: AuditStore
    market: Referees
    conclusions: list[tuple[Conclusion, KeptJob]]


def build_bench(
    store: AuditStore,
    market: Referees,
    *,
    own: Sequence[OwnReferee] = (),
    now: Callable[[], int] = lambda: NOW_S,
    **settings: Any,
) -> Bench:
    """A conductor of audits with these settings."""
    conclusions: list[tuple[Conclusion, KeptJob]] = []

    async def conclude(conclusion: Conclusion, kept: KeptJob) -> None:
        conclusions.append((conclusion, kept))

    chosen = {"planted_percent": 0.0} | settings
    conductor = Conductor(
        settings=AuditSettings(**chosen),
        own=own,
        store=store,
        market=market,
        thresholds=ThresholdTable(),
        now=now,
        random=random.Random(7).randbytes,
        sharing_forbidden=False,
        on_conclusion=conclude,
    )
    return Bench(conductor, store, market, conclusions)


def shown_prompt(request: ScoreRequest) -> dict[str, Any]:
    """What a referee saw of the prompt."""
    return {name: request.prompt[name] for name in PROMPT_MEMBERS if name in request.prompt}


def body_of(kept: KeptJob) -> dict[str, Any]:
    """The request of a kept job."""
    parsed: dict[str, Any] = orjson.loads(split_request(kept.proof.request)[1])
    return parsed

"""Evidence of an answer: what the receipt commits to and what the client gets, with an engine behind HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from node.domain.logprob_request import EvidenceSupport, TokenIds
from node.engines.engine_settings import EngineSettings
from node.engines.openai_http import OpenAIEngine
from node.jobs.delivery import CHUNK_BYTES, MAX_EVIDENCE_CHUNKS
from tallystick.protocol.messages import Outcome
from tallystick.protocol.plaintext_heads import RequestHead
from tallystick.protocol.routes import CHAT
from tallystick.protocol.token_evidence import EvidenceRow, evidence_root, pack_evidence, unpack_evidence
from tallystick.protocol.types import ZERO_HASH
from tallystick.protocol.wire import INITIAL_CREDIT, Kind, dumps, loads
from tests.node.engines.raw import ConnectionHandler, RawServer, answers_then_hangs, answers_with, head, raw_server
from tests.node.harness import OFFER, PlacedJob, RunnerHarness

SUPPORT = EvidenceSupport(TokenIds.MEMBER, TokenIds.MEMBER, null_in_stream=True)
WANTED = RequestHead(CHAT, evidence=True)
DONE = b"data: [DONE]\n\n"


def event(choice: dict[str, Any], **members: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + dumps({"choices": [choice]} | members) + b"\n\n"


def word(number: int, *, shown: bool = False, text: str = "ab ") -> bytes:
    """An event with one token; `shown`: with its log-probabilities."""
    best = [{"id": number + n, "token": text, "bytes": list(text.encode()), "logprob": -0.5 - n} for n in range(5)]
    content = {"content": [best[0] | {"top_logprobs": best}]}
    return event({"index": 0, "delta": {"content": text}, "logprobs": content if shown else None})


def row(number: int) -> EvidenceRow:
    """The row of that token."""
    return EvidenceRow.of(number, [(number + n, -0.5 - n) for n in range(5)])


def last(finish: str, tokens: int) -> bytes:
    """The events that end a stream."""
    end = event({"index": 0, "delta": {}, "finish_reason": finish})
    usage = dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})
    return end + b"data: " + usage + b"\n\n" + DONE


class Clock:
    """A clock that a test sets."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def node(handler: ConnectionHandler, clock: Clock | None = None) -> AsyncIterator[tuple[RunnerHarness, RawServer]]:
    """A node in front of an engine."""
    async with raw_server(handler) as server:
        engine = OpenAIEngine(EngineSettings(server.url), clock or Clock())
        try:
            async with asyncio.timeout(60):
                yield RunnerHarness(engine, offer=replace(OFFER, evidence=SUPPORT)), server
        finally:
            await engine.close()


def sent_rows(harness: RunnerHarness, placed: PlacedJob) -> tuple[EvidenceRow, ...]:
    """The rows that came with the answer."""
    return unpack_evidence(placed.evidence(harness.link.payloads(placed.job, Kind.CHUNK)))


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("finish", "outcome"), [("stop", Outcome.COMPLETED), ("length", Outcome.LENGTH)])
async def test_a_streamed_answer(wanted: bool, finish: str, outcome: Outcome) -> None:
    """The receipt commits to the rows; the client gets them if it wants them, and the answer as if nothing had been added."""
    words = b"".join(word(n, shown=True) for n in range(3))
    async with node(answers_with(head(), words, last(finish, 3))) as (harness, server):
        placed = harness.dispatch(head=replace(WANTED, evidence=wanted))
        receipt = await harness.receipt(placed)
        rows = tuple(map(row, range(3)))
        assert (receipt.evidence_root, receipt.outcome, receipt.output_tokens) == (evidence_root(rows), outcome, 3)
        assert sent_rows(harness, placed) == (rows if wanted else ())
        _, answer, _, _ = harness.answer(placed)
        end = event({"index": 0, "delta": {}, "finish_reason": finish})
        assert answer == b"".join(map(word, range(3))) + end + DONE
        asked = loads(server.requests[0].split(b"\r\n\r\n")[1], "request")
        assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)


async def test_a_whole_answer() -> None:
    """A body in one piece has its rows as well."""
    best = [{"id": n, "token": "a", "bytes": [97], "logprob": -1.0} for n in range(5)]
    logprobs = {"content": [best[0] | {"top_logprobs": best}]}
    choice = {"message": {"content": "a"}, "logprobs": logprobs, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    async with node(answers_with(head(200, "application/json"), dumps({"choices": [choice], "usage": usage}))) as (harness, _):
        placed = harness.dispatch({"model": "model", "messages": [], "max_tokens": 10}, head=WANTED)
        receipt = await harness.receipt(placed)
        rows = sent_rows(harness, placed)
        assert (len(rows), evidence_root(rows)) == (1, receipt.evidence_root)
        del choice["logprobs"]
        assert loads(harness.answer(placed)[1], "answer") == {"choices": [choice], "usage": usage}


async def test_a_cancelled_answer() -> None:
    """A client that cancels pays for what it got, and the receipt commits to the rows so far."""
    async with node(answers_then_hangs(head(), word(0, shown=True))) as (harness, _):
        placed = harness.dispatch(head=WANTED)
        await harness.link.until(Kind.CHUNK, placed.job, 2)
        harness.runner.cancel(harness.link, placed.job)
        receipt = await harness.receipt(placed)
        assert (receipt.outcome, receipt.evidence_root) == (Outcome.CLIENT_CANCELLED, evidence_root([row(0)]))
        assert sent_rows(harness, placed) == (row(0),)


@pytest.mark.parametrize(
    "parts",
    [
        (word(0, shown=True), word(1, shown=True), last("stop", 9)),
        (word(0), last("stop", 1)),
        (event({"index": 0, "delta": {"content": "a"}, "logprobs": "nonsense"}), last("stop", 1)),
        (event({"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"id": 1, "logprob": 5}]}}), last("stop", 1)),
    ],
)
async def test_an_answer_without_rows_that_fit_commits_to_nothing(parts: tuple[bytes, ...]) -> None:
    """Rows of another number than the engine counted, no rows, and nonsense: the job is the same as ever, with a root of zero."""
    async with node(answers_with(head(), *parts)) as (harness, _):
        placed = harness.dispatch(head=WANTED)
        receipt = await harness.receipt(placed)
        assert (receipt.outcome, receipt.evidence_root) == (Outcome.COMPLETED, ZERO_HASH)
        assert sent_rows(harness, placed) == ()


async def test_an_engines_refusal_has_no_evidence() -> None:
    """An error of the engine is free, and commits to nothing."""
    refusal = b'{"error": {"message": "no"}}'
    async with node(answers_with(head(400, "application/json"), refusal)) as (harness, server):
        receipt = await harness.receipt(harness.dispatch(head=WANTED))
        assert (receipt.outcome, receipt.evidence_root, len(server.requests)) == (Outcome.UPSTREAM_ERROR, ZERO_HASH, 2)


async def test_an_engine_that_refuses_log_probabilities_is_asked_without_them() -> None:
    """The client gets its answer, and the engine is not asked again for what it refused, for ten minutes."""

    async def handler(write: Any) -> None:
        body = server.requests[-1].split(b"\r\n\r\n")[1]
        if b"logprobs" in body:
            await write(
                head(400, "application/json") + b'{"error": {"message": "logprobs is not supported with tools + stream"}}'
            )
        else:
            await write(head() + word(0) + last("stop", 1))

    clock = Clock()
    async with node(handler, clock) as (harness, server):
        for number in (2, 3, 5, 6, 8):
            body = {"model": "model", "messages": [], "stream": True, "max_tokens": 9} | ({"tools": [1]} if number > 3 else {})
            clock.now += {6: 599, 8: 2}.get(number, 0)
            receipt = await harness.receipt(harness.dispatch(body, head=WANTED))
            assert (receipt.outcome, receipt.evidence_root) == (Outcome.COMPLETED, ZERO_HASH)
            assert len(server.requests) == number  # requests of another shape may be refused or not


def test_rows_of_the_longest_answers_are_for_asking_later() -> None:
    """A response's evidence stays within the first credit, however long the answer is."""
    assert MAX_EVIDENCE_CHUNKS < INITIAL_CREDIT // 2
    assert len(pack_evidence([row(200_000)])) * 32_768 < MAX_EVIDENCE_CHUNKS * CHUNK_BYTES

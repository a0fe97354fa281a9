"""Evidence through the whole market: an engine with log-probabilities, a coordinator that sees none of them, and clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from scripts.relay import processes
from tallystick.client.config import ClientConfig
from tallystick.client.receipts.answer_evidence import EvidenceState
from tallystick.client.sdk.market import Market
from tallystick.protocol.errors import BadMessage, Refusal
from tallystick.protocol.token_evidence import EvidenceRow
from tallystick.protocol.types import ZERO_HASH
from tallystick.runtime.keystore import create_keystore
from tallystick.runtime.serving import serving
from tests.e2e.extra_node import sells

MODEL = "words"
WORDS = [f" wörd{n}" for n in range(40)]
BASE = 150_000
"""The number of the first word's token."""
DONE = b"data: [DONE]\n\n"


def entry(position: int) -> dict[str, Any]:
    """The log-probabilities of one word, as llama.cpp writes them."""
    best = [
        {
            "id": BASE + position + n,
            "token": WORDS[position],
            "bytes": list(WORDS[position].encode()),
            "logprob": -0.125 * (n + 1),
        }
        for n in range(5)
    ]
    return best[0] | {"top_logprobs": best}


ROWS = tuple(
    EvidenceRow.of(BASE + position, [(BASE + position + n, -0.125 * (n + 1)) for n in range(5)]) for position in range(40)
)


def choices(body: dict[str, Any], first: int, last: int, finish: str | None, member: str) -> list[dict[str, Any]]:
    """The choices of an answer or an event: with log-probabilities if they are asked for, with null if not."""
    given = {"content": [entry(position) for position in range(first, last)]} if body.get("logprobs") and last > first else None
    text = {"content": "".join(WORDS[first:last])} if last > first else {}
    return [{"index": 0, member: text, "logprobs": given, "finish_reason": finish}]


async def chat(request: Request) -> Response:
    """Answers with up to 40 words, one token each. Refuses log-probabilities of streams with tools, as llama.cpp does."""
    body = await request.json()
    if not isinstance(body.get("messages"), list):
        return JSONResponse({"error": {"message": "messages: expected a list"}}, 400)
    if body.get("logprobs") and body.get("stream") and body.get("tools"):
        return JSONResponse({"error": {"message": "logprobs is not supported with tools + stream"}}, 400)
    count = min(body.get("max_tokens") or 40, 40)
    usage: dict[str, Any] = {"prompt_tokens": 3, "completion_tokens": count}
    finish = "length" if count < 40 else "stop"
    if not body.get("stream"):
        return JSONResponse({"id": "w", "choices": choices(body, 0, count, finish, "message"), "usage": usage})
    events: list[dict[str, Any]] = [{"id": "w", "choices": choices(body, n, n + 1, None, "delta")} for n in range(count)]
    events += [{"id": "w", "choices": choices(body, 0, 0, finish, "delta")}]
    events += [{"id": "w", "choices": [], "usage": usage}] if (body.get("stream_options") or {}).get("include_usage") else []
    data = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + DONE
    return Response(data, media_type="text/event-stream")


async def models(_request: Request) -> Response:
    """The engine's one model."""
    return JSONResponse({"data": [{"id": MODEL, "max_model_len": 4_096}]})


@asynccontextmanager
async def market(folder: Path) -> AsyncIterator[tuple[processes.Site, str]]:
    """A market with this engine; yields also the engine's URL."""
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)])
    async with serving(app, "127.0.0.1", 0) as port:
        engine = f"http://127.0.0.1:{port}"
        async with processes.market(folder, engine, model=MODEL, slots=4) as site:
            await sells(site, MODEL)
            yield site, engine


def client(site: processes.Site, name: str, **settings: Any) -> Market:
    """A client of that market, with a ledger of its own."""
    deployment = site.folder / "deployment.json"
    config = ClientConfig(coordinator=site.coordinator, deployment=deployment, ledger_file=site.folder / f"{name}.db", **settings)
    return Market.of(config, site.payer)


def body(**members: Any) -> dict[str, Any]:
    """A request for all words."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64, **members}


async def test_evidence_through_the_market(tmp_path: Path) -> None:
    """Rows come sealed beside answers that are the engine's own to the byte, and can be fetched for free by their payer alone."""
    async with market(tmp_path / "site") as (site, engine):
        async with client(site, "curious") as curious:
            (offer,) = await curious.shortlist(MODEL)
            assert {"evidence", "/v1/evidence"} <= set(offer.message.spec.features)
            for streams in (False, True):
                result = await (await curious.submit("/v1/chat/completions", body(stream=streams))).result()
                assert (result.evidence, result.answer_evidence.state) == (ROWS, EvidenceState.CHECKED)
                assert len(result.answer_evidence.packed) <= 31 * len(ROWS)
                async with httpx.AsyncClient(trust_env=False) as http:
                    direct = await http.post(f"{engine}/v1/chat/completions", json=body(stream=streams))
                assert result.body == direct.content
            tools = body(stream=True, tools=[{"type": "function", "function": {"name": "f"}}])
            for _ in range(2):
                refused = await (await curious.submit("/v1/chat/completions", tools)).result()
                assert refused.receipt is not None
                assert (refused.evidence, refused.receipt.message.evidence_root) == ((), ZERO_HASH)
            with pytest.raises(Refusal, match="whose receipt commits to evidence"):
                await curious.fetch_evidence(refused.job)
        async with client(site, "modest", evidence=False) as modest:
            result = await (await modest.submit("/v1/chat/completions", body(max_tokens=7))).result()
            assert (result.evidence, result.answer_evidence.state) == ((), EvidenceState.NOT_SENT)
            before = (await modest.tab(result.provider)).accepted
            assert await modest.fetch_evidence(result.job) == ROWS[:7]
            assert (await modest.tab(result.provider)).accepted == before
            await _stranger_gets_nothing(site, modest.config, result.job)
        _check_secrecy(site)


async def _stranger_gets_nothing(site: processes.Site, config: ClientConfig, job: bytes) -> None:
    """Another payer that knows the job's id does not get its rows."""
    stranger = create_keystore(site.folder / "keys" / "stranger.json", "bench", cost=1 << 12)
    await processes.fund(site.deployment, stranger)
    async with Market.of(replace(config, ledger_file=site.folder / "stranger.db"), stranger) as market:
        asked = {"model": MODEL, "job": job.hex()}
        result = await (await market.submit("/v1/evidence", asked)).result()
        assert (result.head.status, result.cost) == (404, 0)
        with pytest.raises((Refusal, BadMessage)):
            await market.fetch_evidence(result.job)


def _check_secrecy(site: processes.Site) -> None:
    """No file of the coordinator or the node has a row, nor the token of a word in any form."""
    files = [path for path in site.folder.rglob("*") if path.is_file() and "keys" not in path.parts]
    rows = [row.pack() for row in ROWS]
    assert len(files) > 4
    for path in files:
        if path.relative_to(site.folder).parts[0].startswith(("curious", "modest", "stranger")):
            continue
        data = path.read_bytes()
        assert not any(row in data or row.hex().encode() in data for row in rows), path

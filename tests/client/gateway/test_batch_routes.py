"""Files and batches through the unmodified official SDK, and by plain HTTP, with a gateway over a fake market."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from tallystick.client.config import ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app, open_batches
from tallystick.client.gateway.handler import RequestHandler
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Unavailable
from tallystick.protocol.features import BATCH_ONLY
from tallystick.protocol.messages import Spec
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import CHAT, WORDS, FakeMarket, Session, honest
from tests.client.parties import MODEL, Provider

TEXT = "".join(WORDS)
ENDED = {"completed", "failed", "expired", "cancelled"}


def request_line(number: int, **changes: Any) -> dict[str, Any]:
    """A good line of an input file."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 10}
    return {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": body} | changes


def jsonl(*lines: Any) -> bytes:
    """An input file."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[str]:
    """A gateway that runs batches."""
    async with Market(fake.url, wallet, config) as market:
        handler = RequestHandler(market)
        async with (
            open_batches(market, handler) as batches,
            serving(build_app(market, None, handler, batches), "127.0.0.1", 0) as port,
        ):
            yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def url(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[str]:
    """A gateway with the settings of the tests."""
    async with gateway(fake, wallet, config) as url:
        yield url


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client with only its base URL changed."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        yield client


async def upload(sdk: openai.AsyncOpenAI, content: bytes) -> str:
    """Uploads an input file; returns its id."""
    return (await sdk.files.create(file=("input.jsonl", content), purpose="batch")).id


async def start(sdk: openai.AsyncOpenAI, content: bytes, window: Any = "24h", endpoint: Any = CHAT, **more: Any) -> Batch:
    """Uploads an input file and creates a batch."""
    file_id = await upload(sdk, content)
    return await sdk.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window=window, **more)


async def until(sdk: openai.AsyncOpenAI, batch_id: str, ready: Callable[[Batch], bool]) -> Batch:
    """Waits until a batch is as wanted."""
    async with asyncio.timeout(120):
        while not ready(batch := await sdk.batches.retrieve(batch_id)):  # noqa: ASYNC110 - another process would poll too
            await asyncio.sleep(0.02)
    return batch


async def ended(sdk: openai.AsyncOpenAI, batch_id: str) -> Batch:
    """Waits for the end of a batch."""
    return await until(sdk, batch_id, lambda batch: batch.status in ENDED)


async def content(sdk: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file."""
    assert file_id is not None
    return [json.loads(line) for line in (await sdk.files.content(file_id)).text.splitlines()]


def question_of(session: Session) -> str:
    """The question of a job, before any provider has it."""
    candidate = session.submission.candidates[0]
    provider = next(p for p in session.market.providers if p.address == candidate.order.message.provider)
    session.open_seal(candidate, provider)
    return str(session.request["messages"][0]["content"])


def by_question(**scripts: Callable[[Session], Awaitable[None]]) -> Callable[[Session], Awaitable[None]]:
    """A market that plays a script of its own for questions that contain a word."""

    async def script(session: Session) -> None:
        question = question_of(session)
        chosen = next((script for word, script in scripts.items() if word in question), honest)
        await chosen(session)

    return script


async def engine_refuses(session: Session) -> None:
    """The engine answers 400."""
    await session.match()
    await session.answer(400)
    await session.chunk(b'{"error":{"message":"no such tool","type":"invalid_request_error","code":"bad"}}', last=True)
    await session.finish()


async def test_a_batch_by_the_sdk(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """Every line is answered by one job, and the output file has OpenAI's form."""
    batch = await start(sdk, jsonl(*map(request_line, range(5))), metadata={"for": "test"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"for": "test"})
    batch = await ended(sdk, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 5, "completed": 5, "failed": 0}
    assert batch.model == MODEL
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (50, 25, 75)
    assert batch.error_file_id is None
    stamps = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert stamps == sorted(stamp for stamp in stamps if stamp is not None)
    assert batch.expires_at == batch.created_at + 86_400
    lines = await content(sdk, batch.output_file_id)
    assert {line["custom_id"] for line in lines} == {f"id-{number}" for number in range(5)}
    for line in lines:
        assert line.keys() == {"id", "custom_id", "response", "error"}
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"]["choices"][0]["message"]["content"] == TEXT
    assert len(fake.submissions) == 5
    assert all(submission.batch for submission in fake.submissions)
    assert len({line["response"]["request_id"] for line in lines}) == 5


async def test_a_batch_by_the_synchronous_sdk(url: str) -> None:
    """The synchronous SDK does the same."""

    def use() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
            file = client.files.create(file=("a.jsonl", jsonl(request_line(1))), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
            assert [listed.id for listed in client.batches.list()] == [batch.id]
            while batch.status not in ENDED:
                batch = client.batches.retrieve(batch.id)
            assert batch.output_file_id is not None
            return batch.status, client.files.content(batch.output_file_id).text

    status, text = await asyncio.to_thread(use)
    assert status == "completed"
    assert json.loads(text)["custom_id"] == "id-1"


async def test_errors_of_engines_go_to_the_error_file(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """A final error of the engine is one line of the error file, with its status and body; the other lines are answered."""
    fake.script = by_question(**{"question 1": engine_refuses})
    batch = await ended(sdk, (await start(sdk, jsonl(*map(request_line, range(3))))).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 3, "completed": 2, "failed": 1}
    [error] = await content(sdk, batch.error_file_id)
    assert error["custom_id"] == "id-1"
    assert error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["message"] == "no such tool"
    assert {line["custom_id"] for line in await content(sdk, batch.output_file_id)} == {"id-0", "id-2"}


async def test_what_fails_at_no_cost_is_tried_again(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """A provider that drops a job costs nothing; the line is placed again with another job, and answered once."""
    tries: Counter[str] = Counter()

    async def drops_once(session: Session) -> None:
        question = question_of(session)
        tries[question] += 1
        if tries[question] > 1:
            await honest(session)
            return
        await session.match()
        await session.void()
        await session.fail(Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER))

    fake.script = drops_once
    batch = await ended(sdk, (await start(sdk, jsonl(*map(request_line, range(2))))).id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 2
    assert set(tries.values()) == {2}


async def test_a_wrong_input_fails_the_batch(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """A batch whose input has faults fails, names each with its line, and orders nothing."""
    lines = jsonl(request_line(1), request_line(1), request_line(3, url="/v1/embeddings")) + b"{broken\n"
    batch = await ended(sdk, (await start(sdk, lines)).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert [(error.code, error.line) for error in batch.errors.data or ()] == [
        ("duplicate_custom_id", 2),
        ("mismatched_endpoint", 3),
        ("invalid_json_line", 4),
    ]
    assert not fake.submissions


async def test_cancel_keeps_what_is_done(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """After a cancel no line begins; what was answered is in the output file, and the rest in the error file."""
    held, released = asyncio.Event(), asyncio.Event()

    async def holds(session: Session) -> None:
        held.set()
        await released.wait()
        await honest(session)

    fake.script = by_question(**{"question 2": holds})
    async with (
        gateway(fake, wallet, replace(config, batch_concurrency=1)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk,
    ):
        batch = await start(sdk, jsonl(*map(request_line, range(6))))
        async with asyncio.timeout(120):
            await held.wait()
        cancelling = await sdk.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        async with httpx.AsyncClient(base_url=url) as http:
            metrics = (await http.get("/metrics")).text
        assert "tallystick_gateway_batches_open 1.0" in metrics
        assert "tallystick_gateway_batch_requests_live 1.0" in metrics
        assert (await sdk.batches.cancel(batch.id)).status == "cancelling"
        released.set()
        batch = await ended(sdk, batch.id)
        assert batch.status == "cancelled"
        assert batch.cancelled_at is not None
        assert batch.request_counts is not None
        assert batch.request_counts.model_dump() == {"total": 6, "completed": 3, "failed": 3}
        assert [line["custom_id"] for line in await content(sdk, batch.output_file_id)] == ["id-0", "id-1", "id-2"]
        left = await content(sdk, batch.error_file_id)
        assert [line["error"]["code"] for line in left] == ["batch_cancelled"] * 3
        assert len(fake.submissions) == 3
        with pytest.raises(openai.BadRequestError):
            await sdk.batches.cancel((await ended(sdk, (await start(sdk, jsonl(request_line(1)))).id)).id)


async def test_a_batch_goes_on_after_a_restart(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A gateway that stops leaves a running line's job alone, and the next one gets that job's answer. Lines that ended are not
    asked again, and each line is one job.
    """
    held = asyncio.Event()

    async def holds(session: Session) -> None:
        held.set()
        await session.hang()

    fake.script = by_question(**{"question 2": holds})
    async with (
        gateway(fake, wallet, replace(config, batch_concurrency=1)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk,
    ):
        batch_id = (await start(sdk, jsonl(*map(request_line, range(5))))).id
        async with asyncio.timeout(120):
            await held.wait()
    assert len(fake.submissions) == 3
    assert not fake.cancels
    held_job = fake.submissions[-1].job
    del fake.sessions[held_job]  # this fake keeps no answers; it takes the same bytes again instead
    fake.script = honest
    async with (
        gateway(fake, wallet, config) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk,
    ):
        batch = await ended(sdk, batch_id)
        assert batch.status == "completed"
        done = await content(sdk, batch.output_file_id)
    assert [line["custom_id"] for line in done] == [f"id-{number}" for number in range(5)]
    assert done[2]["response"]["request_id"] == held_job.hex()
    assert len({submission.job for submission in fake.submissions}) == 5


async def test_callers_see_their_own(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Another API key finds neither the files nor the batches of the first one, and its jobs count for its own workload."""
    keys = (ApiKey(label="ann", secret="a" * 20), ApiKey(label="bob", secret="b" * 20))
    async with gateway(fake, wallet, replace(config, api_keys=keys)) as url:
        ann = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="a" * 20, max_retries=0)
        bob = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="b" * 20, max_retries=0)
        batch = await ended(ann, (await start(ann, jsonl(request_line(1)))).id)
        assert batch.status == "completed"
        assert batch.output_file_id is not None
        assert [file.filename async for file in bob.files.list()] == []
        assert [other.id async for other in bob.batches.list()] == []
        for call in (
            bob.batches.retrieve(batch.id),
            bob.batches.cancel(batch.id),
            bob.files.retrieve(batch.output_file_id),
            bob.files.content(batch.output_file_id),
            bob.files.delete(batch.input_file_id),
            bob.batches.create(input_file_id=batch.input_file_id, endpoint="/v1/chat/completions", completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                await call


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "25 hours"}, None),
        ({"completion_window": "8d"}, None),
        ({"input_file_id": 7}, "input_file_id"),
        ({"input_file_id": "\ud800"}, "input_file_id"),
        ({"metadata": {"a": 1}}, None),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "\ud800"}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, None),
    ],
)
async def test_wrong_creations_are_refused(http: httpx.AsyncClient, changes: dict[str, Any], param: str | None) -> None:
    """A request that cannot be a batch is a 400 in OpenAI's form that names the member."""
    file = (await http.post("/v1/files", files={"file": jsonl(request_line(1))}, data={"purpose": "batch"})).json()
    good = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    answer = await http.post("/v1/batches", content=json.dumps(good | changes), headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(next(iter(changes)))
    assert param is None or error["param"] == param


async def test_the_same_creation_twice_is_one_batch(http: httpx.AsyncClient) -> None:
    """An Idempotency-Key makes a repeated creation the same batch, and no other one; options with a fault are refused at once."""
    file = (await http.post("/v1/files", files={"file": jsonl(request_line(1))}, data={"purpose": "batch"})).json()
    good = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
    first, second = [(await http.post("/v1/batches", json=good, headers={"idempotency-key": "k"})).json() for _ in range(2)]
    assert first["id"] == second["id"]
    other = (await http.post("/v1/batches", json=good, headers={"idempotency-key": "l"})).json()
    assert other["id"] != first["id"]
    for change in ({"completion_window": "2h"}, {"metadata": {"for": "other"}}):
        answer = await http.post("/v1/batches", json=good | change, headers={"idempotency-key": "k"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "order_replayed")
        assert first["id"] in answer.json()["error"]["message"]
    wrong = await http.post("/v1/batches", json=good, headers={"x-tally-options": '{"max_cost": 3}'})
    assert wrong.status_code == 400
    assert "max_cost" in wrong.json()["error"]["message"]


async def test_a_batch_is_of_its_class(http: httpx.AsyncClient, fake: FakeMarket) -> None:
    """Options may name the class of batch work and no other, so that no batch crowds interactive jobs."""
    file = (await http.post("/v1/files", files={"file": jsonl(request_line(1))}, data={"purpose": "batch"})).json()
    new = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
    refused = await http.post("/v1/batches", json=new, headers={"x-tally-options": '{"priority": "interactive"}'})
    assert refused.status_code == 400
    assert "priority: expected batch" in refused.json()["error"]["message"]
    assert not fake.submissions
    assert (await http.post("/v1/batches", json=new, headers={"x-tally-options": '{"priority": "batch"}'})).status_code == 200


async def test_a_compressed_creation_is_refused(http: httpx.AsyncClient) -> None:
    """The error names the encoding."""
    answer = await http.post("/v1/batches", content=gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert answer.json()["error"]["message"].startswith("content-encoding")


async def test_other_endpoints(sdk: openai.AsyncOpenAI, fake: FakeMarket) -> None:
    """Embeddings and responses work too; a response is not kept at the gateway unless the line asks for it."""
    embedding = request_line(1, url="/v1/embeddings", body={"model": MODEL, "input": "hello"})
    batch = await ended(sdk, (await start(sdk, jsonl(embedding), endpoint="/v1/embeddings")).id)
    assert batch.status == "completed"
    [line] = await content(sdk, batch.output_file_id)
    assert line["response"]["body"]["object"] == "list"
    response = request_line(1, url="/v1/responses", body={"model": MODEL, "input": "hello"})
    batch = await ended(sdk, (await start(sdk, jsonl(response), endpoint="/v1/responses")).id)
    [line] = await content(sdk, batch.output_file_id)
    assert line["response"]["body"]["object"] == "response"
    assert line["response"]["body"]["store"] is False
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.retrieve(line["response"]["body"]["id"])


async def test_a_window_that_ends(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Lines that no provider takes wait, and the batch says why; once its window is over they are batch_expired."""
    clock = [1_900_000_000.0]
    fake.providers.clear()
    async with Market(fake.url, wallet, config) as market:
        handler = RequestHandler(market)
        async with (
            open_batches(market, handler, now=lambda: clock[0]) as batches,
            serving(build_app(market, None, handler, batches), "127.0.0.1", 0) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as sdk,
        ):
            batch = await start(sdk, jsonl(*map(request_line, range(3))), window="1h")
            waiting = await until(sdk, batch.id, lambda batch: bool((batch.model_extra or {})["tally"]["waiting"]))
            assert MODEL in (waiting.model_extra or {})["tally"]["waiting"]
            clock[0] += 3_601
            batch = await ended(sdk, batch.id)
            assert batch.status == "expired"
            assert batch.expired_at == clock[0]
            assert batch.request_counts is not None
            assert batch.request_counts.model_dump() == {"total": 3, "completed": 0, "failed": 3}
            assert [line["error"]["code"] for line in await content(sdk, batch.error_file_id)] == ["batch_expired"] * 3
            assert batch.output_file_id is None


async def test_prices_rise_towards_the_cap(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """At first a line may cost what the cheapest provider asks for, and towards the end of its window what its caller allows."""
    clock = [1_900_000_000.0]
    async with Market(fake.url, wallet, replace(config, batch_concurrency=1)) as market:
        handler = RequestHandler(market)
        async with (
            open_batches(market, handler, now=lambda: clock[0]) as batches,
            serving(build_app(market, None, handler, batches), "127.0.0.1", 0) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as sdk,
        ):

            async def passes_time(session: Session) -> None:
                await honest(session)
                clock[0] += 1_900

            fake.script = passes_time
            options = {"x-tally-options": json.dumps({"max_output_price": "1.40"})}
            lines = jsonl(*(request_line(number) for number in range(2)))
            batch = await ended(sdk, (await start(sdk, lines, window="1h", extra_headers=options)).id)
            assert batch.request_counts is not None
            assert batch.request_counts.completed == 2
    assert all(demand["batch"] for demand in fake.shortlists)
    limits = [demand["maxOutputPrice"] for demand in fake.shortlists if demand["maxOutputPrice"] != 1_400_000]
    assert limits == [400_000, 400_000 + 10 * 1_000_000 // 15]


async def test_prices_begin_at_an_ask_for_batches(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The cheapest ask may be one for batch jobs alone; the first step of a window takes its price."""
    cheap = Provider.make("alice", output_price=200_000, spec=Spec(features=(BATCH_ONLY,)))
    fake.providers[0] = cheap
    options = {"x-tally-options": json.dumps({"max_output_price": "1.40"})}
    async with (
        gateway(fake, wallet, config) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk,
    ):
        batch = await ended(sdk, (await start(sdk, jsonl(request_line(1)), extra_headers=options)).id)
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 1
    assert fake.shortlists[-1]["maxOutputPrice"] == 200_000
    assert fake.last.provider is cheap


async def test_providers_that_are_away_are_waited_for(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that was sold to the batch before is no unknown one: its lines wait until its providers are back."""
    monkeypatch.setattr("tallystick.client.batches.line_policy.MAX_UNKNOWN", 1)
    providers = list(fake.providers)

    async def leaves(session: Session) -> None:
        await honest(session)
        fake.providers.clear()
        fake.script = honest

    fake.script = leaves
    short = replace(config, batch_concurrency=1, shortlist_seconds=0.0)
    async with (
        gateway(fake, wallet, short) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as sdk,
    ):
        batch_id = (await start(sdk, jsonl(*map(request_line, range(2))))).id
        asked = 0
        async with asyncio.timeout(120):
            while asked < 3:
                asked = len(fake.shortlists) - 1 if not fake.providers else 0
                await asyncio.sleep(0.02)
        fake.providers.extend(providers)
        batch = await ended(sdk, batch_id)
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"total": 2, "completed": 2, "failed": 0}

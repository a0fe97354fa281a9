"""Several attempts at one request: no retry silently buys again what may have been billed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from tallystick.client.config import Alias, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.maintenance import Maintenance
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.types import Amount, format_amount
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, EVENTS, STREAM, FakeMarket, Script, Session, event, honest
from tests.client.parties import MODEL, Provider

GONE = Unavailable(Code.NODE_GONE, "the node left", fault=Fault.PROVIDER)


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[httpx.AsyncClient]:
    """A gateway with these settings."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http,
    ):
        yield http


@pytest.fixture
async def market_of_two() -> AsyncIterator[FakeMarket]:
    """One provider of each of two models."""
    async with FakeMarket(Provider.make("alice", model="first"), Provider.make("bob", model="second")).serve() as fake:
        yield fake


def failing(error: TallyError, *, released: bool, model: str = "first") -> Script:
    """The provider of a model accepts the job and fails; `released`: it signs a receipt at no cost."""

    async def script(session: Session) -> None:
        if _model_of(session) != model:
            await honest(session)
            return
        await session.match()
        if released:
            await session.void()
        await session.fail(error)

    return script


def _model_of(session: Session) -> str:
    return session.submission.candidates[0].terms.model


def cap(fake: FakeMarket) -> int:
    """The most that one order of these requests may cost."""
    return int(fake.submissions[0].candidates[0].terms.max_cost)


@pytest.fixture
def secured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every top-up of a reservation succeeds."""

    async def top_up(_upkeep: Maintenance, _job: object) -> bool:
        return True

    monkeypatch.setattr(Maintenance, "top_up", top_up)


TWO = Alias(name="any", models=("first", "second"))


async def ask(http: httpx.AsyncClient, body: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    """Sends one request for both models."""
    return await http.post(CHAT, json=(body or BODY) | {"model": "any"}, headers={"x-tally-options": json.dumps(options)})


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_a_fallback_is_not_bought_beyond_max_cost(
    market_of_two: FakeMarket, wallet: Signer, config: ClientConfig, body: dict[str, Any]
) -> None:
    """The possible cost of a failed attempt is deducted from max_cost and reported to the caller; a released one is not."""
    fake = market_of_two
    fake.script = failing(GONE, released=False)
    async with gateway(fake, wallet, replace(config, aliases=(TWO,))) as http:
        answer = await ask(http, body)
        job = fake.submissions[0].job.hex()
        assert (answer.status_code, answer.headers["x-tally-at-stake"]) == (200, f"first; job={job}; at-most={cap(fake)}")
        enough = format_amount(Amount(2 * cap(fake)))
        assert (await ask(http, body, max_cost=enough)).status_code == 200
        short = format_amount(Amount(2 * cap(fake) - 1))
        before = len(fake.submissions)
        answer = await ask(http, body, max_cost=short)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "node_gone"), "the failure, not what follows from it"
        assert (answer.headers["x-should-retry"], answer.json()["error"]["retry"]) == ("false", False)
        assert "at-most" in answer.headers["x-tally-at-stake"]
        assert len(fake.submissions) == before + 1
        fake.script = failing(GONE, released=True)
        answer = await ask(http, body, max_cost=format_amount(Amount(cap(fake))))
        assert (answer.status_code, "x-tally-at-stake" in answer.headers) == (200, False)


async def test_a_model_that_max_cost_does_not_allow_is_the_error(
    market_of_two: FakeMarket, wallet: Signer, config: ClientConfig
) -> None:
    """If one model of an alias is not sold and the other costs more than max_cost, the caller learns about max_cost."""
    alias = Alias(name="any", models=("missing", "second"))
    async with gateway(market_of_two, wallet, replace(config, aliases=(alias,))) as http:
        answer = await ask(http, max_cost="0.000001")
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "cost_above_cap")


async def test_a_final_failure_has_no_fallback(market_of_two: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A submitted job's failure that forbids a retry ends the request, although its code would allow a fallback."""
    fake = market_of_two
    for code in (Code.PROVIDER_FAILED, Code.NODE_GONE, Code.ENGINE_UNAVAILABLE):
        fake.script = failing(Refusal(code, "charged and not delivered", fault=Fault.PROVIDER), released=False)
        async with gateway(fake, wallet, replace(config, aliases=(TWO,))) as http:
            before = len(fake.submissions)
            answer = await ask(http)
            assert (answer.json()["error"]["code"], answer.headers["x-should-retry"]) == (code.value, "false")
            assert len(fake.submissions) == before + 1


@pytest.mark.parametrize(("released", "jobs"), [(False, 1), (True, 3)])
async def test_the_official_sdk_buys_one_cap_a_call(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, released: bool, jobs: int
) -> None:
    """With its default retries, the SDK does not retry after a provider vanished without a receipt, and does after a release."""
    fake.script = failing(GONE, released=released, model=MODEL)
    async with (
        gateway(fake, wallet, config) as http,
        openai.AsyncOpenAI(base_url=str(http.base_url.join("/v1")), api_key="unused") as sdk,
    ):
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert len(fake.submissions) == jobs


@pytest.mark.parametrize(("released", "jobs"), [(False, 1), (True, 2)])
@pytest.mark.usefixtures("secured")
async def test_the_gateways_own_retry_buys_nothing_twice(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, released: bool, jobs: int
) -> None:
    """The gateway retries once after a top-up, unless the first attempt may still be billed."""
    fake.script = failing(Refusal(Code.UNSECURED, "too little is reserved"), released=released, model=MODEL)
    async with gateway(fake, wallet, config) as http:
        assert (await http.post(CHAT, json=BODY)).status_code == 402
    assert len(fake.submissions) == jobs


@pytest.mark.parametrize(("key", "retry"), [(None, False), ("k", True)])
async def test_a_lost_submission_is_not_retried(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, key: str | None, retry: bool
) -> None:
    """A submission may have arrived; only with an idempotency key is a retry the same job."""
    fake.drops, fake.keeps = 2, True
    async with gateway(fake, wallet, config) as http:
        answer = await http.post(CHAT, json=BODY, headers={} if key is None else {"idempotency-key": key})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "coordinator_unavailable")
    assert answer.headers["x-should-retry"] == str(retry).lower()


async def test_a_lost_shortlist_may_be_retried(wallet: Signer, config: ClientConfig) -> None:
    """Nothing was ordered yet when the shortlist was lost."""
    fake = FakeMarket()
    async with fake.serve():
        pass
    async with gateway(fake, wallet, config) as http:
        assert (await http.post(CHAT, json=BODY)).headers["x-should-retry"] == "true"


@pytest.mark.parametrize(("key", "retry"), [(None, False), ("k", True)])
async def test_a_cut_stream_says_whether_to_retry(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, key: str | None, retry: bool
) -> None:
    """The last event of a cut stream forbids a retry as long as what arrived may be billed."""

    async def cuts(session: Session) -> None:
        session.survives = True
        await session.match()
        await session.answer(200, EVENTS)
        await session.chunk(event("half "))
        await session.cut()

    fake.script = cuts
    quick = replace(config, cancel_seconds=0.2)
    async with gateway(fake, wallet, quick) as http:
        answer = await http.post(CHAT, json=STREAM, headers={} if key is None else {"idempotency-key": key})
    error = json.loads(answer.text.strip().split("data: ")[-1])["error"]
    assert (error["code"], error["retry"]) == ("coordinator_unavailable", retry)

"""Answers of a hostile or broken coordinator: the client drops or refuses them with an error, in bounded time and memory,
and never crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from tallystick.client.config import ClientConfig
from tallystick.client.coordinator.access_tokens import REUSE_SECONDS, AccessTokens
from tallystick.client.coordinator.bounded_json import MAX_CONTROL, MAX_ITEM, MAX_ITEMS, MAX_RAW, MAX_TOKENS, BoundedJsonReader
from tallystick.client.coordinator.http_client import MAX_PAGES, CoordinatorClient
from tallystick.client.coordinator.info import CoordinatorInfo
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.access import load_access
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, TallyError, Unavailable
from tallystick.protocol.link import MAX_ASK_BYTES, MAX_FEATURES
from tallystick.protocol.messages import Inquiry, Spec
from tallystick.protocol.types import JobId
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, run
from tests.client.parties import ALICE, COORDINATOR, DOMAIN, MODEL, PAYER, Provider

JOB = JobId(bytes(16))
OFFER = {
    "id": MODEL,
    "providers": 1,
    "live": 1,
    "inputPrice": "1",
    "cachedInputPrice": "1",
    "outputPrice": "2",
    "contextTokens": 8,
    "maxOutputTokens": 8,
}
INFO = {
    "coordinator": COORDINATOR,
    "chainId": 31337,
    "contract": DOMAIN.contract,
    "token": None,
    "tokenDecimals": 6,
    "feeBps": 0,
    "protocol": 2,
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def token() -> str:
    """Builds request headers; any headers do here."""
    return "Tally x"


@asynccontextmanager
async def coordinator_with_handler(handler: Handler) -> AsyncIterator[CoordinatorClient]:
    """A client of a coordinator that gives this answer to every request."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    try:
        async with CoordinatorClient(url, ClientConfig(request_seconds=10), token) as coordinator:
            yield coordinator
    finally:
        await runner.cleanup()


@asynccontextmanager
async def coordinator_with_answer(body: bytes, status: int = 200) -> AsyncIterator[CoordinatorClient]:
    """A coordinator that always gives the same answer."""

    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type="application/json")

    async with coordinator_with_handler(handler) as coordinator:
        yield coordinator


def calls(coordinator: CoordinatorClient) -> tuple[Callable[[], Awaitable[Any]], ...]:
    """Every request that a client can make of a coordinator."""
    question = PAYER.sign(Inquiry(payer=PAYER.address, provider=ALICE.address, coordinator=COORDINATOR, asked_at=1), DOMAIN)
    return (
        coordinator.info,
        coordinator.models,
        lambda: coordinator.asks(MODEL),
        lambda: coordinator.shortlist({}),
        lambda: coordinator.explain({}),
        lambda: coordinator.connected(ALICE.address),
        lambda: coordinator.receipts(question),
        lambda: coordinator.job(JOB),
        lambda: coordinator.cancel(JOB),
        lambda: coordinator.submit(b"x"),
    )


def _mutated(value: Any, rng: random.Random) -> Any:
    """The value with one random member replaced."""
    odd: tuple[Any, ...] = (
        None,
        -1,
        1 << 64,
        10**400,
        1e308,
        "9" * 5_000,
        "\u0663",
        "-1",
        "",
        True,
        [],
        {},
        [[]] * 3,
        "\ud83d",
        "x" * 70_000,
    )
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        return value | {name: _mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        return [_mutated(value[0], rng), *value[1:]]
    return rng.choice(odd)


@pytest.mark.parametrize("seed", range(6))
async def test_no_answer_crashes_a_client(seed: int) -> None:
    """Answers with one member of a wrong type or size give a value or an error of this project, for every request."""
    rng = random.Random(seed)
    job: dict[str, Any] = {"state": "completed", "receipt": None, "attempts": []}
    honest = INFO | {"data": [OFFER], "asks": [{"ask": ALICE.ask.to_json(), "free": 1}], "receipts": [], "next": None} | job
    bodies = [b""]

    async def handler(_request: web.Request) -> web.Response:
        return web.Response(body=bodies[0], status=rng.choice((200, 200, 400, 500)), content_type="application/json")

    async with coordinator_with_handler(handler) as coordinator:
        for _ in range(40):
            bodies[0] = json.dumps(_mutated(honest, rng)).encode()
            for call in calls(coordinator):
                with contextlib.suppress(TallyError):
                    answer = await call()
                    if isinstance(answer, aiohttp.ClientResponse):
                        answer.close()


DEEP = (b"[" * 100_000, b'{"asks":' * 100_000)


async def test_a_coordinator_of_another_protocol_is_refused() -> None:
    """The error says which side to upgrade, and to which release. Protocol 1 named none."""
    first = {name: value for name, value in INFO.items() if name != "protocol"}
    for info, advice in (
        (first, "the coordinator is too old: upgrade it to .* 0.2.0"),
        (INFO | {"protocol": 3}, "upgrade this side"),
    ):

        async def tell(_: web.Request, info: dict[str, Any] = info) -> web.StreamResponse:
            return web.json_response(info)

        async with coordinator_with_handler(tell) as client:
            with pytest.raises(BadMessage, match=rf"info\.protocol: expected 2, got .*{advice}") as caught:
                await client.info()
            assert caught.value.fault is Fault.COORDINATOR


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff", b'{"asks": {}}', b"NaN", b'{"next": 1}', *DEEP]
)
async def test_a_malformed_answer_is_a_readable_error(body: bytes) -> None:
    """An answer that does not parse, or is nested too deeply, is the coordinator's fault."""
    async with coordinator_with_answer(body) as coordinator:
        for call in calls(coordinator)[:8]:
            with pytest.raises(BadMessage) as caught:
                await call()
            assert caught.value.fault is Fault.COORDINATOR


async def test_an_error_is_not_trusted_either() -> None:
    """An error answer with malformed members becomes a general error."""
    odd: dict[str, Any] = {"code": [], "fault": {}, "retry": "yes", "message": ["x"] * 9}
    async with coordinator_with_answer(json.dumps({"error": odd}).encode(), 500) as coordinator:
        for call in calls(coordinator):
            with pytest.raises(TallyError):
                await call()


# Sizes


LARGE_SPEC = Spec(features=tuple("\u0001" * 1_024 for _ in range(1_024)))


def large_ask(provider: Provider, spec: Spec = LARGE_SPEC) -> dict[str, Any]:
    """An ask of about 6 MiB, at a price that puts it first on every list."""
    made = provider.signer.sign(replace(provider.ask.message, spec=spec, output_price=0), DOMAIN)
    return {"ask": made.to_json(), "free": 1}


async def test_oversized_asks_do_not_take_a_model_away(wallet: Signer, config: ClientConfig) -> None:
    """After two asks of 6 MiB, the gateway still uses the honest ask and explains the model."""
    async with FakeMarket(*map(Provider.make, ("alice", "eve", "mal"))).serve() as fake:
        fake.asks = lambda: [large_ask(fake.providers[1]), large_ask(fake.providers[2]), *fake._asks()[:1]]
        async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http:
                answer = await http.post(CHAT, json=BODY)
            assert (answer.status_code, answer.headers["x-tally-provider"]) == (200, fake.providers[0].address)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(features=tuple("f" for _ in range(MAX_FEATURES + 1))),
        Spec(features=("f" * 65,)),
        Spec(revision="r" * MAX_ASK_BYTES),
    ],
)
async def test_asks_beyond_the_limits_are_left_out(fake: FakeMarket, wallet: Signer, config: ClientConfig, spec: Spec) -> None:
    """An ask above any size limit is left out, and the others are offered."""
    fake.asks = lambda: [large_ask(fake.providers[0], spec), *fake._asks()[1:], None, 7, {"ask": None}, {}]
    async with Market(fake.url, wallet, config) as market:
        assert [ask.message.provider for ask in await market.shortlist(MODEL)] == [fake.providers[1].address]
        await run(market)


async def test_a_list_without_an_end_is_cut() -> None:
    """The part of a list within the limit is used, and the rest is not read."""
    good = json.dumps({"ask": ALICE.ask.to_json(), "free": 1}).encode()
    sent = [0]

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            await response.write(b'{"asks": [' + good + b", [")
            while sent[0] < 4 * MAX_RAW:
                await response.write(b"x" * (1 << 20))
                sent[0] += 1 << 20
        except ConnectionError:
            pass
        return response

    async with coordinator_with_handler(handler) as coordinator:
        assert len(await coordinator.shortlist({})) == 1
    assert sent[0] <= 2 * MAX_RAW


@pytest.mark.parametrize("filler", [b"[", b"{", b'""', b",", b'"\\"', b"[],", b"1,", b'{"a":1},'])
def test_reading_a_hostile_list_is_bounded(filler: bytes) -> None:
    """Stored bytes, items and work are bounded for any 40 MiB, and what is stored is JSON."""
    reader, piece = BoundedJsonReader(), filler * ((1 << 18) // len(filler))
    reader.feed(b'{"asks": [')
    began = time.process_time()
    while reader.seen < 40 << 20 and not reader.full:
        reader.feed(piece)
    assert time.process_time() - began < 20
    assert reader._tokens <= MAX_TOKENS + 1
    kept = reader.close()
    assert len(kept) < MAX_CONTROL
    if filler not in (b",", b"1,"):  # two commas in a row are not JSON
        assert len(json.loads(kept)["asks"]) <= MAX_ITEMS + 1


def test_an_answer_that_is_no_list_is_bounded() -> None:
    """Of an answer without lists, at most MAX_CONTROL bytes are stored."""
    with pytest.raises(BadMessage, match="expected a response of at most"):
        BoundedJsonReader().feed(b'{"x": "' + b"y" * MAX_CONTROL)


@pytest.mark.parametrize("seed", range(20))
def test_trimming_leaves_all_else_alone(seed: int) -> None:
    """Random documents in random pieces are unchanged except that items above the limit become null."""
    rng = random.Random(seed)

    def value(depth: int = 0) -> Any:
        kind = rng.randrange(7)
        if kind == 4 and depth < 4:
            return [value(depth + 1) for _ in range(rng.randrange(5))]
        if kind > 4 and depth < 4:
            return {f'"k{number}[': value(depth + 1) for number in range(3)}
        text = "".join(rng.choice('"\\[]{},x\n\u20ac') for _ in range(rng.randrange(20)))
        return (rng.randrange(10**6), text, None, 0.5)[kind % 4]

    for _ in range(60):
        document = {f"m{number}": value() for number in range(4)}
        limit, step = rng.choice((1, 10, 40, MAX_ITEM)), rng.choice((1, 2, 3, 7, 1_000))
        text = json.dumps(document, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5).encode()
        reader = BoundedJsonReader(limit)
        for begin in range(0, len(text), step):
            reader.feed(text[begin : begin + step])
        parsed = json.loads(reader.close())
        assert parsed.keys() == document.keys()
        for name, was in document.items():
            if isinstance(was, list) and limit < MAX_ITEM:
                assert [item if kept is not None else None for item, kept in zip(was, parsed[name], strict=True)] == parsed[name]
            else:
                assert parsed[name] == was


# Pages


async def test_listings_are_read_to_their_end() -> None:
    """All pages are read by following each page's cursor, for models and for the asks of one model."""
    asked: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        page = int(request.query.get("after", "0"))
        more = str(page + 1) if page < 4 else None
        offers = [OFFER | {"id": f"m{page}"}, OFFER | {"id": "x" * 300}, None, OFFER | {"inputPrice": "1e3"}]
        asks = [{"ask": Provider.make(f"p{page}").ask.to_json()}, {"ask": {}}]
        return web.json_response({"data": offers, "asks": asks, "next": more})

    async with coordinator_with_handler(handler) as coordinator:
        assert [offer.id for offer in await coordinator.models()] == ["m0", "m1", "m2", "m3", "m4"]
        asks = await coordinator.asks("a&b=c/d")
    assert [ask.message.provider for ask in asks] == [Provider.make(f"p{page}").address for page in range(5)]
    assert asked[0] == {}
    assert asked[5:7] == [{"model": "a&b=c/d"}, {"model": "a&b=c/d", "after": "1"}]


async def test_pages_without_an_end_are_not_followed_for_ever() -> None:
    """At most MAX_PAGES pages, MAX_RAW bytes and request_seconds are used; cursors that repeat are refused."""
    count = [0]
    wide, pause = [0], [0.0]

    async def handler(request: web.Request) -> web.Response:
        count[0] += 1
        await asyncio.sleep(pause[0])
        after = request.query.get("model", "")
        following: Any = {"circle": "a", "number": 7, "long": "x" * 5_000}.get(after, str(count[0]))
        return web.json_response({"asks": [], "next": following, "padding": "x" * wide[0]})

    async with coordinator_with_handler(handler) as coordinator:
        assert await coordinator.asks("endless") == []
        assert count[0] == MAX_PAGES
        coordinator._config = ClientConfig(request_seconds=0.2)
        count[0], pause[0] = 0, 0.05
        assert await coordinator.asks("slow") == []
        assert count[0] < 10
        coordinator._config, pause[0] = ClientConfig(), 0
        for odd in ("circle", "number", "long"):
            with pytest.raises(BadMessage, match=r"asks\.next"):
                await coordinator.asks(odd)
        count[0], wide[0] = 0, MAX_CONTROL - 200
        assert await coordinator.asks("wide") == []
        assert count[0] == MAX_RAW // MAX_CONTROL + 1


# Access tokens


async def test_a_token_is_signed_for_one_coordinator_and_reused_for_a_while() -> None:
    """The coordinator recovers the payer; the token is renewed before it expires, and after the clock was set back."""
    clock = [1_000_000]
    asked = [0]

    async def info() -> CoordinatorInfo:
        asked[0] += 1
        return CoordinatorInfo.from_json(INFO)

    tokens = AccessTokens(PAYER, info, lambda: clock[0])
    first = await tokens()
    assert load_access(first, DOMAIN, COORDINATOR, clock[0]) == PAYER.address
    with pytest.raises(Refusal):
        load_access(first, DOMAIN, ALICE.address, clock[0])
    clock[0] += REUSE_SECONDS - 1
    assert await tokens() == first
    for step in (1, -REUSE_SECONDS - 5):
        clock[0] += step
        again = await tokens()
        assert again != first
        assert load_access(again, DOMAIN, COORDINATOR, clock[0]) == PAYER.address
    assert asked[0] == 3


async def test_without_a_key_nothing_is_asked_of_a_job(fake: FakeMarket) -> None:
    """A request without a key is refused locally with what to do; another wallet's key is refused by the coordinator."""
    async with CoordinatorClient(fake.url, ClientConfig()) as coordinator:
        for call in (coordinator.job, coordinator.cancel):
            with pytest.raises(Refusal, match="--password-file") as caught:
                await call(JOB)
            assert caught.value.code is Code.UNAUTHENTICATED
    assert fake.cancels == []


async def test_another_wallet_neither_reads_nor_cancels_a_job(fake: FakeMarket, market: Market, config: ClientConfig) -> None:
    """A job's id alone gives no access to it."""
    await run(market)
    job = fake.last.job
    async with CoordinatorClient(fake.url, config) as coordinator:
        coordinator.authorize = AccessTokens(ALICE.signer, coordinator.info, lambda: int(time.time()))
        for call in (coordinator.job, coordinator.cancel):
            with pytest.raises(Refusal) as caught:
                await call(job)
            assert caught.value.code is Code.UNAUTHENTICATED
    assert fake.cancels == []


async def test_a_redirect_gets_neither_tokens_nor_jobs() -> None:
    """Only the configured host answers for the coordinator; redirects are not followed."""
    seen: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.path)
        return web.Response(status=307, headers={"location": "/elsewhere"})

    async with coordinator_with_handler(handler) as coordinator:
        for call in calls(coordinator):
            with pytest.raises(BadMessage, match="redirects to '/elsewhere'"):
                await call()
    assert "/elsewhere" not in seen


async def test_a_coordinator_that_trickles_is_given_up(config: ClientConfig) -> None:
    """Control requests have a deadline for the whole answer."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    async with (
        coordinator_with_handler(handler) as coordinator,
        CoordinatorClient(coordinator.url, replace(config, request_seconds=0.3)) as hasty,
    ):
        with pytest.raises(Unavailable):
            await hasty.info()


def test_limits_are_what_asks_need() -> None:
    """An ask of the largest size fits an item with its additional members, and 200 of them fit an answer."""
    assert MAX_ASK_BYTES + 4_096 <= MAX_ITEM
    assert 200 * MAX_ITEM <= MAX_CONTROL <= MAX_RAW

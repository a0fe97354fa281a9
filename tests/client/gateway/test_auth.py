"""Authentication of callers: no foreign web page, and callers with a key within the limits of that key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tallystick.client.config import Alias, ApiKey, Budget, ClientConfig, load_config
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Amount
from tallystick.protocol.wire import dumps
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, FakeMarket
from tests.client.parties import MODEL, Provider
from tests.coordinator.harness import person

ANN, BOB = "ann-secret-0123456789", "bob-secret-0123456789"


@asynccontextmanager
async def callers(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[tuple[openai.AsyncOpenAI, Market]]:
    """A gateway, and a client for each key."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk, market


async def ask(sdk: openai.AsyncOpenAI, key: str, options: str = "{}", model: str = MODEL) -> None:
    """Sends one chat completion of one caller."""
    caller = sdk.with_options(api_key=key, default_headers={"x-tally-options": options})
    await caller.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])


async def test_each_key_has_its_limits(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A key limits the models, cost and requirements of its requests; no request widens them. Other callers are not affected."""
    keys = (
        ApiKey(label="ann", secret=ANN, models=(MODEL,), max_cost=Amount(1)),
        ApiKey(label="bob", secret=BOB, require=Requirements(region=("eu",))),
    )
    async with callers(fake, wallet, replace(config, api_keys=keys, api_key="everything-goes")) as (sdk, _):
        with pytest.raises(openai.APIStatusError, match=r"above the 0\.000001 allowed") as caught:
            await ask(sdk, ANN, '{"max_cost": "5"}')
        assert caught.value.status_code == 402
        with pytest.raises(openai.NotFoundError, match="model: expected one of those that this API key may use"):
            await ask(sdk, ANN, model="other")
        with pytest.raises(openai.APIStatusError, match=r"require\.region: expected one of eu, got us"):
            await ask(sdk, BOB, '{"require": {"region": "us"}}')
        with pytest.raises(openai.APIStatusError):  # no provider of this market is in the EU
            await ask(sdk, BOB)
        for wrong in ("none", ANN[:-1], ""):
            with pytest.raises(openai.AuthenticationError):
                await ask(sdk, wrong)
        assert not fake.sessions
        await ask(sdk, "everything-goes")


async def test_a_key_is_a_workload(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A key's jobs count under its label, whichever label its requests name, so its budget holds."""
    keys = (ApiKey(label="ann", secret=ANN), ApiKey(label="annex", secret=BOB))
    bounded = replace(config, api_keys=keys, budgets=(Budget(per_day=Amount(10_000), label="ann"),))
    async with callers(fake, wallet, bounded) as (sdk, market):
        await ask(sdk, ANN)
        await ask(sdk, ANN, '{"label": "papers"}')
        await ask(sdk, BOB)
        spent = await market._ledger.spending(0, ("label",))
        assert {entry.group[0]: entry.requests for entry in spent} == {"ann": 1, "ann/papers": 1, "annex": 1}
        standing = await market._ledger.budget_status(bounded.budgets[0], market._now())
        assert standing.spent == 2 * spent[0].cost
        with pytest.raises(openai.BadRequestError, match="label"):
            await ask(sdk, ANN, '{"label": "%s"}' % ("x" * 64))


async def test_idempotency_keys_are_each_callers_own(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The same idempotency key of two callers means two jobs, and neither sees the other's."""
    keys = (ApiKey(label="ann", secret=ANN), ApiKey(label="ann/x", secret=BOB))
    async with callers(fake, wallet, replace(config, api_keys=keys)) as (sdk, _):

        async def job(secret: str, key: str, text: str = "hi") -> str:
            caller = sdk.with_options(api_key=secret).chat.completions.with_raw_response
            messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
            completion = await caller.create(model=MODEL, messages=messages, extra_headers={"idempotency-key": key})
            return completion.headers["x-tally-job"]

        assert await job(ANN, "x/k") != await job(BOB, "k")
        first = await job(ANN, "shared")
        assert await job(BOB, "shared", "other words") != first


async def test_a_key_sees_its_models(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """GET /v1/models lists only the models that the key may use."""
    keys = (ApiKey(label="ann", secret=ANN, models=("other",)), ApiKey(label="bob", secret=BOB))
    async with callers(fake, wallet, replace(config, api_keys=keys)) as (sdk, _):
        assert [model.id async for model in sdk.with_options(api_key=ANN).models.list()] == []
        assert [model.id async for model in sdk.with_options(api_key=BOB).models.list()] == [MODEL]


async def test_a_key_of_aliases(wallet: Signer, config: ClientConfig) -> None:
    """A key that names an alias may use it with all its models, but not these by their names, and sees no other name."""
    keys = (ApiKey(label="ann", secret=ANN, models=("mine",)), ApiKey(label="bob", secret=BOB, models=("mine", "small")))
    aliases = (Alias(name="mine", models=("absent", "small")), Alias(name="other", models=("small", "large")))
    named = replace(config, api_keys=keys, aliases=aliases)
    offers = [Provider.make(name, model=model) for name, model in (("alice", "small"), ("bob", "large"))]
    async with FakeMarket(*offers).serve() as fake, callers(fake, wallet, named) as (sdk, _):
        visible = {key: [model.id async for model in sdk.with_options(api_key=key).models.list()] for key in (ANN, BOB)}
        assert visible == {ANN: ["mine"], BOB: ["small", "mine", "other"]}
        for key, names in visible.items():
            for name in ("small", "large", "absent", "mine", "other"):
                if name in names:
                    await ask(sdk, key, model=name)
                    assert fake.last.request["model"] == "small"
                    assert (await sdk.with_options(api_key=key).models.retrieve(name)).id == name
                else:
                    ordered = len(fake.submissions)
                    with pytest.raises(openai.NotFoundError, match=rf"this API key may use \({', '.join(sorted(names))}\)"):
                        await ask(sdk, key, model=name)
                    with pytest.raises(openai.NotFoundError):
                        await sdk.with_options(api_key=key).models.retrieve(name)
                    assert len(fake.submissions) == ordered
        with pytest.raises(openai.NotFoundError, match="fallbacks: expected one of those"):
            await ask(sdk, ANN, '{"fallbacks": ["small"]}', model="mine")
        with pytest.raises(openai.NotFoundError, match="model: expected one of those"):
            await ask(sdk, ANN, '{"fallbacks": ["mine"]}', model="small")
        await ask(sdk, BOB, '{"fallbacks": ["small", "mine"]}', model="other")


async def test_a_key_holds_for_forms(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A form's model is one that the key may use."""
    keys = (ApiKey(label="ann", secret=ANN, models=("mine",)), ApiKey(label="bob", secret=BOB, models=(MODEL,)))
    named = replace(config, api_keys=keys, aliases=(Alias(name="mine", models=(MODEL,)),))
    async with callers(fake, wallet, named) as (sdk, _):
        for key, error, text in ((ANN, openai.NotFoundError, "this API key"), (BOB, openai.NotFoundError, "serves")):
            with pytest.raises(error, match=text):
                await sdk.with_options(api_key=key).audio.transcriptions.create(model=MODEL, file=b"x")


async def test_an_alias_hides_a_model(wallet: Signer, config: ClientConfig) -> None:
    """An alias with a model's name stands for its own models, also for a key that names it, and is listed once."""
    key = ApiKey(label="ann", secret=ANN, models=("large",))
    named = replace(config, api_keys=(key,), aliases=(Alias(name="large", models=("small",)),))
    offers = [Provider.make(name, model=model) for name, model in (("alice", "small"), ("bob", "large"))]
    async with FakeMarket(*offers).serve() as fake, callers(fake, wallet, named) as (sdk, _):
        await ask(sdk, ANN, model="large")
        assert fake.last.request["model"] == "small"
        assert [model.id async for model in sdk.with_options(api_key=ANN).models.list()] == ["large"]


def test_keys_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets may come from the environment, are never shown, and must be long and unique."""
    path = tmp_path / "client.toml"
    path.write_text('[[api_keys]]\nlabel = "ann"\nsecret_env = "ANN"\nmax_cost = "0.05"\n[api_keys.require]\nregion = ["eu"]\n')
    monkeypatch.setenv("ANN", ANN)
    loaded = load_config(path)
    (key,) = loaded.api_keys
    assert (key.value, key.max_cost, key.require.region) == (ANN, 50_000, ("eu",))
    assert ANN not in repr(replace(loaded, api_keys=(ApiKey(label="ann", secret=ANN),)))
    monkeypatch.delenv("ANN")
    market = Market("http://127.0.0.1:1", person("ann"), load_config(path))  # other commands need no secrets
    with pytest.raises(BadMessage, match="environment variable ANN: expected at least 16 characters, it is not set"):
        build_app(market)
    with pytest.raises(BadMessage, match="one of secret and secret_env"):
        ApiKey(label="ann")
    with pytest.raises(BadMessage, match="label"):
        ApiKey(label="", secret=ANN)
    short = ClientConfig(api_keys=(ApiKey(label="a", secret="short"),))
    with pytest.raises(BadMessage, match="secret: expected at least 16 characters, got 5"):
        build_app(Market("http://127.0.0.1:1", person("ann"), short))
    same = ClientConfig(api_keys=(ApiKey(label="a", secret=ANN), ApiKey(label="a", secret=BOB)))
    with pytest.raises(BadMessage, match="the same label"):
        build_app(Market("http://127.0.0.1:1", person("ann"), same))
    twice = ClientConfig(api_keys=(ApiKey(label="a", secret=ANN), ApiKey(label="b", secret=ANN)))
    with pytest.raises(BadMessage, match="the same secret"):
        build_app(Market("http://127.0.0.1:1", person("ann"), twice))


def test_a_budget_covers_what_is_under_its_label() -> None:
    """A budget covers labels below its own: "research/papers" counts as "research", and "researchers" does not."""
    budget = Budget(per_day=Amount(1), label="research")
    labels = {"research": True, "research/papers": True, "researchers": False, "Research": False, "": False, "x/research": False}
    assert {label: budget.covers(label) for label in labels} == labels


# Web pages, and host names of this machine

Sender = Callable[..., Awaitable[tuple[int, bytes]]]


@asynccontextmanager
async def raw_http(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[Sender]:
    """Sends requests with these exact head lines; returns status and body of the answer."""
    async with Market(fake.url, wallet, config) as market, serving(build_app(market), "127.0.0.1", 0) as port:

        async def send(*lines: str, body: bytes = b"") -> tuple[int, bytes]:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "\r\n".join((*lines, f"content-length: {len(body)}", "connection: close")).encode("latin-1")
            writer.write(head + b"\r\n\r\n" + body)
            answer = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            answer, _, rest = answer.partition(b"\r\n\r\n")
            return int(answer.split()[1]), rest

        yield send


POST, GET = "POST /v1/chat/completions HTTP/1.1", "GET /health HTTP/1.1"
BODY_BYTES = dumps(BODY)
HERE = "host: localhost:8421"
STRANGE = [
    (),
    ("host: evil.example",),
    ("host: localhost.evil.example",),
    ("host: localhost@evil.example",),
    ("host: evil.example@127.0.0.1",),
    ("host: evil.example:80@127.0.0.1:8421",),
    ("host: 127.0.0.1.evil.example",),
    ("host: 127.0.0.1 evil.example",),
    ("host: localhost/.evil.example",),
    ("host: localhost#evil",),
    ("host: localhost.",),
    ("host: [::1].evil.example",),
    ("host: [::1",),
    ("host: [127.0.0.1]evil",),
    ("host: 0.0.0.0",),
    ("host: 8.8.8.8",),
    ("host: [::ffff:8.8.8.8]",),
    ("host: 2130706433",),
    ("host: localhost:8421:8421",),
    ("host: localhost:x",),
    ("host:",),
    ("host: l\u00f6calhost",),
    (HERE, "host: evil.example"),
    ("host: evil.example", HERE),
    (HERE, HERE),
    (HERE, "origin: https://evil.example"),
    (HERE, "origin: null"),
    (HERE, "origin:"),
    (HERE, "origin: http://localhost:3000.evil.example"),
    (HERE, "origin: http://localhost:3000", "origin: https://evil.example"),
    (HERE, "sec-fetch-site: cross-site"),
    (HERE, "sec-fetch-site: same-site"),
    (HERE, "Sec-Fetch-Site: cross-site", "sec-fetch-mode: no-cors", "content-type: text/plain"),
    (HERE, "sec-fetch-site: none", "sec-fetch-site: cross-site"),
    (HERE, "sec-fetch-site: something-new"),
    (HERE, "sec-fetch-site: cross-site", "origin: https://evil.example"),
]
"""Head lines that a page, or a name that was made to point here, may bring about; or that nobody sends who is at home here."""
PAGE = ("http://localhost:3000",)


async def test_http_1_0_needs_no_host(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A client of HTTP/1.0 need not name the host; if it does, or names an origin, the same rules hold."""
    async with raw_http(fake, wallet, config) as send:
        post = POST.replace("1.1", "1.0")
        assert (await send(post, body=BODY_BYTES))[0] == 200
        for lines in (("host: evil.example",), ("origin: https://evil.example",), ("sec-fetch-site: cross-site",)):
            assert (await send(post, *lines, body=BODY_BYTES))[0] == 401


async def test_unauthenticated_requests_spend_and_learn_nothing(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """None of these requests places a job, sees a job or a model, or learns payer and coordinator from /health."""
    async with raw_http(fake, wallet, replace(config, allow_origins=PAGE)) as send:
        for lines in STRANGE:
            for first in (POST, "GET /v1/models HTTP/1.1", f"GET /tally/jobs/{'0' * 32} HTTP/1.1"):
                status, _ = await send(first, *lines, body=BODY_BYTES if first is POST else b"")
                assert status in (400, 401), (first, lines)
            status, answer = await send(GET, *lines)
            assert status == 400 or json.loads(answer) == {"status": "ok"}, lines
            assert wallet.address.encode() not in answer
    assert fake.submissions == []


async def test_an_absolute_target_is_checked_by_its_host(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A request with an absolute target, as sent to proxies, is checked by its Host header like any other."""
    async with raw_http(fake, wallet, config) as send:
        for target in ("http://localhost/v1/chat/completions", "http://127.0.0.1:8421/v1/chat/completions"):
            status, _ = await send(f"POST {target} HTTP/1.1", "host: evil.example", body=BODY_BYTES)
            assert status == 401
    assert fake.submissions == []


@pytest.mark.parametrize(
    "lines",
    [
        ("host: localhost",),
        ("host: LOCALHOST:8421",),
        ("host: 127.0.0.1:1",),
        ("host: 127.0.0.2",),
        ("host: [::1]:8421",),
        ("host: [::ffff:127.0.0.1]",),
        (HERE, "origin: http://localhost:3000"),
        (HERE, "origin: http://localhost:3000", "sec-fetch-site: same-site"),
        (HERE, "sec-fetch-site: none"),
        (HERE, "sec-fetch-site: same-origin"),
    ],
)
async def test_local_programs_are_served(fake: FakeMarket, wallet: Signer, config: ClientConfig, lines: tuple[str, ...]) -> None:
    """Local programs by any of the machine's names, and allowed pages, are served; /health tells them the payer."""
    async with raw_http(fake, wallet, replace(config, allow_origins=PAGE)) as send:
        assert (await send(POST, *lines, body=BODY_BYTES))[0] == 200
        answer = json.loads((await send(GET, *lines))[1])
        assert (answer["payer"], answer["coordinator"]) == (wallet.address, fake.url)


async def test_health_reports_the_payer_only_to_key_holders(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """With keys, /health tells others only that the gateway is up."""
    async with raw_http(fake, wallet, replace(config, api_key="everything-goes")) as send:
        assert await send(GET, HERE) == (200, b'{"status":"ok"}')
        answer = json.loads((await send(GET, "host: elsewhere.example", "authorization: Bearer everything-goes"))[1])
        assert answer["payer"] == wallet.address


@pytest.mark.parametrize("origin", ["http://*.example", "localhost:3000", "http://localhost:3000/", "", "null"])
def test_origins_are_named_one_by_one(origin: str) -> None:
    """Origins that name no page, or that a page of any site may have, are refused at the start."""
    with pytest.raises(BadMessage, match="allow_origins"):
        ClientConfig(allow_origins=(origin,))

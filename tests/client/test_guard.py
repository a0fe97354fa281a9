"""API keys of several callers, each held to what the config says of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tallystick.client.config import ApiKey, Budget, ClientConfig, load_config
from tallystick.client.gateway import build_app
from tallystick.client.sdk import Market
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.types import Amount
from tallystick.runtime.serving import serving
from tests.client.fake import FakeMarket
from tests.client.parties import MODEL
from tests.coordinator.world import person

ANN, BOB = "ann-secret-0123456789", "bob-secret-0123456789"


@asynccontextmanager
async def callers(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[tuple[openai.AsyncOpenAI, Market]]:
    """A gateway, as whoever has a key sees it."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk, market


async def ask(sdk: openai.AsyncOpenAI, key: str, options: str = "{}", model: str = MODEL) -> None:
    """One chat completion of one caller."""
    caller = sdk.with_options(api_key=key, default_headers={"x-tally-options": options})
    await caller.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])


async def test_each_key_has_its_limits(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """What a key's requests may name, cost and require; nothing in a request widens it, and other callers are not held to it."""
    keys = (
        ApiKey(label="ann", secret=ANN, models=(MODEL,), max_cost=Amount(1)),
        ApiKey(label="bob", secret=BOB, require=Requirements(region=("eu",))),
    )
    async with callers(fake, wallet, replace(config, keys=keys, api_key="everything-goes")) as (sdk, _):
        with pytest.raises(openai.APIStatusError, match=r"above the 0\.000001 allowed") as caught:
            await ask(sdk, ANN, '{"max_cost": "5"}')
        assert caught.value.status_code == 402
        with pytest.raises(openai.NotFoundError, match="not among the models allowed here"):
            await ask(sdk, ANN, model="other")
        with pytest.raises(openai.APIStatusError, match="only eu is allowed here"):
            await ask(sdk, BOB, '{"require": {"region": "us"}}')
        with pytest.raises(openai.APIStatusError):  # nobody in this market is in the eu
            await ask(sdk, BOB)
        for wrong in ("none", ANN[:-1], ""):
            with pytest.raises(openai.AuthenticationError):
                await ask(sdk, wrong)
        assert not fake.sessions
        await ask(sdk, "everything-goes")


async def test_a_key_is_a_workload(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """Its jobs are spent under its label, whatever its requests call theirs, so that its budget holds."""
    keys = (ApiKey(label="ann", secret=ANN), ApiKey(label="annex", secret=BOB))
    bounded = replace(config, keys=keys, budgets=(Budget(per_day=Amount(10_000), label="ann"),))
    async with callers(fake, wallet, bounded) as (sdk, market):
        await ask(sdk, ANN)
        await ask(sdk, ANN, '{"label": "papers"}')
        await ask(sdk, BOB)
        spent = await market._ledger.spent(0, ("label",))
        assert {one.group[0]: one.requests for one in spent} == {"ann": 1, "ann/papers": 1, "annex": 1}
        standing = await market._ledger.standing(bounded.budgets[0], market._now())
        assert standing.spent == 2 * spent[0].cost
        with pytest.raises(openai.BadRequestError, match="label"):
            await ask(sdk, ANN, '{"label": "%s"}' % ("x" * 64))


async def test_idempotency_keys_are_each_callers_own(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """The same key of two callers stands for two jobs, and neither learns of the other's."""
    keys = (ApiKey(label="ann", secret=ANN), ApiKey(label="ann/x", secret=BOB))
    async with callers(fake, wallet, replace(config, keys=keys)) as (sdk, _):

        async def job(secret: str, key: str, text: str = "hi") -> str:
            caller = sdk.with_options(api_key=secret).chat.completions.with_raw_response
            messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
            made = await caller.create(model=MODEL, messages=messages, extra_headers={"idempotency-key": key})
            return made.headers["x-tally-job"]

        assert await job(ANN, "x/k") != await job(BOB, "k")
        first = await job(ANN, "shared")
        assert await job(BOB, "shared", "other words") != first


async def test_a_key_sees_its_models(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """GET /v1/models lists what the key may ask for."""
    keys = (ApiKey(label="ann", secret=ANN, models=("other",)), ApiKey(label="bob", secret=BOB))
    async with callers(fake, wallet, replace(config, keys=keys)) as (sdk, _):
        assert [model.id async for model in sdk.with_options(api_key=ANN).models.list()] == []
        assert [model.id async for model in sdk.with_options(api_key=BOB).models.list()] == [MODEL]


def test_keys_in_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets may come from the environment, are never shown, and must be hard to guess and each caller's own."""
    path = tmp_path / "client.toml"
    path.write_text('[[keys]]\nlabel = "ann"\nsecret_env = "ANN"\nmax_cost = "0.05"\n[keys.require]\nregion = ["eu"]\n')
    monkeypatch.setenv("ANN", ANN)
    loaded = load_config(path)
    (key,) = loaded.keys
    assert (key.value, key.max_cost, key.require.region) == (ANN, 50_000, ("eu",))
    assert ANN not in repr(replace(loaded, keys=(ApiKey(label="ann", secret=ANN),)))
    monkeypatch.delenv("ANN")
    market = Market("http://127.0.0.1:1", person("ann"), load_config(path))  # other commands need no secrets
    with pytest.raises(BadMessage, match="the environment variable ANN is not set"):
        build_app(market)
    with pytest.raises(BadMessage, match="one of secret and secret_env"):
        ApiKey(label="ann")
    with pytest.raises(BadMessage, match="label"):
        ApiKey(label="", secret=ANN)
    short = ClientConfig(keys=(ApiKey(label="a", secret="short"),))
    with pytest.raises(BadMessage, match="secret has fewer than 16 characters"):
        build_app(Market("http://127.0.0.1:1", person("ann"), short))
    same = ClientConfig(keys=(ApiKey(label="a", secret=ANN), ApiKey(label="a", secret=BOB)))
    with pytest.raises(BadMessage, match="the same label"):
        build_app(Market("http://127.0.0.1:1", person("ann"), same))
    twice = ClientConfig(keys=(ApiKey(label="a", secret=ANN), ApiKey(label="b", secret=ANN)))
    with pytest.raises(BadMessage, match="the same secret"):
        build_app(Market("http://127.0.0.1:1", person("ann"), twice))


def test_a_budget_covers_what_is_under_its_label() -> None:
    """What is named under a label is part of it: "research/papers" of "research", but not "researchers"."""
    budget = Budget(per_day=Amount(1), label="research")
    labels = {"research": True, "research/papers": True, "researchers": False, "Research": False, "": False, "x/research": False}
    assert {label: budget.covers(label) for label in labels} == labels

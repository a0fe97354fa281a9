"""Hosted upstreams behind the gateway: who may use them, what they get, what their answers say, and what is booked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tallystick.client.config import Alias, ApiKey, Budget, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.client.upstream_settings import Upstream, UpstreamModel
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import BadMessage, Code, Fault, Refusal, Unavailable
from tallystick.protocol.requirements import Requirements
from tallystick.protocol.routes import EMBEDDINGS, MESSAGES
from tallystick.protocol.types import Amount
from tests.client.fake_coordinator import BODY, CHAT, FakeMarket, Session
from tests.client.gateway.test_handler import gateway
from tests.client.parties import MODEL
from tests.client.upstreams.hosted_api import ANSWER, STREAM, HostedApi, event

BIG = UpstreamModel(name="big", input_price=Amount(2_000_000), output_price=Amount(8_000_000), max_output_tokens=1_000)
MEMBER = "upstream://cloud/big"
COST = 2_000 + 800
"""Base units: 1,000 input and 100 output tokens."""
CLOUDY = BODY | {"model": "cloudy"}
"""A request to an alias that tries the market first."""
HOSTED = BODY | {"model": "hosted"}
"""A request to an alias of the upstream alone."""


@pytest.fixture
async def hosted() -> AsyncIterator[HostedApi]:
    """A hosted API that serves."""
    async with HostedApi().serve() as api:
        yield api


@pytest.fixture
def cloudy(config: ClientConfig, hosted: HostedApi, monkeypatch: pytest.MonkeyPatch) -> ClientConfig:
    """Settings with an upstream, and two aliases that name it."""
    monkeypatch.setenv("CLOUD_KEY", "sk-the-users-own-key")
    upstream = Upstream(name="cloud", url=hosted.url, key_env="CLOUD_KEY", models=(BIG,))
    aliases = (Alias(name="cloudy", models=(MODEL, MEMBER)), Alias(name="hosted", models=(MEMBER,)))
    return replace(config, upstreams=(upstream,), aliases=aliases)


async def busy(session: Session) -> None:
    """A market in which no provider is free."""
    await session.fail(Unavailable(Code.NODE_BUSY, "no free slot", fault=Fault.PROVIDER))


async def ask(http: httpx.AsyncClient, body: dict[str, Any] = HOSTED, path: str = CHAT, **options: Any) -> httpx.Response:
    """Asks with options for the market."""
    headers = {"x-tally-options": json.dumps(options)} if options else {}
    return await http.post(path, json=body, headers=headers)


def spent_on(lines: list[Any]) -> dict[str, tuple[int, int, int, int, int]]:
    """Requests, failures, cost, input and output tokens by provider and model."""
    return {
        " ".join(map(str, line.group)): (line.requests, line.failed, line.cost, line.input_tokens, line.output_tokens)
        for line in lines
    }


async def test_the_market_comes_first(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """An upstream that comes second is asked only if the market does not answer."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        answer = await ask(http, CLOUDY)
        assert "x-tally-upstream" not in answer.headers
        assert not hosted.requests
        fake.script = busy
        answer = await ask(http, CLOUDY)
        assert (answer.status_code, answer.headers["x-tally-upstream"]) == (200, "cloud")
        assert answer.json() == ANSWER


async def test_an_answer_of_an_upstream(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """It gets the caller's request with its own model's name and the user's key; headers and ledger say what it is."""
    async with gateway(fake, wallet, cloudy) as (http, market):
        answer = await ask(http, HOSTED | {"max_tokens": 100, "metadata": {"a": 1}}, label="research")
        assert answer.json() == ANSWER
        assert hosted.paths == ["/v1/chat/completions"]
        assert hosted.authorizations == ["Bearer sk-the-users-own-key"]
        assert hosted.requests == [HOSTED | {"model": "big", "max_tokens": 100, "metadata": {"a": 1}}]
        headers = answer.headers
        assert (headers["x-tally-upstream"], headers["x-tally-receipt"], headers["x-tally-cost"]) == ("cloud", "none", str(COST))
        assert not {"x-tally-provider", "x-tally-job"} & headers.keys()
        lines = await market._ledger.spending(0, ("provider", "model", "label"))
        assert spent_on(lines) == {f"upstream:cloud {MEMBER} research": (1, 0, COST, 1_000, 100)}
        assert not fake.submissions


async def test_a_stream_of_an_upstream(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """Events pass through as they are. Usage is asked for, and withheld from a caller that did not ask for it."""
    async with gateway(fake, wallet, cloudy) as (http, market):
        answer = await ask(http, HOSTED | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-tally-upstream"] == "cloud"
        assert answer.content == b"".join([*STREAM[:3], event(b"[DONE]")])
        assert hosted.requests[0]["stream_options"] == {"include_usage": True}
        asked = await ask(http, HOSTED | {"stream": True, "stream_options": {"include_usage": True}})
        assert asked.content == b"".join([*STREAM, event(b"[DONE]")])
        lines = await market._ledger.spending(0, ("provider",))
        assert spent_on(lines) == {"upstream:cloud": (2, 0, 2 * COST, 2_000, 200)}


async def test_a_stream_that_breaks_off(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """Its last event is an error, it counts as failed, and what came is estimated and booked."""
    hosted.events = STREAM[:2]
    async with gateway(fake, wallet, cloudy) as (http, market):
        answer = await ask(http, HOSTED | {"stream": True})
        assert answer.content.startswith(b"".join(STREAM[:2]))
        last = json.loads(answer.content.split(b"data: ")[-1])
        assert last["error"]["code"] == "upstream_unavailable"
        (line,) = await market._ledger.spending(0, ("provider",))
        assert (line.requests, line.failed, line.output_tokens) == (1, 1, 4)
        assert line.cost > 0


REQUIRES_MARKET: list[dict[str, Any]] = [
    {"pin": ["0x" + "11" * 20]},
    {"require": {"region": "eu"}},
    {"require": {"features": ["tools"]}},
    {"min_stake": "1"},
    {"min_reputation": 1},
    {"max_input_price": "100"},
    {"max_output_price": "100"},
    {"market": True},
]


@pytest.mark.parametrize("options", REQUIRES_MARKET)
async def test_requests_that_require_the_market(
    options: dict[str, Any], fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi
) -> None:
    """What only a provider of the market can promise never goes to an upstream, also if the market fails."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        answer = await ask(http, **options)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_provider")
        assert "requires a provider of the market" in answer.json()["error"]["message"]
        fake.refusals = [Unavailable(Code.NODE_BUSY, "busy")]
        assert (await ask(http, CLOUDY, **options)).json()["error"]["code"] == "node_busy"
        assert not hosted.requests


async def test_what_does_not_require_the_market(
    fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi
) -> None:
    """Labels, limits of cost that suffice, and preferences can be met by an upstream, or concern others."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        for options in (
            {"label": "a"},
            {"max_cost": "1"},
            {"prefer": ["0x" + "11" * 20]},
            {"market": False},
            {"sort": "latency"},
        ):
            assert (await ask(http, **options)).status_code == 200, options
        keyed = await http.post(CHAT, json=HOSTED, headers={"idempotency-key": "k"})
        assert keyed.json()["error"]["code"] == "no_provider", "a key stands for one job of the market"
        assert len(hosted.requests) == 5


async def test_the_configs_requirements_hold(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """[require] of the config, or of a caller's key, keeps every request on the market."""
    strict = replace(cloudy, require=Requirements(region=("eu",)))
    async with gateway(fake, wallet, strict) as (http, _):
        assert (await ask(http)).status_code == 503
    key = ApiKey(label="ann", secret="ann-0123456789abcdef", min_stake=Amount(1))
    async with gateway(fake, wallet, replace(cloudy, api_keys=(key,))) as (http, _):
        answer = await http.post(CHAT, json=HOSTED, headers={"authorization": "Bearer ann-0123456789abcdef"})
        assert answer.status_code == 503
    assert not hosted.requests


async def test_only_aliases_reach_an_upstream(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """Neither its name as a model nor as a fallback is one; a key held to an alias may use the alias's upstream."""
    keys = (
        ApiKey(label="ann", secret="ann-0123456789abcdef", models=("hosted",)),
        ApiKey(label="bob", secret="bob-0123456789abcdef", models=(MODEL,)),
    )
    async with gateway(fake, wallet, replace(cloudy, api_keys=keys, api_key="master-0123456789ab")) as (http, _):
        http.headers["authorization"] = "Bearer master-0123456789ab"
        assert (await ask(http, BODY | {"model": MEMBER})).status_code == 404
        answer = await ask(http, BODY, fallbacks=[MEMBER])
        assert (answer.status_code, "fallbacks" in answer.text) == (404, True)
        assert not hosted.requests
        http.headers["authorization"] = "Bearer bob-0123456789abcdef"
        assert (await ask(http)).status_code == 404
        assert not hosted.requests
        http.headers["authorization"] = "Bearer ann-0123456789abcdef"
        assert (await ask(http)).status_code == 200


async def test_budgets_bound_upstreams(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """A request is refused if the most that it may cost does not fit the day; answers leave what they did not use."""
    budgets = (Budget(per_day=Amount(5_000), label="small"), Budget(per_day=Amount(1_000_000)))
    async with gateway(fake, wallet, replace(cloudy, budgets=budgets)) as (http, market):
        request = HOSTED | {"max_tokens": 200}
        assert (await ask(http, request, label="small/papers")).status_code == 200
        status = await market._ledger.budget_status(budgets[0], market._now())
        assert (status.spent, status.reserved) == (COST, 0)
        answer = await ask(http, request, label="small/papers")
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "over_budget")
        assert "0.0022 dollars left" in answer.json()["error"]["message"]
        assert len(hosted.requests) == 1
        assert (await ask(http, request, label="other")).status_code == 200


async def test_limits_of_cost_and_price(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """max_cost bounds the most that a request may cost; the config's maximum prices hold for upstreams too."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        answer = await ask(http, max_cost="0.0001")
        assert (answer.status_code, answer.json()["error"]["code"]) == (402, "cost_above_cap")
    for changes, status in (({"max_output_price": Amount(7_999_999)}, 402), ({"max_output_price": Amount(8_000_000)}, 200)):
        async with gateway(fake, wallet, replace(cloudy, **changes)) as (http, _):  # type: ignore[arg-type]
            assert (await ask(http)).status_code == status
    assert len(hosted.requests) == 1


async def test_a_model_without_prices(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """Its tokens are counted, its cost is not known: it is refused where a budget or a limit would have to count it."""
    unpriced = replace(cloudy, upstreams=(replace(cloudy.upstreams[0], models=()),))
    async with gateway(fake, wallet, unpriced) as (http, market):
        assert (await ask(http)).headers["x-tally-cost"] == "0"
        (line,) = await market._ledger.spending(0, ())
        assert (line.cost, line.input_tokens) == (0, 1_000)
        assert (await ask(http, max_cost="1")).json()["error"]["code"] == "cost_above_cap"
    async with gateway(fake, wallet, replace(unpriced, budgets=(Budget(per_day=Amount(10**9)),))) as (http, _):
        answer = await ask(http)
        assert (answer.status_code, "set input_price" in answer.text) == (402, True)
    assert len(hosted.requests) == 1


@pytest.mark.parametrize(
    ("status", "body", "retry"),
    [
        (500, b'{"error": {"message": "on fire \\u001b[31m"}}', "true"),
        (503, b"<html>", "true"),
        (429, b'{"error": "slow down"}', "true"),
        (401, b'{"error": {"message": "Incorrect API key: sk-the-users-own-key"}}', "false"),
        (302, b"", "false"),
    ],
)
async def test_an_upstream_that_fails(  # noqa: PLR0917 - parameters and fixtures
    status: int, body: bytes, retry: str, fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi
) -> None:
    """Its failure is an error in OpenAI's form that names it, without the key; nothing is booked but the failed request."""
    hosted.status, hosted.body, hosted.headers = status, body, {"retry-after": "30", "location": "http://127.0.0.1:1/"}
    async with gateway(fake, wallet, cloudy) as (http, market):
        answer = await ask(http)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "upstream_unavailable")
        assert (MEMBER in error["message"], str(status) in error["message"]) == (True, True)
        assert "sk-the-users" not in answer.text
        assert "\x1b" not in error["message"]
        assert answer.headers["x-should-retry"] == retry
        if status in (429, 500, 503):
            assert answer.headers["retry-after"] == "30"
        assert spent_on(await market._ledger.spending(0, ("provider",))) == {"upstream:cloud": (1, 1, 0, 0, 0)}


async def test_an_upstream_that_blames_the_request(
    fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi
) -> None:
    """The caller gets its answer as it is, except for the key, which a caller of the gateway must not learn."""
    hosted.status, hosted.body = 400, b'{"error": {"message": "n: expected 1", "type": "invalid_request_error"}}'
    async with gateway(fake, wallet, cloudy) as (http, _):
        answer = await ask(http)
        assert (answer.status_code, answer.content) == (400, hosted.body)
        assert (answer.headers["x-tally-upstream"], answer.headers["x-tally-cost"]) == ("cloud", "0")
        hosted.body = b'{"error": {"message": "no such model for sk-the-users-own-key"}}'
        assert (await ask(http)).json()["error"]["message"] == "no such model for [redacted]"


async def test_a_market_after_an_upstream(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """An upstream may come first, and the market takes over if it fails or cannot be reached."""
    first = replace(cloudy, aliases=(Alias(name="cloudy", models=(MEMBER, MODEL)),))
    async with gateway(fake, wallet, first) as (http, _):
        assert (await ask(http, CLOUDY)).headers["x-tally-upstream"] == "cloud"
        hosted.status = 500
        assert "x-tally-upstream" not in (await ask(http, CLOUDY)).headers
    unreachable = replace(first, upstreams=(replace(first.upstreams[0], url="http://127.0.0.1:1/v1"),))
    async with gateway(fake, wallet, unreachable) as (http, _):
        assert (await ask(http, CLOUDY)).headers["x-tally-provider"]


async def test_an_upstream_without_any_coordinator(wallet: Signer, cloudy: ClientConfig) -> None:
    """The market may be down as a whole; a hosted fallback answers all the same."""
    nowhere = FakeMarket()
    nowhere.url = "http://127.0.0.1:1"
    async with gateway(nowhere, wallet, cloudy) as (http, _):
        answer = await ask(http, CLOUDY)
        assert (answer.status_code, answer.headers.get("x-tally-upstream")) == (200, "cloud"), answer.text


async def test_an_answer_that_is_not_good_enough(
    fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi
) -> None:
    """A rule judges answers of upstreams too. A rejected answer is paid for, and sent if nothing better comes."""
    hosted.body = orjson.dumps(ANSWER | {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]})
    ruled = replace(cloudy, aliases=(Alias(name="cloudy", models=(MEMBER, MODEL), rule="small-model-first"),))
    async with gateway(fake, wallet, ruled) as (http, _):
        answer = await ask(http, CLOUDY)
        assert answer.headers["x-tally-provider"]
        fake.script = busy
        fake.refusals = [Refusal(Code.UNKNOWN_MODEL, "gone")]
        answer = await ask(http, CLOUDY | {"seed": 1})
        assert (answer.status_code, answer.headers.get("x-tally-upstream")) == (200, "cloud"), answer.text
        assert answer.headers["x-tally-cost"] == str(COST)


async def test_other_routes_and_dialects(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi) -> None:
    """Any JSON route reaches an upstream; Messages are translated to chat completions and back."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        answer = await ask(http, {"model": "hosted", "max_tokens": 5, "messages": BODY["messages"]}, MESSAGES)
        assert answer.json()["content"] == [{"type": "text", "text": "from the cloud"}]
        hosted.body = b'{"object": "list", "data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}'
        answer = await ask(http, {"model": "hosted", "input": "x"}, EMBEDDINGS)
        assert (answer.status_code, answer.headers["x-tally-cost"]) == (200, "14")
        assert hosted.paths == ["/v1/chat/completions", "/v1/embeddings"]


async def test_answers_of_upstreams_are_cached(
    fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, hosted: HostedApi, tmp_path: Path
) -> None:
    """Whole answers are, by the same rules; a request that requires the market never gets one."""
    async with gateway(fake, wallet, replace(cloudy, cache_folder=tmp_path / "cache")) as (http, _):
        cold = HOSTED | {"temperature": 0}
        assert (await ask(http, cold)).headers["x-tally-cache"] == "miss"
        hit = await ask(http, cold)
        assert (hit.headers["x-tally-cache"], hit.headers["x-tally-provider"]) == ("hit", "upstream:cloud")
        assert (hit.content, len(hosted.requests)) == (orjson.dumps(ANSWER), 1)
        assert (await ask(http, cold, market=True)).status_code == 503


async def test_the_list_of_models(fake: FakeMarket, wallet: Signer, cloudy: ClientConfig) -> None:
    """An alias says which of its members are models of upstreams."""
    async with gateway(fake, wallet, cloudy) as (http, _):
        entries = {entry["id"]: entry for entry in (await http.get("/v1/models")).json()["data"]}
        assert (entries["cloudy"]["models"], entries["cloudy"]["upstreams"]) == ([MODEL, MEMBER], [MEMBER])


async def test_a_gateway_whose_key_is_missing_does_not_start(
    fake: FakeMarket, wallet: Signer, cloudy: ClientConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the setting."""
    monkeypatch.delenv("CLOUD_KEY")
    async with Market(fake.url, wallet, cloudy) as market:
        with pytest.raises(BadMessage, match="cloud: expected the API key in the environment variable CLOUD_KEY"):
            build_app(market)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("document", "status", "code"),
    [
        ({"error": {"message": "the worker died", "code": 500}}, 502, "upstream_unavailable"),
        ({"error": {"message": "Rate limit reached"}}, 502, "upstream_unavailable"),
        ({"error": {"message": "n: must be 1", "code": 400}}, 400, 400),
    ],
)
async def test_failures_that_look_like_success(  # noqa: PLR0917 - parameters and fixtures
    document: dict[str, Any],
    status: int,
    code: object,
    streamed: bool,
    fake: FakeMarket,
    wallet: Signer,
    cloudy: ClientConfig,
    hosted: HostedApi,
) -> None:
    """An error with status 200 is no answer: it has its own status, costs nothing, and lets the next model answer."""
    hosted.body, hosted.events = orjson.dumps(document), [event(document)]
    async with gateway(fake, wallet, cloudy) as (http, market):
        answer = await ask(http, HOSTED | {"stream": streamed})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        (line,) = await market._ledger.spending(0, ())
        assert (line.requests, line.failed, line.cost) == (1, 1, 0)
    first = replace(cloudy, aliases=(Alias(name="cloudy", models=(MEMBER, MODEL)),))
    async with gateway(fake, wallet, first) as (http, _):
        assert ("x-tally-provider" in (await ask(http, CLOUDY | {"stream": streamed})).headers) is (status == 502)

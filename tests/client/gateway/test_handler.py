"""The gateway's routes: cached answers, a small model before a larger one, conversations that stay with a provider."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick.client.config import Alias, ApiKey, ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.gateway.response_cache import CachedResponse, ResponseCache
from tallystick.client.sdk.market import Market
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Refusal
from tallystick.protocol.pricing import Usage
from tallystick.protocol.types import Address, Amount, format_amount, parse_job_id
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, CHAT, WORDS, FakeMarket, Session, completion
from tests.client.parties import MODEL, Provider, signer

TEXT = "".join(WORDS)
COLD = BODY | {"temperature": 0}


@asynccontextmanager
async def gateway(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[tuple[httpx.AsyncClient, Market]]:
    """A gateway with these settings, and its market."""
    async with (
        Market(fake.url, wallet, config) as market,
        serving(build_app(market), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http,
    ):
        yield http, market


async def _ask(http: httpx.AsyncClient, body: dict[str, Any], key: str = "", **options: Any) -> httpx.Response:
    headers = {"x-tally-options": json.dumps(options)} if options else {}
    if key:
        headers["authorization"] = f"Bearer {key}"
    answer = await http.post(CHAT, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


# The cache


@pytest.fixture
def caching(config: ClientConfig, tmp_path: Path) -> ClientConfig:
    """Settings with a response cache."""
    return replace(config, cache_folder=tmp_path / "cache")


async def test_a_repeated_request_is_cached(fake: FakeMarket, wallet: Signer, caching: ClientConfig) -> None:
    """With temperature 0, a repeated request is answered from the cache, byte for byte, at no cost; the ledger counts it."""
    async with gateway(fake, wallet, caching) as (http, market):
        for body in (COLD, COLD | {"stream": True}):
            first = await _ask(http, body)
            assert first.headers["x-tally-cache"] == "miss"
            second = await _ask(http, dict(reversed(body.items())))
            assert (second.headers["x-tally-cache"], second.headers["x-tally-cost"]) == ("hit", "0")
            assert second.headers["x-tally-job"] == first.headers["x-tally-job"]
            assert (second.content, second.headers["content-type"]) == (first.content, first.headers["content-type"])
        assert len(fake.sessions) == 2
        (spent,) = await market._ledger.spending(0, ())
        assert (spent.requests, spent.hits, spent.saved) == (2, 2, spent.cost)
    async with gateway(fake, wallet, caching) as (http, _):  # another process
        assert (await _ask(http, COLD)).headers["x-tally-cache"] == "hit"


async def test_what_is_not_cached(fake: FakeMarket, wallet: Signer, caching: ClientConfig) -> None:
    """Not cached: other temperatures, opt-outs, keyed requests, other requirements, other callers, errors."""
    keys = (ApiKey(label="ann", secret="ann-0123456789abcdef"), ApiKey(label="bob", secret="bob-0123456789abcdef"))
    async with gateway(fake, wallet, replace(caching, api_keys=keys)) as (http, _):

        async def hits(body: dict[str, Any], key: str = keys[0].value, **options: Any) -> list[str | None]:
            return [(await _ask(http, body, key, **options)).headers.get("x-tally-cache") for _ in range(2)]

        assert await hits(BODY) == [None, None]
        assert await hits(BODY, cache=True) == ["miss", "hit"]
        assert await hits(COLD) == ["miss", "hit"]
        assert await hits(COLD, cache=False) == [None, None]
        assert await hits(COLD, keys[1].value) == ["miss", "hit"], "another caller does not see what this one asked"
        assert await hits(COLD, exclude=["0x" + "11" * 20]) == ["miss", "hit"]
        assert await hits(COLD | {"seed": 1}) == ["miss", "hit"]
        headers = {"authorization": f"Bearer {keys[0].value}", "idempotency-key": "k"}
        assert "x-tally-cache" not in (await http.post(CHAT, json=COLD, headers=headers)).headers

        async def fails(session: Session) -> None:
            await session.match()
            await session.answer(200 if session.request.get("stream") else 500)
            await session.cut()

        fake.script = fails
        for _ in range(2):
            assert (await http.post(CHAT, json=COLD | {"seed": 2}, headers=headers | {"idempotency-key": ""})).status_code >= 400


async def test_the_disk_reveals_nothing(fake: FakeMarket, wallet: Signer, caching: ClientConfig) -> None:
    """The disk reveals neither names nor contents; changed files and those of another wallet are ignored."""
    async with gateway(fake, wallet, caching) as (http, _):
        await _ask(http, COLD)
    assert caching.cache_folder is not None
    (file,) = caching.cache_folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert not any(word.encode() in file.read_bytes() for word in ("split", "stick", MODEL))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes((whole[-1] ^ 1,)))
    async with gateway(fake, wallet, caching) as (http, _):
        assert (await _ask(http, COLD)).headers["x-tally-cache"] == "miss"
    async with FakeMarket().serve() as other, gateway(other, signer("other"), caching) as (http, _):
        assert (await _ask(http, COLD)).headers["x-tally-cache"] == "miss"
    assert len(list(caching.cache_folder.iterdir())) == 2


async def test_old_and_large_answers_go(tmp_path: Path, wallet: Signer) -> None:
    """Old answers expire, the oldest are deleted first, and a failing disk does not fail requests."""
    clock = [0.0]
    cache = ResponseCache(tmp_path / "c", 3_000, 60, wallet, lambda: clock[0])
    cached = CachedResponse("application/json", b"x" * 1_000, "ab", Address("0x" + "11" * 20), "m", Amount(3), "0x00")
    demand = Demand("m")
    bodies = [json.dumps({"model": "m", "temperature": 0, "n": n}).encode() for n in range(4)]
    names = [cache.name(CHAT, [body], demand, "", requested=None) for body in bodies]
    assert len(set(names)) == 4
    for name in names:
        assert name is not None
        await cache.put(name, cached)
    assert [bool(await cache.get(str(name))) for name in names] == [False, False, True, True]
    (tmp_path / "c" / str(names[3])).touch()
    assert await cache.get(str(names[3])) == cached
    clock[0] = (tmp_path / "c" / str(names[3])).stat().st_mtime + 61
    assert await cache.get(str(names[3])) is None
    long = b'{"model": "m", "temperature": 0, "seed": 1180591620717411303424}'
    for body in (b"{", b"[]", b'{"model": "m", "temperature": 0.1}', b'{"temperature": 0}', long):
        assert cache.name(CHAT, [body], demand, "", requested=None) is None
    (tmp_path / "f").write_text("")
    await ResponseCache(tmp_path / "f", 3_000, 60, wallet).put(str(names[0]), cached)


async def test_a_fallbacks_answer_is_cached_as_its_own(wallet: Signer, caching: ClientConfig) -> None:
    """If a model is not for sale, the next one's answer is cached, as its own: the first model answers once it is for sale."""
    key = ApiKey(label="ann", secret="ann-0123456789abcdef", models=("tiny", "big"))
    named = replace(caching, api_keys=(key,), aliases=(Alias(name="any", models=("big", "tiny")),))
    async with FakeMarket(Provider.make("alice", model="tiny")).serve() as fake, gateway(fake, wallet, named) as (http, market):
        first = await _ask(http, COLD | {"model": "any"}, key.value)
        assert (fake.last.request["model"], first.headers["x-tally-cache"]) == ("tiny", "miss")
        for model, options in (("any", {}), ("big", {"fallbacks": ["tiny"]}), ("tiny", {})):
            answer = await _ask(http, COLD | {"model": model}, key.value, **options)
            assert (answer.headers["x-tally-cache"], answer.headers["x-tally-cost"]) == ("hit", "0")
            assert answer.content == first.content
        assert len(fake.submissions) == 1
        fake.providers.append(Provider.make("bob", model="big"))
        market._shortlists.forget()
        for model, options in (("any", {}), ("big", {})):
            answer = await _ask(http, COLD | {"model": model}, key.value, **options)
            assert (fake.last.request["model"], answer.headers["x-tally-cache"]) == ("big", "miss")
            assert (await _ask(http, COLD | {"model": model}, key.value, **options)).headers["x-tally-cache"] == "hit"


async def test_streams_of_fallbacks_are_cached(wallet: Signer, caching: ClientConfig) -> None:
    """A stream of the first model that is for sale is cached too, past several that are not."""
    named = replace(caching, aliases=(Alias(name="any", models=("none", "big", "tiny")),))
    async with FakeMarket(Provider.make("alice", model="tiny")).serve() as fake, gateway(fake, wallet, named) as (http, _):
        answers = [await _ask(http, COLD | {"model": "any", "stream": True}) for _ in range(2)]
        assert [answer.headers["x-tally-cache"] for answer in answers] == ["miss", "hit"]
        assert answers[0].content == answers[1].content


async def test_deep_json(fake: FakeMarket, wallet: Signer, caching: ClientConfig) -> None:
    """JSON that is nested too deeply to be read is refused with a message, not with a crash."""
    deep = b"[" * 100_000 + b"]" * 100_000
    named = replace(caching, aliases=(Alias(name="any", models=(MODEL,)),))
    async with gateway(fake, wallet, named) as (http, _):
        for model in (MODEL, "any"):
            answer = await http.post(CHAT, content=b'{"model":"%s","messages":%s}' % (model.encode(), deep))
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_message")


# Small models first


async def test_a_rejected_answer_goes_to_the_larger_model(wallet: Signer, config: ClientConfig) -> None:
    """Both answers are paid and reported; if the larger model is not available, the small one's answer is sent."""
    small, large = Provider.make("alice", model="small"), Provider.make("bob", model="large")
    fake = FakeMarket(small, large)
    models_asked: list[str] = []

    async def script(session: Session) -> None:
        await session.match()
        models_asked.append(session.request["model"])
        await session.answer()
        await session.chunk(completion("" if models_asked[-1] == "small" else "better"), last=True)
        await session.finish()

    fake.script = script
    rules = replace(config, aliases=(Alias(name="thrifty", models=("small", "large"), rule="small-model-first"),))
    async with fake.serve(), gateway(fake, wallet, rules) as (http, market):
        answer = await _ask(http, BODY | {"model": "thrifty"})
        assert models_asked == ["small", "large"]
        assert answer.json()["choices"][0]["message"]["content"] == "better"
        model, job, cost = answer.headers["x-tally-escalated"].split("; ")
        assert (model, cost, answer.headers["x-tally-cost"]) == ("small", "cost=3", "6")
        known = await market.find(parse_job_id(job.removeprefix("job=")))
        assert known is not None
        models_asked.clear()
        await _ask(http, BODY | {"model": "thrifty", "tools": [{"type": "function"}]})
        assert models_asked == ["large"]
        models_asked.clear()
        fake.asks = lambda: [{"ask": small.ask.to_json(), "free": 1}]
        market._shortlists.forget()
        answer = await _ask(http, BODY | {"model": "thrifty"})
        assert (models_asked, "x-tally-escalated" in answer.headers) == (["small"], False)


async def test_max_cost_is_for_all_attempts(wallet: Signer, config: ClientConfig) -> None:
    """A rejected answer's cost is deducted from max_cost; if that leaves too little, the rejected answer is sent."""
    fake = FakeMarket(Provider.make("alice", model="small"), Provider.make("bob", model="large"))

    async def script(session: Session) -> None:
        await session.match()
        await session.answer()
        await session.chunk(completion(""), last=True)
        await session.finish()

    fake.script = script
    rules = replace(config, aliases=(Alias(name="thrifty", models=("small", "large"), rule="small-model-first"),))
    async with fake.serve(), gateway(fake, wallet, rules) as (http, _):
        await _ask(http, BODY | {"model": "thrifty"})
        cap = max(candidate.terms.max_cost for submission in fake.submissions for candidate in submission.candidates)
        assert len(fake.submissions) == 2
        answer = await _ask(http, BODY | {"model": "thrifty"}, max_cost=format_amount(Amount(cap + 1)))
        assert (len(fake.submissions), answer.headers["x-tally-cost"]) == (3, "3")


# Incomplete ledgers


async def test_a_lost_ledger_fails_no_request(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """If a provider refuses because this ledger lacks receipts, they are recovered and the request is repeated."""

    async def strict(session: Session) -> None:
        try:
            await session.match()
        except Refusal as refusal:
            await session.fail(refusal)
            return
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish(Usage(30, 0, 60))

    fake.script, fake.forgets = strict, True
    assert config.ledger_file is not None
    for number in range(3):
        async with gateway(fake, wallet, replace(config, ledger_file=config.ledger_file.with_name("old.db"))) as (http, _):
            await _ask(http, BODY | {"max_tokens": 100 + number})
    async with gateway(fake, wallet, config) as (http, market):
        market._reconciler.recovery.asked_at[fake.providers[0].address] = float("-inf")
        fake.forgets = False
        before = len(fake.sessions)
        await _ask(http, BODY)
        assert len(fake.sessions) == before + 2, "refused, learnt, asked again"


# Conversations


async def test_a_conversation_stays_with_its_provider(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> None:
    """A conversation stays with its provider unless another is cheaper; an explicit order of providers is kept."""
    seen: list[tuple[bool, str]] = []

    def script(index: int) -> Any:
        async def play(session: Session) -> None:
            submission = session.submission
            held = submission.hints is not None and submission.hints.holder is not None
            seen.append((submission.ranked or held, submission.candidates[0].order.message.provider))
            if index:
                session.provider = fake.providers[index]
            await honest_at(session, index)

        return play

    async def honest_at(session: Session, index: int) -> None:
        await session.match(index)
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish()

    alice, bob = (provider.address for provider in fake.providers)
    say = [{"role": "system", "content": "s"}, {"role": "user", "content": "one"}]
    more = [*say, {"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]
    async with gateway(fake, wallet, config) as (http, _):
        fake.script = script(1)
        await _ask(http, BODY | {"messages": say})
        assert seen.pop() == (False, alice)
        fake.script = script(0)
        await _ask(http, BODY | {"messages": more})
        assert seen.pop() == (True, bob), "bob has its beginning in his cache"
        await _ask(http, BODY | {"messages": [{"role": "user", "content": "other"}]})
        assert seen.pop() == (False, alice)
        fake.script = script(1)
        await _ask(http, BODY, affinity="mine")
        fake.script = script(0)
        seen.clear()
        await _ask(http, BODY | {"messages": more}, affinity="mine")
        assert seen.pop() == (True, bob)
        await _ask(http, BODY | {"messages": more}, affinity="yours")
        assert seen.pop() == (False, alice)
        await _ask(http, BODY | {"messages": more}, affinity="mine", prefer=[alice])
        assert seen.pop() == (True, alice)

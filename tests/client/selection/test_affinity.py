"""Affinity: which provider gets the next turn of a conversation, across processes, restarts and long lists of providers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.gateway.app import build_app
from tallystick.client.sdk.market import Market
from tallystick.client.selection.affinity import Preference, ranking_hints
from tallystick.protocol.criteria import Demand
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.messages import Outcome
from tallystick.protocol.pricing import Usage
from tallystick.protocol.ranking_hints import RankingHints
from tallystick.protocol.requirements import NO_REQUIREMENTS, Requirements
from tallystick.protocol.routes import CHAT, MESSAGES, RESPONSES
from tallystick.protocol.types import Address
from tallystick.runtime.serving import serving
from tests.client.fake_coordinator import BODY, FakeMarket, Session, completion
from tests.client.parties import MODEL, Provider, signer

FIRST = [{"role": "user", "content": "What is a tally?"}]
SECOND = [*FIRST, {"role": "assistant", "content": "A stick."}, {"role": "user", "content": "Since when?"}]
SYSTEM = {"role": "system", "content": "You keep tallies. " * 100}


@asynccontextmanager
async def market_of(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[Market]:
    """One process of a wallet."""
    async with Market(fake.url, wallet, config) as market:
        yield market


class Answering:
    """Lets one provider answer, and remembers whom the client wanted first."""

    def __init__(self, fake: FakeMarket) -> None:
        self.fake = fake
        self.wanted: list[Address] = []
        self.holders: list[Address | None] = []
        self.by: Address | None = None
        """None: the first candidate."""
        self.usage = Usage(10, 0, 5)
        fake.script = self

    async def __call__(self, session: Session) -> None:
        candidates = [candidate.order.message.provider for candidate in session.submission.candidates]
        self.wanted.append(candidates[0])
        hints = session.submission.hints
        self.holders.append(None if hints is None else hints.holder)
        await session.match(0 if self.by is None else candidates.index(self.by))
        await session.answer()
        await session.chunk(completion("x"), last=True)
        await session.finish(self.usage)

    async def ask(self, market: Market, messages: list[dict[str, Any]], **options: Any) -> Address:
        """Runs a job, and returns the provider that the client wanted first."""
        job = await market.submit(CHAT, BODY | {"messages": messages}, **options)
        await job.result()
        return self.wanted[-1]


@pytest.fixture
def answering(fake: FakeMarket) -> Answering:
    """The script of the fake market."""
    return Answering(fake)


async def test_processes_of_a_wallet_share_what_they_know(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """The second turn goes to the provider of the first one through another process, and after a restart of both."""
    alice, bob = (provider.address for provider in fake.providers)
    async with market_of(fake, wallet, config) as one, market_of(fake, wallet, config) as two:
        answering.by = bob
        assert await answering.ask(one, FIRST) == alice
        answering.by = None
        assert await answering.ask(two, SECOND) == bob
        assert answering.holders[-1] == bob, "the coordinator is told who keeps the conversation"
    async with market_of(fake, wallet, config) as again:
        assert await answering.ask(again, SECOND) == bob
        assert await answering.ask(again, [{"role": "user", "content": "Another question"}]) == alice
        assert answering.holders[-1] is None


async def test_another_wallet_recognises_nothing(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """Tags depend on the wallet's key, also if two wallets use one folder."""
    alice, bob = (provider.address for provider in fake.providers)
    async with market_of(fake, wallet, config) as market:
        answering.by = bob
        await answering.ask(market, FIRST)
    answering.by = None
    elsewhere = replace(config, ledger_file=config.ledger_path(wallet.address).with_name("other.db"))
    config.affinity_path(wallet.address).rename(elsewhere.affinity_path(wallet.address))
    async with market_of(fake, signer("another"), elsewhere) as market:
        assert await answering.ask(market, SECOND) == alice


async def test_the_longest_prefix_decides(fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering) -> None:
    """A conversation that moved stays where it went, and is not asked for where it was before."""
    alice, bob = (provider.address for provider in fake.providers)
    async with market_of(fake, wallet, config) as market:
        answering.by = bob
        await answering.ask(market, [SYSTEM, *FIRST])
        answering.by = alice
        assert await answering.ask(market, [SYSTEM, *SECOND]) == bob
        answering.by = None
        third = [SYSTEM, *SECOND, {"role": "assistant", "content": "Long."}, {"role": "user", "content": "Where?"}]
        assert await answering.ask(market, third) == alice
        assert await answering.ask(market, [SYSTEM, {"role": "user", "content": "new"}]) == alice, "both hold the system prompt"


async def test_of_the_holders_of_a_system_prompt_the_best_ask_wins(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """Where several hold what many conversations share, price and load decide among them."""
    alice, bob = (provider.address for provider in fake.providers)
    async with market_of(fake, wallet, config) as market:
        for provider in (alice, bob):
            answering.by = provider
            await answering.ask(market, [SYSTEM, {"role": "user", "content": provider}])
        answering.by = None
        assert await answering.ask(market, [SYSTEM, {"role": "user", "content": "new"}]) == alice


async def test_a_holder_that_costs_more_is_left(wallet: Signer, config: ClientConfig) -> None:
    """Unless it bills so much as cached that it costs less, or hardly more."""
    cheap = Provider.make("cheap")
    dear = Provider.make("dear", input_price=180_000, cached_input_price=0)
    async with FakeMarket(cheap, dear).serve() as fake, market_of(fake, wallet, config) as market:
        answering = Answering(fake)
        answering.by, answering.usage = dear.address, Usage(10, 2, 5)
        await answering.ask(market, FIRST)
        answering.usage = Usage(10, 5, 5)
        assert await answering.ask(market, SECOND) == cheap.address
        third = [*SECOND, {"role": "assistant", "content": "Long."}, {"role": "user", "content": "Where?"}]
        assert await answering.ask(market, third) == dear.address


async def test_a_holder_that_is_not_listed_is_looked_up(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """A shortlist has a few of many providers at one price. One query finds the holder's ask, and it is kept like a list."""
    alice, bob = (provider.address for provider in fake.providers)
    everyone = fake.asks
    async with market_of(fake, wallet, replace(config, shortlist_seconds=600)) as market:
        answering.by = bob
        await answering.ask(market, FIRST)
        answering.by = None

        def without_bob() -> list[Any]:
            pinned = fake.shortlists[-1].get("providers", ())
            return [entry for entry in everyone() if bob in pinned or entry["ask"]["message"]["provider"] != bob]

        fake.asks = without_bob
        market._shortlists.forget()
        assert await answering.ask(market, SECOND) == bob
        assert [body.get("providers") for body in fake.shortlists] == [None, None, [bob]]
        assert await answering.ask(market, SECOND) == bob
        assert len(fake.shortlists) == 3
        assert await answering.ask(market, SECOND, exclude=[bob]) == alice
        assert await answering.ask(market, SECOND, pin=[alice]) == alice
        assert all("providers" not in body or body["providers"] == [alice] for body in fake.shortlists[3:])


async def test_a_holder_that_is_gone_is_forgotten(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """It is asked for once, and not with every turn."""
    alice, bob = fake.providers
    async with market_of(fake, wallet, replace(config, shortlist_seconds=0)) as market:
        answering.by = bob.address
        await answering.ask(market, FIRST)
        answering.by = None
        fake.providers.remove(bob)
        assert await answering.ask(market, SECOND) == alice.address
        asked = len(fake.shortlists)
        assert await answering.ask(market, SECOND) == alice.address
        assert len(fake.shortlists) == asked + 1


async def test_a_provider_that_fails_is_forgotten(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """The same request, sent again, is not kept at the provider that broke off its answer."""
    alice, bob = (provider.address for provider in fake.providers)

    async def break_off(session: Session) -> None:
        await session.match([candidate.order.message.provider for candidate in session.submission.candidates].index(bob))
        await session.answer()
        await session.chunk(b"{")
        await session.finish(Usage(10, 0, 1), Outcome.PROVIDER_ERROR)

    async with market_of(fake, wallet, config) as market:
        fake.script = break_off
        with pytest.raises(Unavailable) as caught:
            await (await market.submit(CHAT, BODY | {"messages": FIRST})).result()
        assert caught.value.code is not Code.NO_PROVIDER
        fake.script = answering
        assert await answering.ask(market, FIRST) == alice


async def test_the_next_turn_need_not_wait_for_the_receipt(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering
) -> None:
    """A client may send it as soon as it has the text; the provider holds the beginning since it read it."""
    bob = fake.providers[1].address

    async def never_finish(session: Session) -> None:
        await session.match(1)
        await session.answer()
        await session.chunk(b"{")
        await session.hang()

    async with market_of(fake, wallet, config) as market:
        fake.script = never_finish
        async with await market.submit(CHAT, BODY | {"messages": FIRST}) as job:
            await anext(aiter(job))
            fake.script = answering
            assert await answering.ask(market, SECOND) == bob


async def _turns_of(http: httpx.AsyncClient, dialect: str, question: str, before: dict[str, Any] | None) -> dict[str, Any]:
    """Sends a question, as the next turn after the answer `before`, as clients of this API do. Returns the answer."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 50}
    if dialect == RESPONSES:
        body = {"model": MODEL, "input": question}
        if before is not None:
            body["previous_response_id"] = before["id"]
    else:
        body["messages"] = [] if before is None else [*before["sent"], {"role": "assistant", "content": before["content"]}]
        body["messages"] += [{"role": "user", "content": question}]
    answered = await http.post(dialect, json=body)
    assert answered.status_code == 200, answered.text
    answer: dict[str, Any] = answered.json()
    content = answer["content"] if dialect == MESSAGES else "x"
    return answer | {"sent": body.get("messages"), "content": content}


@pytest.mark.parametrize("dialect", [CHAT, MESSAGES, RESPONSES])
async def test_every_dialect_of_the_gateway_keeps_its_provider(
    fake: FakeMarket, wallet: Signer, config: ClientConfig, answering: Answering, dialect: str
) -> None:
    """Also one that the gateway translates, and a response that names the one before it, each turn through another gateway."""
    bob, before = fake.providers[1].address, None
    for number, question in enumerate(("one", "two", "three")):
        async with (
            market_of(fake, wallet, config) as market,
            serving(build_app(market), "127.0.0.1", 0) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as http,
        ):
            answering.by = None if number else bob
            before = await _turns_of(http, dialect, question, before)
            assert number == 0 or answering.wanted[-1] == bob


def test_hints_say_what_the_client_requires() -> None:
    """As the demand has it, beside a holder too; requirements that are too long for hints are left out, and nothing else is."""
    holder = Preference(Address("0x" + "11" * 20), 50, shared=False)
    needs = Requirements(features=("tools",), context_tokens=900)
    for require in (NO_REQUIREMENTS, Requirements(region=("eu",), precision=("bf16",))):
        hints = ranking_hints(Demand("m", require=require, needs=needs, likely_tokens=400), holder)
        assert (hints.require, hints.needs, hints.holder, hints.cached_tokens) == (require, ("tools",), holder.provider, 200)
        assert ranking_hints(Demand("m", require=require), None) == RankingHints(require=require)
    long = Requirements(region=tuple(f"region-{number}" for number in range(30)))
    hints = ranking_hints(Demand("m", require=long, needs=needs, likely_tokens=400), holder)
    assert hints == RankingHints(400, holder=holder.provider, cached_tokens=200)

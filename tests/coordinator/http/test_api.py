"""The control plane over real HTTP: every route, its documentation, and errors in one shape with the right status."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import httpx
import pytest

from coordinator.domain.resource_bounds import PAGE_BYTES
from coordinator.http.api import TAB_RECEIPTS
from coordinator.http.pages import api_page, home_page
from coordinator.jobs.accounts import SETTLED_SECONDS, SettledAmounts
from coordinator.ports import Cursor, Settlement
from tallystick import __version__
from tallystick.protocol.access import ACCESS_SECONDS, dump_access
from tallystick.protocol.criteria import Reason
from tallystick.protocol.eip712 import Signed, Signer, read_signed
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.link import MAX_ASK_BYTES, Capacity, LateReceipt
from tallystick.protocol.messages import Access, Ask, Inquiry, Outcome, Receipt, Spec
from tallystick.protocol.payer_rules import PayerRule
from tallystick.protocol.tab import check_receipt
from tallystick.protocol.types import ZERO_ADDRESS, Amount
from tallystick.protocol.wire import Kind
from tests.coordinator.harness import (
    COORDINATOR,
    DOMAIN,
    MODEL,
    PAYER,
    START,
    Client,
    World,
    make_ask,
    make_submission,
    person,
    quiet,
    unchecked,
)
from tests.coordinator.live_server import TOKEN, LinkNode, Served

UNKNOWN = "00" * 16


def access(signer: Signer = PAYER, **changes: Any) -> dict[str, str]:
    """Returns the header that authenticates the caller; changes are signed too."""
    values: dict[str, Any] = {"account": signer.address, "coordinator": COORDINATOR.address, "issued_at": START} | changes
    signed = signer.sign_digest(Access(**values).digest(DOMAIN))
    return {"authorization": dump_access(Signed(Access(**values), signed))}


DEMAND: dict[str, Any] = {"model": MODEL, "payer": PAYER.address}


def _error(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "fault", "retry"}
    assert error["message"]
    return response.status_code, error["code"]


# Public information


async def test_info(at: Served) -> None:
    """Anyone can read the coordinator's identity and what every signature must bind."""
    assert (await at.http.get("/v1/info")).json() == {
        "name": "test",
        "version": "0",
        "coordinator": COORDINATOR.address,
        "chainId": DOMAIN.chain_id,
        "contract": DOMAIN.contract,
        "token": TOKEN,
        "tokenDecimals": 6,
        "feeBps": 0,
        "protocol": 2,
        "block": 0,
        "rpc": None,
        "replicas": [],
    }


async def test_models(at: Served) -> None:
    """Models are listed with the number of providers, how many are free, and the lowest prices as strings of digits."""
    declared = Spec(features=("tools", "-vision", "-/v1/completions", "/v1/rerank", "x" * 65))
    at.world.node("ann", input_price=5, output_price=1 << 63, spec=declared)
    other = Spec(features=("-/v1/completions", "-/v1/embeddings", "logprobs"))
    busy = at.world.node("bob", input_price=7, context_tokens=10_000, max_output_tokens=2_000, spec=other)
    at.world.market.matchmaker.set_capacity(busy.address, Capacity(0, 1))
    (model,) = (await at.http.get("/v1/models")).json()["data"]
    assert model == {
        "id": MODEL,
        "providers": 2,
        "live": 1,
        "inputPrice": "5",
        "cachedInputPrice": "500000",
        "outputPrice": "2000000",
        "contextTokens": 10_000,
        "maxOutputTokens": 2_000,
        "tokensPerSecond": 0,
        "firstTokenMs": 0,
        "routes": ["/v1/chat/completions", "/v1/embeddings", "/v1/rerank"],
        "features": ["logprobs", "tools"],
        "waiting": 0,
        "integrity": 1.7,
        "audits": 0,
        "availability": 25,
    }
    at.world.market.matchmaker.set_capacity(busy.address, Capacity(1, 1, 70, 250))
    (model,) = (await at.http.get("/v1/models")).json()["data"]
    assert (model["live"], model["tokensPerSecond"], model["firstTokenMs"]) == (2, 70, 250)


async def test_models_tell_how_many_jobs_wait(at: Served) -> None:
    """The jobs that wait for a slot are counted by model, and the free slots of engines once, however many asks share them."""
    full, other = at.world.node("ann", slots=1), at.world.node("bob", slots=3, model="other")
    at.world.market.matchmaker.replace_asks(
        other.address, (*other.asks, make_ask(other.signer, model="third")), Capacity(3, 3), groups=(0, 0)
    )
    for _ in range(3):
        await at.world.place(full)
    models = (await at.http.get("/v1/models")).json()["data"]
    assert {model["id"]: model["waiting"] for model in models} == {MODEL: 2, "other": 0, "third": 0}
    assert "tallystick_slots_free 3.0" in (await at.http.get("/metrics")).text


async def test_asks(at: Served) -> None:
    """The asks for a model are listed as they were signed, cheapest first; an unknown model has none."""
    expensive, cheap = at.world.node("ann", output_price=9_000_000), at.world.node("bob")
    listed = (await at.http.get("/v1/asks", params={"model": MODEL})).json()["asks"]
    assert [read_signed(Ask, each["ask"]) for each in listed] == [unchecked(cheap.ask), unchecked(expensive.ask)]
    assert [each["free"] for each in listed] == [4, 4]
    assert (await at.http.get("/v1/asks", params={"model": "unknown"})).json() == {"asks": [], "next": None}


async def _pages(at: Served, path: str, name: str, **params: Any) -> list[list[Any]]:
    """Returns all pages of a list."""
    pages, after = list[list[Any]](), ""
    while True:
        response = (await at.http.get(path, params=params | {"after": after})).json()
        pages.append(response[name])
        if response["next"] is None:
            return pages
        after = response["next"]


async def test_asks_come_in_pages(at: Served) -> None:
    """Pages of any size list every ask of a model once and in order, those of one provider at one price too."""
    ann, bob = person("ann"), person("bob")
    place = at.world.market.matchmaker.replace_asks
    place(ann.address, [make_ask(ann, seq=n, output_price=1 + n // 40) for n in range(120)], Capacity(1, 1))
    place(bob.address, [make_ask(bob, seq=n, output_price=2) for n in range(5)], Capacity(1, 1))
    for limit in (1, 7, 100, 256):
        pages = await _pages(at, "/v1/asks", "asks", model=MODEL, limit=limit)
        body = [each["ask"]["message"] for page in pages for each in page]
        assert len({(ask["provider"], ask["seq"]) for ask in body}) == len(body) == 125
        assert [int(ask["outputPrice"]) for ask in body] == sorted(int(ask["outputPrice"]) for ask in body)
        assert all(len(page) <= limit for page in pages)
    assert len((await at.http.get("/v1/asks", params={"model": MODEL})).json()["asks"]) == 100


async def test_a_page_goes_on_where_the_former_ended(at: Served) -> None:
    """Asks that come and go between two pages neither hide nor repeat others."""
    nodes = [at.world.node(str(n), output_price=2_000_000 + n) for n in range(6)]
    first = (await at.http.get("/v1/asks", params={"model": MODEL, "limit": 2})).json()
    at.world.market.matchmaker.drop(nodes[1].address)
    at.world.node("cheap", output_price=1)
    rest = (await at.http.get("/v1/asks", params={"model": MODEL, "after": first["next"]})).json()
    assert [each["ask"]["message"]["provider"] for each in rest["asks"]] == [node.address for node in nodes[2:]]
    for after in ("x", "1-0x12-00", "-1-" + first["next"], "9" * 400):
        assert _error(await at.http.get("/v1/asks", params={"model": MODEL, "after": after})) == (400, "bad_message")
    for limit in ("0", "257", "-1", "9" * 400, "1e3", "\u0663", "x"):
        assert _error(await at.http.get("/v1/asks", params={"model": MODEL, "limit": limit})) == (400, "bad_message")
        assert _error(await at.http.get("/v1/models", params={"limit": limit})) == (400, "bad_message")


async def test_models_come_in_pages(at: Served) -> None:
    """Every model is listed once, by name; a name that is too long to be requested is not listed."""
    key = person("ann")
    names = sorted(f"model/{n}" for n in range(30))
    asks = [make_ask(key, model=name) for name in [*names, "x" * 1_025]]
    at.world.market.matchmaker.replace_asks(key.address, asks, Capacity(1, 1))
    for limit in (1, 7, 100):
        pages = await _pages(at, "/v1/models", "data", limit=limit)
        assert [model["id"] for page in pages for model in page] == names


async def test_fat_asks_do_not_make_a_list_too_long(at: Served) -> None:
    """Asks of the largest size keep every page far below what clients read, and none hides another."""
    for number in range(120):
        key = person(f"fat {number}")
        spec = Spec(features=tuple("\u0001" * 30 for _ in range(60)), region="r" * 4_000)
        at.world.market.matchmaker.replace_asks(key.address, [make_ask(key, spec=spec)], Capacity(1, 1))
    after, body = "", 0
    while after is not None:
        response = await at.http.get("/v1/asks", params={"model": MODEL, "limit": 256, "after": after})
        assert len(response.content) < PAGE_BYTES + 2 * MAX_ASK_BYTES
        body, after = body + len(response.json()["asks"]), response.json()["next"]
    assert body == 120
    assert len((await at.http.post("/v1/explain", json=DEMAND)).content) < 200 * MAX_ASK_BYTES + (1 << 16)


async def test_a_shortlist(at: Served) -> None:
    """A shortlist holds what the demand allows: prices, pins, exclusions and length; addresses in any case."""
    nodes = [at.world.node(str(n), output_price=2_000_000 + 100_000 * n) for n in range(6)]
    listed = [node.address for node in nodes]

    async def ask(**demand: Any) -> list[str]:
        response = await at.http.post("/v1/shortlist", json=DEMAND | demand)
        return [each["ask"]["message"]["provider"] for each in response.json()["asks"]]

    assert await ask() == listed[:4]
    assert await ask(limit=2) == listed[:2]
    assert await ask(exclude=[listed[0]]) == listed[1:5]
    assert await ask(providers=[listed[5].upper().replace("0X", "0x")]) == [listed[5]]
    assert await ask(maxOutputPrice=2_100_000) == listed[:2]
    assert await ask(maxInputPrice=1_000_000, maxOutputPrice="2000000") == listed[:1]


async def test_a_price_for_some_payers(at: Served) -> None:
    """The cheaper ask of a provider is offered to a payer that settled enough with it, the other ask to everybody else; whom a
    price is for is told, and the model's lowest price is one for everybody.
    """
    known = PayerRule(settled=Amount(10)).to_features()
    ann = at.world.node("ann", output_price=2_000_000)
    cheap = make_ask(ann.signer, output_price=1_000_000, spec=Spec(features=known), seq=9)
    at.world.market.matchmaker.replace_asks(ann.address, [*ann.asks, cheap], Capacity(4, 4))

    async def offered(payer: str) -> list[tuple[str, str | None]]:
        asked = DEMAND | {"payer": payer}
        listed = (await at.http.post("/v1/shortlist", json=asked)).json()["asks"]
        why = {}
        for entry in (await at.http.post("/v1/explain", json=asked)).json()["asks"]:
            why[entry["ask"]["signature"]] = entry["why"]
        return [(entry["ask"]["message"]["outputPrice"], why[cheap.to_json()["signature"]]) for entry in listed]

    others = [("2000000", Reason.PAYER.value)]
    assert await offered(PAYER.address) == await offered(ZERO_ADDRESS) == others
    for settled, price in ((9, others), (10, [("1000000", None)])):
        paid = Settlement(PAYER.address, ann.address, Amount(settled), "0x", 1)
        await at.store.put_settlements([paid], Cursor(1))
        at.world.clock.seconds += SETTLED_SECONDS
        assert await offered(PAYER.address) == price
    assert (await at.http.get("/v1/models")).json()["data"][0]["outputPrice"] == "2000000"
    ratings = (await at.http.get(f"/v1/providers/{ann.address}/why")).json()["ratings"]
    assert {rating["outputPrice"]: rating["audience"] for rating in ratings} == {
        "2000000": "",
        "1000000": "payers that settled 0.00001 dollars with this provider",
    }


async def test_prices_for_payers_while_the_database_is_away(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then what a payer settled. It is offered what is for everybody, and what lists its wallet."""

    async def away(_: object, __: object) -> None:
        raise Unavailable(Code.DATABASE_UNAVAILABLE, "away")

    monkeypatch.setattr(SettledAmounts, "of", away)
    ann, bob = at.world.node("ann", output_price=2_000_000), at.world.node("bob", output_price=3_000_000)
    for node, rule in ((ann, PayerRule(settled=Amount(1))), (bob, PayerRule(wallets=frozenset({PAYER.address})))):
        cheap = make_ask(
            node.signer, output_price=node.ask.message.output_price // 2, spec=Spec(features=rule.to_features()), seq=9
        )
        at.world.market.matchmaker.replace_asks(node.address, [*node.asks, cheap], Capacity(4, 4))
    listed = (await at.http.post("/v1/shortlist", json=DEMAND)).json()["asks"]
    assert {entry["ask"]["message"]["outputPrice"] for entry in listed} == {"2000000", "1500000"}


async def test_a_model_that_was_for_sale_a_moment_ago(at: Served) -> None:
    """A model that was withdrawn recently is unavailable, since it may come back; after a while it is unknown."""
    ann = at.world.node("ann")
    matchmaker = at.world.market.matchmaker
    for stays in (True, False):
        matchmaker.replace_asks(ann.address, [ann.ask])
        if stays:
            matchmaker.replace_asks(ann.address, [])
        else:
            matchmaker.drop(ann.address)
        response = await at.http.post("/v1/shortlist", json=DEMAND)
        assert _error(response) == (503, "no_provider")
        assert response.json()["error"]["retry"]
        assert "withdrew it 0 s ago" in response.json()["error"]["message"]
        at.world.clock.seconds += 300
        assert _error(await at.http.post("/v1/shortlist", json=DEMAND)) == (404, "unknown_model")
    assert _error(await at.http.post("/v1/shortlist", json=DEMAND | {"model": "never"})) == (404, "unknown_model")


async def test_a_stake_as_a_requirement(at: Served) -> None:
    """A provider with too small a stake is left out with that reason; the chain is read for each request with a stake."""
    backed, bare = at.world.node("ann", output_price=9_000_000), at.world.node("bob")
    at.world.funds.stakes[backed.address] = Amount(5_000_000)

    async def listed(stake: int) -> list[str]:
        response = await at.http.post("/v1/shortlist", json=DEMAND | {"minStake": stake})
        return [each["ask"]["message"]["provider"] for each in response.json().get("asks", ())]

    assert await listed(0) == [bare.address, backed.address]
    assert await listed(5_000_000) == [backed.address]
    assert await listed(5_000_001) == []
    body = (await at.http.post("/v1/explain", json=DEMAND | {"minStake": 1})).json()["asks"]
    assert [entry["why"] for entry in body] == [Reason.STAKE.value, None]
    at.world.funds.stakes[backed.address] = Amount(0)
    assert await listed(1) == []


async def test_health_and_metrics(at: Served) -> None:
    """Health and metrics count connected nodes, listed asks and live jobs."""
    node = await LinkNode.join(at, person("ann"))
    at.world.read(await at.world.market.place_order(make_submission(node.asks[0])))
    await node.take_job()
    assert (await at.http.get("/healthz")).json() == {"status": "ok", "nodes": 1, "asks": 1, "jobs": 1}
    metrics = await at.http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    for line in (
        "tallystick_nodes_connected 1.0",
        "tallystick_asks_listed 1.0",
        "tallystick_jobs_live 1.0",
        "tallystick_jobs_waiting 0.0",
        "tallystick_slots_free 3.0",
    ):
        assert line in metrics.text


async def test_the_docs(at: Served) -> None:
    """/docs shows the API, and /openapi.json describes every route of the control plane."""
    page = await at.http.get("/docs")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for expected in (
        "<code>POST /v1/shortlist</code>",
        '<a href="#ShortlistRequest">',
        '<h2 id="ShortlistRequest">',
        "openapi.json",
    ):
        assert expected in page.text
    for foreign in ("<script", "http://", "https://", "src="):
        assert foreign not in page.text, "the page needs nothing from the network"
    described = (await at.http.get("/openapi.json")).json()
    assert described["info"]["version"] == __version__
    routes = {(path, method): route for path, methods in described["paths"].items() for method, route in methods.items()}
    assert set(routes) == {
        ("/v1/info", "get"),
        ("/v1/account", "get"),
        ("/v1/models", "get"),
        ("/v1/providers/{provider}/why", "get"),
        ("/v1/asks", "get"),
        ("/v1/shortlist", "post"),
        ("/v1/explain", "post"),
        ("/v1/jobs/{job}", "get"),
        ("/v1/jobs/{job}/cancel", "post"),
        ("/v1/jobs/{job}/orders", "post"),
        ("/v1/reports", "post"),
        ("/v1/tabs", "post"),
        ("/healthz", "get"),
        ("/readyz", "get"),
        ("/v1/log/head", "get"),
        ("/v1/log/inclusion", "get"),
        ("/v1/log/consistency", "get"),
        ("/v1/log/proof", "get"),
        ("/v1/log/entries", "get"),
    }
    assert all(route["description"] for route in routes.values())


async def test_what_is_required(at: Served) -> None:
    """A shortlist has the asks that meet the requirements, sorted as requested; `explain` says why the others do not."""
    eu = Spec(region="EU-west", precision="bf16", features=("tools", "logprobs"))
    expensive, cheap = at.world.node("ann", output_price=9_000_000, spec=eu), at.world.node("bob")
    at.world.market.matchmaker.set_capacity(expensive.address, Capacity(1, 1, 90, 100))
    asked = {"model": MODEL, "payer": PAYER.address}

    async def listed(**requirements: Any) -> list[str]:
        response = await at.http.post("/v1/shortlist", json=asked | requirements)
        return [each["ask"]["message"]["provider"] for each in response.json().get("asks", ())]

    assert await listed() == [cheap.address, expensive.address]
    for sort in ("latency", "throughput"):
        assert await listed(sort=sort) == [expensive.address, cheap.address]
        assert await listed(sort=sort, limit=1) == [expensive.address]
    for require in ({"region": ["eu-west"]}, {"precision": ["fp8", "BF16"]}, {"features": ["tools"]}):
        assert await listed(require=require) == [expensive.address]
    assert await listed(require={"region": ["us"]}) == []
    for _ in range(30):
        at.world.market.reputation.record(cheap.address, Outcome.PROVIDER_ERROR)
        at.world.market.reputation.record(expensive.address, Outcome.COMPLETED)
    assert await listed(minReputation=80) == [expensive.address]
    why = (await at.http.post("/v1/explain", json=asked | {"require": {"tier": ["edge"]}, "minReputation": 80})).json()["asks"]
    assert [(entry["why"], entry["firstTokenMs"], entry["reputation"]) for entry in why] == [
        (Reason.TIER.value, 100, 91),
        (Reason.TIER.value, 0, 3),
    ]
    for sort, first in (("price", 100), ("latency", 100)):
        body = (await at.http.post("/v1/explain", json=asked | {"sort": sort})).json()["asks"]
        assert body[0]["firstTokenMs"] == first, "as a shortlist would be sorted"
    assert (await at.http.post("/v1/shortlist", json=asked | {"sort": "beauty"})).status_code == 400
    assert (await at.http.post("/v1/shortlist", json=asked | {"require": {"mood": ["good"]}})).status_code == 400


# Tabs


async def _inquire(at: Served, provider: str, key: Signer = PAYER, **changes: Any) -> httpx.Response:
    asked: dict[str, Any] = {
        "payer": key.address,
        "provider": provider,
        "coordinator": COORDINATOR.address,
        "asked_at": START,
    } | changes
    return await at.http.post("/v1/tabs", json=key.sign(Inquiry(**asked), DOMAIN).to_json())


async def test_a_payer_reads_its_own_tab(at: Served) -> None:
    """A payer reads its own last receipts with their orders, always including the highest ceiling; nobody else reads any."""
    node = at.world.node("ann")
    for number in range(TAB_RECEIPTS + 3):
        ceiling = 9_000_000 if number == 1 else 1_000_000
        client = await at.world.started(node, ceiling=Amount(ceiling))
        node.complete(client.job.id, seq=number + 1, cumulative_cost=Amount(100 * (number + 1)))
        await quiet()
    body = (await _inquire(at, node.address)).json()["receipts"]
    late_receipts = [LateReceipt.from_json(late_receipt) for late_receipt in body]
    assert [late_receipt.receipt.message.seq for late_receipt in late_receipts] == [*range(TAB_RECEIPTS + 3, 3, -1), 2]
    for late_receipt in late_receipts:
        check_receipt(late_receipt.order.verify(DOMAIN), late_receipt.terms, late_receipt.receipt.verify(DOMAIN).message)
    assert (await _inquire(at, node.address, person("stranger"))).json() == {"receipts": []}
    assert (await _inquire(at, person("bob").address)).json() == {"receipts": []}
    forged = (
        person("stranger")
        .sign(
            Inquiry(payer=person("stranger").address, provider=node.address, coordinator=COORDINATOR.address, asked_at=START),
            DOMAIN,
        )
        .to_json()
    )
    forged["message"]["payer"] = PAYER.address
    assert _error(await at.http.post("/v1/tabs", json=forged)) == (401, "bad_signature")
    assert _error(await _inquire(at, node.address, asked_at=START - 301)) == (401, "unauthenticated")
    assert _error(await _inquire(at, node.address, coordinator=node.address)) == (400, "order_misdirected")
    assert _error(await at.http.post("/v1/tabs", json={"message": {}, "signature": "0x"})) == (400, "bad_message")


# Jobs


async def _finished(world: World) -> Client:
    """Places a job that one provider failed and another one completed."""
    ann, bob = world.node("ann"), world.node("bob", output_price=9_000_000)
    client = await world.started(ann, bob)
    ann.fail(client.job.id)
    await quiet()
    bob.complete(client.job.id)
    await quiet()
    return client


async def test_the_whole_job_is_reported(at: Served) -> None:
    """A job's payer reads its state, its attempts with their reasons, its receipt, and that it is not settled yet."""
    client = await _finished(at.world)
    ann, bob = at.world.nodes
    body = (await at.http.get(f"/v1/jobs/{client.job.id.hex()}", headers=access())).json()
    receipt = body.pop("receipt")
    assert read_signed(Receipt, receipt).message.order_hash == client.job.current.order.digest
    never = {"hedged": False, "outrun": False}
    assert body == {
        "job": client.job.id.hex(),
        "state": "completed",
        "model": MODEL,
        "payer": PAYER.address,
        "createdAt": START,
        "finishedAt": START,
        "attempts": [
            never | {"attempt": 0, "provider": ann.address, "state": "failed", "reason": "the engine is away", "receipt": None},
            never | {"attempt": 1, "provider": bob.address, "state": "completed", "reason": "", "receipt": receipt},
        ],
        "settlement": None,
    }


async def test_a_waiting_job_is_shown_with_its_place(at: Served) -> None:
    """The payer of a job that waits for a slot reads its place; nobody else learns that the job exists. A cancel ends it."""
    node = at.world.node("ann", slots=1)
    first, second, third = [await at.world.started(node) for _ in range(3)]
    path = f"/v1/jobs/{third.job.id.hex()}"
    assert (await at.http.get(path, headers=access())).json() == {
        "job": third.job.id.hex(),
        "state": "queued",
        "model": MODEL,
        "payer": PAYER.address,
        "createdAt": START,
        "finishedAt": None,
        "attempts": [],
        "receipt": None,
        "settlement": None,
        "queue": {"position": 2},
    }
    for signer in (node.signer, person("stranger")):
        assert _error(await at.http.get(path, headers=access(signer))) == (404, "unknown_job")
    node.complete(first.job.id)
    await quiet()
    at.world.clock.seconds += 3
    assert (await at.http.get(path, headers=access())).json()["queue"] == {"position": 1, "waitMs": 3_000}
    assert (await at.http.post(f"{path}/cancel", headers=access())).json() == {"cancelling": True}
    await quiet()
    assert third.failure.code is Code.CANCELLED
    node.complete(second.job.id)
    await quiet()
    at.world.assert_idle()


async def test_a_job_that_waits_after_a_failed_attempt_shows_that_attempt(at: Served) -> None:
    """The attempts so far are shown beside the place; the provider of one still reads its own attempt alone."""
    ann, bob = at.world.node("ann", slots=1), at.world.node("bob", slots=1, output_price=9_000_000)
    other = await at.world.started(bob)
    client = await at.world.started(ann, bob)
    ann.fail(client.job.id)
    await quiet()
    path = f"/v1/jobs/{client.job.id.hex()}"
    body = (await at.http.get(path, headers=access())).json()
    assert (body["state"], body["queue"]["position"]) == ("queued", 1)
    assert [attempt["provider"] for attempt in body["attempts"]] == [ann.address]
    assert "queue" not in (await at.http.get(path, headers=access(ann.signer))).json()
    bob.complete(other.job.id)
    await quiet()
    assert "queue" not in (await at.http.get(path, headers=access())).json()
    bob.complete(client.job.id)
    await quiet()


async def test_further_orders_of_a_waiting_job(at: Served) -> None:
    """A client posts an order on a provider that its job was told of; what is no candidate is refused."""
    ann = at.world.node("ann", slots=1)
    first, waiting = await at.world.started(ann), await at.world.started(ann)
    bob = at.world.node("bob", slots=1)
    await quiet()
    (candidate,) = make_submission(bob.ask, job=waiting.job.id, now=int(at.world.clock.now())).candidates
    path = f"/v1/jobs/{waiting.job.id.hex()}/orders"
    text = base64.b64encode(candidate.to_bytes()).decode()
    wrong_lists: tuple[list[Any], ...] = ([], ["*"], ["AAAA"], [text[:-8]] * 9, [{}])
    for wrong in wrong_lists:
        assert (await at.http.post(path, json={"candidates": wrong})).status_code == 400
    assert _error(await at.http.post(f"/v1/jobs/{UNKNOWN}/orders", json={"candidates": [text]})) == (404, "unknown_job")
    assert (await at.http.post(path, json={"candidates": [text, text]})).json() == {"added": True}
    await quiet()
    assert waiting.job.provider == bob.address
    for client, node in ((first, ann), (waiting, bob)):
        node.complete(client.job.id)
    await quiet()
    at.world.assert_idle()


async def test_a_settled_job(at: Served) -> None:
    """Once the chain has settled the tab up to a job's receipt, the job names the transaction."""
    client = await _finished(at.world)
    bob = at.world.nodes[1]
    cost = at.store.receipts[client.job.id][bob.address][0].message.cumulative_cost

    async def settlement(settled: int) -> Any:
        await at.store.put_settlements([Settlement(PAYER.address, bob.address, Amount(settled), "0xabc", 9)], Cursor(10))
        return (await at.http.get(f"/v1/jobs/{client.job.id.hex()}", headers=access())).json()["settlement"]

    assert await settlement(cost - 1) is None
    assert await settlement(cost) == {"tx": "0xabc", "settled": str(int(cost)), "block": 9}


async def test_a_job_that_lives(at: Served) -> None:
    """A job can be read from the moment its node has it."""
    node = at.world.node("ann")
    client = await at.world.started(node)
    body = (await at.http.get(f"/v1/jobs/{client.job.id.hex()}", headers=access())).json()
    assert (body["state"], body["finishedAt"], body["receipt"]) == ("matched", None, None)


async def test_cancelling(at: Served) -> None:
    """A payer cancels its live job, and the node is told to stop; without a live job the response says so."""
    node = at.world.node("ann")
    client = await at.world.started(node)
    path = f"/v1/jobs/{client.job.id.hex()}/cancel"
    response = await at.http.post(path, headers=access())
    assert (response.status_code, response.json()) == (202, {"cancelling": True})
    assert node.got(Kind.CANCEL) == [b"client"]
    node.complete(client.job.id, outcome=Outcome.CLIENT_CANCELLED)
    await quiet()
    assert (await at.http.post(path, headers=access())).json() == {"cancelling": False}
    assert (await at.http.post(f"/v1/jobs/{UNKNOWN}/cancel", headers=access())).json() == {"cancelling": False}


async def test_a_provider_that_failed_over_does_not_cancel_the_winners_job(at: Served) -> None:
    """Nobody but the payer can cancel a job, not even a provider that has or had it."""
    ann, bob = at.world.node("ann"), at.world.node("bob", output_price=9_000_000)
    client = await at.world.started(ann, bob)
    ann.fail(client.job.id)
    await quiet()
    path = f"/v1/jobs/{client.job.id.hex()}/cancel"
    for signer in (ann.signer, bob.signer, person("stranger"), COORDINATOR):
        assert _error(await at.http.post(path, headers=access(signer))) == (401, "unauthenticated")
    assert _error(await at.http.post(path)) == (401, "unauthenticated")
    assert bob.got(Kind.CANCEL) == []
    bob.complete(client.job.id)
    await quiet()
    assert client.kinds[-1] is Kind.RECEIPT


async def test_a_provider_does_not_read_its_rivals_attempt(at: Served) -> None:
    """A provider of an attempt reads the state and its own attempt: no other attempt, and no rival's receipt or settlement."""
    client = await _finished(at.world)
    ann, bob = at.world.nodes
    cost = at.store.receipts[client.job.id][bob.address][0].message.cumulative_cost
    await at.store.put_settlements([Settlement(PAYER.address, bob.address, cost, "0xabc", 9)], Cursor(10))
    path = f"/v1/jobs/{client.job.id.hex()}"
    loser = await at.http.get(path, headers=access(ann.signer))
    winner = (await at.http.get(path, headers=access(bob.signer))).json()
    body = loser.json()
    assert (body["state"], body["receipt"], body["settlement"]) == ("completed", None, None)
    assert [attempt["provider"] for attempt in body["attempts"]] == [ann.address]
    assert bob.address not in loser.text
    assert [attempt["provider"] for attempt in winner["attempts"]] == [bob.address]
    assert (winner["receipt"], winner["settlement"]["tx"]) == (winner["attempts"][0]["receipt"], "0xabc")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Tally"},
        {"authorization": "Tally " + "A" * 3_000},
        {"authorization": "Tally !!!!"},
        {"authorization": "Tally e30"},
        {"authorization": "Bearer " + access()["authorization"].split()[1]},
        access(person("stranger")),
        access(person("stranger"), account=PAYER.address),
        access(coordinator=person("other").address),
        access(issued_at=START - ACCESS_SECONDS - 1),
        access(issued_at=START + ACCESS_SECONDS + 1),
        access(issued_at=(1 << 64) - 1),
    ],
    ids=range(13),
)
async def test_nobody_else_reads_or_cancels_a_job(at: Served, headers: dict[str, str]) -> None:
    """Without a fresh token of the payer or of a provider for this coordinator, a job is neither shown nor cancelled."""
    node = at.world.node("ann")
    client = await at.world.started(node)
    path = f"/v1/jobs/{client.job.id.hex()}"
    for response in (await at.http.get(path, headers=headers), await at.http.post(f"{path}/cancel", headers=headers)):
        assert response.status_code == 401
        assert response.json()["error"]["code"] in {"unauthenticated", "bad_signature"}
        assert node.address not in response.text
    assert node.got(Kind.CANCEL) == []


# Errors


async def test_an_unknown_job(at: Served) -> None:
    """An unknown job is not found."""
    response = await at.http.get(f"/v1/jobs/{UNKNOWN}", headers=access())
    assert _error(response) == (404, "unknown_job")
    assert UNKNOWN in response.text


@pytest.mark.parametrize("job", ["x", "00", "zz" * 16, "0x" + "00" * 16, "00" * 17])
async def test_a_job_id_that_is_none(at: Served, job: str) -> None:
    """A malformed job id is refused as such."""
    assert _error(await at.http.get(f"/v1/jobs/{job}")) == (400, "bad_message")
    assert _error(await at.http.post(f"/v1/jobs/{job}/cancel")) == (400, "bad_message")


@pytest.mark.parametrize("path", ["/v1/shortlist", "/v1/jobs"])
async def test_encoded_bodies_are_refused_by_name(at: Served, path: str) -> None:
    """A body with a Content-Encoding is a 415 that names the header, and not a body that does not parse."""
    for coding, status in (("gzip", 415), ("BR", 415), ("identity", 400), ("", 400)):
        response = await at.http.post(path, content=b"\x1f\x8b", headers={"content-encoding": coding})
        assert response.status_code == status
        assert (coding in response.json()["error"]["message"]) == (status == 415 or not coding)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
async def test_a_client_of_the_gateway(at: Served, path: str) -> None:
    """A client of OpenAI's or Anthropic's API that got the coordinator's address is told where that API is."""
    response = await at.http.post(path, json={"model": "m"})
    assert _error(response) == (404, "unknown_route")
    assert "tally gateway, port 8421" in response.json()["error"]["message"]
    assert "gateway" not in (await at.http.get("/v1/modelz")).json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/info", 404),
        ("DELETE", "/v1/info", 405),
        ("GET", "/v1/node", 404),
        ("PUT", "/v1/jobs", 404),
    ],
)
async def test_an_unknown_route(at: Served, method: str, path: str, status: int) -> None:
    """Unknown routes and methods get an error in the same shape, which points to the docs."""
    response = await at.http.request(method, path)
    assert _error(response) == (status, "unknown_route")
    assert "/docs" in response.text


async def test_errors_for_a_browser(at: Served) -> None:
    """A refused navigation is a page with links to what there is."""
    for path, status in (("/v2/info", 404), ("/v1/shortlist", 405), ("/v1/jobs/nothing", 400)):
        answer = await at.http.get(path, headers={"accept": "text/html,*/*;q=0.8"})
        assert (answer.status_code, 'href="/market"' in answer.text) == (status, True)


async def test_the_first_page(at: Served) -> None:
    """/ says what this is: JSON for programs, a page without foreign resources for browsers; each link works."""
    document = (await at.http.get("/")).json()
    assert (document["name"], document["version"]) == ("test", __version__)
    page = await at.http.get("/", headers={"accept": "text/html,*/*"})
    assert "coordinator" in document["message"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("docs", "openapi", "info", "models", "ready", "metrics"):
        assert (await at.http.get(document[name])).status_code == 200
        assert f'href="{document[name].removeprefix(at.url + "/")}"' in page.text


def test_a_page_escapes_what_it_shows() -> None:
    """Names and texts of a document are never HTML of their own."""
    evil = "<script>alert(1)</script>"
    operation = {
        "description": evil,
        "parameters": [{"name": evil, "description": evil, "schema": {"type": evil}}],
        "responses": {},
    }
    schemas = {evil: {"description": evil, "properties": {evil: {"$ref": f"#/components/schemas/{evil}"}}}}
    document = {
        "info": {"title": evil, "version": evil, "description": evil},
        "paths": {f"/{evil}": {"get": operation}},
        "components": {"schemas": schemas},
    }
    assert "<script" not in api_page(document)
    assert "<script" not in home_page(evil, evil)


@pytest.mark.parametrize(
    ("demand", "says"),
    [
        ({}, "model"),
        (DEMAND | {"payer": "me"}, "payer"),
        (DEMAND | {"limit": 0}, "limit"),
        (DEMAND | {"limit": 9}, "limit"),
        *((DEMAND | {member: True}, member) for member in ("limit", "inputTokens", "maxOutput", "minReputation", "minStake")),
        *((DEMAND | {member: "5"}, member) for member in ("limit", "likelyTokens", "maxOutput")),
        (DEMAND | {"weights": {"speed": True}}, "weights.speed"),
        (DEMAND | {"require": {"contextTokens": True}}, "require.contextTokens"),
        (DEMAND | {"maxInputPrice": -1}, "maxInputPrice"),
        (DEMAND | {"maxInputPrice": 1 << 64}, "maxInputPrice"),
        (DEMAND | {"maxOutputPrice": 1.5}, "maxOutputPrice"),
        (DEMAND | {"maxOutputPrice": "1.5"}, "maxOutputPrice"),
        (DEMAND | {"minStake": "-1"}, "minStake"),
        (DEMAND | {"providers": ["0x12"]}, "providers"),
        (DEMAND | {"exclude": [PAYER.address] * 257}, "exclude"),
        (DEMAND | {"model": "x" * 1_025}, "model"),
        (DEMAND | {"surprise": 1}, "surprise"),
        ([], "body"),
        (None, "body"),
    ],
)
async def test_an_invalid_shortlist(at: Served, demand: Any, says: str) -> None:
    """An invalid demand is refused; the error names the member."""
    response = await at.http.post("/v1/shortlist", json=demand)
    assert _error(response) == (400, "bad_message")
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"not JSON", b'{"model": ', b"\xff\xfe", b"[" * 60_000, b'{"\\ud800": 1}', b'{"model": "\\ud800", "payer": "x"}'],
)
async def test_a_body_that_is_not_json(at: Served, body: bytes) -> None:
    """Any malformed body gets a 400 in the same shape, and the process continues."""
    headers = {"content-type": "application/json"}
    assert _error(await at.http.post("/v1/shortlist", content=body, headers=headers)) == (400, "bad_message")
    assert (await at.http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("demand", "status", "code"),
    [
        ({"model": "unknown"}, 404, "unknown_model"),
        ({"maxInputPrice": 1}, 402, "price_above_cap"),
        ({"exclude": [person("ann").address]}, 503, "no_provider"),
    ],
)
async def test_no_provider_fits(at: Served, demand: dict[str, Any], status: int, code: str) -> None:
    """Each reason why nobody can take a job has its own code and status."""
    at.world.node("ann")
    assert _error(await at.http.post("/v1/shortlist", json=DEMAND | demand)) == (status, code)


async def test_all_providers_are_busy(at: Served) -> None:
    """Busy providers can be waited for; providers without any slot are a reason to retry."""
    node = at.world.node("ann")
    at.world.market.matchmaker.set_capacity(node.address, Capacity(0, 1))
    response = await at.http.post("/v1/shortlist", json=DEMAND)
    assert [entry["ask"]["message"]["provider"] for entry in response.json()["asks"]] == [node.address]
    at.world.market.matchmaker.set_capacity(node.address, Capacity(0, 0))
    response = await at.http.post("/v1/shortlist", json=DEMAND)
    assert _error(response) == (503, "node_busy")
    assert response.json()["error"]["retry"] is True


async def test_a_bug_is_reported_in_the_same_shape(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that meets a bug gets an error in the same shape without internals, and the process continues."""

    async def broken(_job: object) -> None:
        raise KeyError("secret inside")

    monkeypatch.setattr(at.store, "job", broken)
    response = await at.http.get(f"/v1/jobs/{UNKNOWN}", headers=access())
    assert _error(response) == (500, "coordinator_unavailable")
    assert "secret" not in response.text
    assert (await at.http.get("/healthz")).status_code == 200


async def test_many_at_once(at: Served) -> None:
    """Many valid and invalid requests are served concurrently."""
    at.world.node("ann")
    good = [at.http.post("/v1/shortlist", json=DEMAND) for _ in range(20)]
    bad = [at.http.post("/v1/shortlist", content=b"nonsense") for _ in range(20)]
    statuses = [response.status_code for response in await asyncio.gather(*good, *bad)]
    assert statuses == [200] * 20 + [400] * 20

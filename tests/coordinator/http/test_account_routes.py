"""What an account reads of itself: by session, by bearer session, or by a token; and that nobody else reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from coordinator.domain.resource_bounds import ACCOUNT_READS_BURST, ACCOUNT_READS_PER_SECOND, SIGN_INS_BURST
from coordinator.http.account_routes import Accounts, AccountViews
from coordinator.jobs.accounts import SettledAmounts
from coordinator.pages.account_page import ACCOUNT_PATH
from coordinator.ports import Settlement
from coordinator.storage.memory import MemoryAccountStore
from tallystick.protocol.access import dump_access
from tallystick.protocol.eip712 import Signed, Signer
from tallystick.protocol.errors import Code, Unavailable
from tallystick.protocol.messages import Access
from tallystick.protocol.sign_in import text_digest
from tallystick.protocol.tiers import Tier
from tallystick.protocol.types import Address, Amount
from tallystick.protocol.wire import Candidate, Kind, Submission
from tests.coordinator.harness import COORDINATOR, COST, DOMAIN, MODEL, PAYER, START, World, make_submission, person, quiet
from tests.coordinator.live_server import Served, served, until

STRANGER = person("a stranger")


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market with a job of PAYER that one node served."""
    world = World()
    async with served(world) as market:
        await world.market.start()
        node = world.node("ann")
        world.funds.free[PAYER.address] = Amount(10**9)
        client = await world.started(node)
        node.accept(client.job.id)
        node.chunk(client.job.id)
        node.complete(client.job.id)
        await quiet()
        yield market


async def session(at: Served, key: Signer) -> dict[str, str]:
    """Signs in as a program does. Returns the headers of its requests."""
    message = (await at.http.post("/sign-in/challenge", json={"account": key.address})).json()["message"]
    signature = "0x" + key.sign_digest(text_digest(message)).hex()
    answer = await at.http.post("/sign-in", json={"message": message, "signature": signature, "bearer": True})
    return {"authorization": f"Bearer {answer.json()['token']}"}


async def account(at: Served, key: Signer) -> dict[str, Any]:
    """What an account reads of itself."""
    answer = await at.http.get("/v1/account", headers=await session(at, key))
    assert answer.status_code == 200
    read: dict[str, Any] = answer.json()
    return read


async def test_the_payer(at: Served) -> None:
    """It sees its jobs with their receipts, and what of its tabs is settled."""
    node = at.world.nodes[0]
    mine = await account(at, PAYER)
    assert (mine["account"], mine["live"], mine["refusals"], mine["tier"]) == (PAYER.address, [], [], None)
    (job,) = mine["jobs"]
    assert (job["payer"], job["state"], job["model"]) == (PAYER.address, "completed", MODEL)
    assert job["receipt"]["message"]["cost"] == str(COST)
    tab = {"payer": PAYER.address, "provider": node.address, "total": str(COST), "settled": "0", "unsettled": str(COST)}
    assert mine["tabs"] == [tab | {"tx": None, "block": None}]
    paid = Settlement(PAYER.address, node.address, Amount(15), "0x" + "12" * 32, 7)
    at.store.settlements[PAYER.address, node.address] = paid
    (shown,) = (await account(at, PAYER))["tabs"]
    assert (shown["settled"], shown["unsettled"], shown["tx"], shown["block"]) == ("15", str(COST - 15), paid.tx, 7)


async def test_the_provider(at: Served) -> None:
    """It sees the jobs that it served, with its own attempts alone."""
    node = at.world.nodes[0]
    (job,) = (await account(at, node.signer))["jobs"]
    assert [attempt["provider"] for attempt in job["attempts"]] == [node.address]


async def test_strangers(at: Served) -> None:
    """A wallet without jobs sees none of others; nobody without a session or a token sees anything."""
    seen = await account(at, STRANGER)
    assert (seen["jobs"], seen["tabs"], seen["live"]) == ([], [], [])
    for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic x"}, {"cookie": "tally_wallet=x"}):
        assert (await at.http.get("/v1/account", headers=headers)).status_code == 401
    forged = Access(account=PAYER.address, coordinator=COORDINATOR.address, issued_at=START)
    token = dump_access(Signed(forged, STRANGER.sign_digest(forged.digest(DOMAIN))))
    assert (await at.http.get("/v1/account", headers={"authorization": token})).status_code == 401


async def test_tokens(at: Served) -> None:
    """A program that has the key may sign a token for each request instead."""
    access = Access(account=PAYER.address, coordinator=COORDINATOR.address, issued_at=START)
    headers = {"authorization": dump_access(PAYER.sign(access, DOMAIN))}
    assert len((await at.http.get("/v1/account", headers=headers)).json()["jobs"]) == 1


async def test_a_job_by_session(at: Served) -> None:
    """A session reads single jobs too, as its account may; cancelling still wants a token, which no page can make."""
    job = next(iter(at.store.jobs)).hex()
    mine, foreign = await session(at, PAYER), await session(at, STRANGER)
    assert (await at.http.get(f"/v1/jobs/{job}", headers=mine)).json()["payer"] == PAYER.address
    assert (await at.http.get(f"/v1/jobs/{job}", headers=foreign)).status_code == 401
    assert (await at.http.post(f"/v1/jobs/{job}/cancel", headers=mine)).status_code == 401


async def test_a_job_under_way(at: Served) -> None:
    """A job that has not ended is listed as live for its payer alone."""
    client = await at.world.started(at.world.nodes[0], terms={"max_output_tokens": 9})
    (live,) = (await account(at, PAYER))["live"]
    assert (live["job"], live["model"], live["provider"]) == (client.job.id.hex(), MODEL, at.world.nodes[0].address)
    assert (await account(at, STRANGER))["live"] == []


async def test_why_a_job_was_refused(at: Served) -> None:
    """A payer without money sees why its job was refused; who forges its name adds nothing to its list."""
    poor = person("poor")
    ask = at.world.nodes[0].asks[0]
    assert (await at.post(make_submission(ask, payer=poor))).status_code == 402
    (refused,) = (await account(at, poor))["refusals"]
    assert (refused["code"], refused["model"]) == ("insufficient_funds", MODEL)
    assert "purse" in refused["reason"]
    forged = make_submission(ask, payer=poor, terms={"max_output_tokens": 9})
    (candidate,) = forged.candidates
    order = Signed(candidate.order.message, STRANGER.sign_digest(candidate.order.message.digest(DOMAIN)))
    answer = await at.post(Submission(forged.job, (Candidate(order, candidate.terms, b"wrapped"),), forged.sealed))
    assert answer.status_code == 401
    assert len((await account(at, poor))["refusals"]) == 1


async def limits_of(at: Served, payer: Address) -> dict[str, Any] | None:
    """The tier that an explanation names."""
    answer = await at.http.post("/v1/explain", json={"model": MODEL, "payer": payer})
    tier: dict[str, Any] | None = answer.json()["tier"]
    return tier


async def test_tiers_in_explanations(at: Served) -> None:
    """Without tiers none is named."""
    assert await limits_of(at, PAYER.address) is None


async def test_tiers() -> None:
    """A stranger's model is refused by name of tier, with what lifts it; what it settles on chain lifts it."""
    tiers = (
        Tier(name="new", models=("another model",)),
        Tier(name="known", settled_at_least=Amount(2_000_000)),
    )
    world = World()
    async with served(world, tiers=tiers) as at:
        await world.market.start()
        node = world.node("ann")
        world.funds.free[PAYER.address] = Amount(10**9)
        tier = await limits_of(at, PAYER.address)
        assert tier is not None
        assert (tier["name"], tier["settled"], tier["models"]) == ("new", "0", ["another model"])
        assert tier["refusal"] == f"model {MODEL!r} is not for wallets of tier 'new'; {tier['next']}"
        assert tier["next"] == "tier 'known' needs 2 dollars settled on chain, 2 more than now"
        shortlist = await at.http.post("/v1/shortlist", json={"model": MODEL, "payer": PAYER.address})
        assert (shortlist.status_code, shortlist.json()["error"]["code"]) == (403, "tier_limit")
        answer = await at.post(make_submission(node.asks[0]))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "tier_limit")
        (refused,) = (await account(at, PAYER))["refusals"]
        assert (refused["code"], "2 more than now" in refused["reason"]) == ("tier_limit", True)
        paid = Settlement(PAYER.address, node.address, Amount(2_000_000), "0x" + "12" * 32, 7)
        at.store.settlements[PAYER.address, node.address] = paid
        world.clock.seconds += 61
        lifted = await limits_of(at, PAYER.address)
        assert lifted is not None
        assert (lifted["name"], lifted["refusal"], lifted["next"]) == ("known", None, "no tier lifts this limit")
        assert (await at.http.post("/v1/shortlist", json={"model": MODEL, "payer": PAYER.address})).status_code == 200


async def test_jobs_in_flight() -> None:
    """A tier's jobs at the same time are counted for each payer, and given back when a job ends."""
    world = World()
    async with served(world, tiers=(Tier(name="new", jobs_in_flight=1),)) as at:
        await world.market.start()
        node = world.node("ann")
        world.funds.free[PAYER.address] = Amount(10**9)
        async with httpx.AsyncClient(base_url=at.url, trust_env=False, timeout=60) as http:
            first = make_submission(node.asks[0])
            async with http.stream("POST", "/v1/jobs", content=first.dumps()):
                await until(lambda: node.got(Kind.DISPATCH, first.job))
                answer = await at.post(make_submission(node.asks[0], terms={"max_output_tokens": 7}))
                assert (answer.status_code, "tier 'new'" in answer.text) == (429, True)
                node.accept(first.job)
                node.chunk(first.job)
                node.complete(first.job)
                await until(lambda: not world.market.live_jobs)
            again = make_submission(node.asks[0], terms={"max_output_tokens": 8})
            async with http.stream("POST", "/v1/jobs", content=again.dumps()) as response:
                assert response.status_code == 200


async def test_reads_of_an_account_are_bounded() -> None:
    """One that reads itself again and again waits for a moment; another one does not."""
    world = World()
    async with served(world) as at:
        tick = 0.0
        market = at.world.market
        store = MemoryAccountStore(at.store)
        settled = SettledAmounts(store, lambda: tick)
        views = AccountViews(Accounts(None, store, settled), market, world.clock.now, lambda: tick)  # type: ignore[arg-type]  # nobody signs in
        for _ in range(ACCOUNT_READS_BURST):
            await views.read(PAYER.address, 1)
        with pytest.raises(Unavailable) as limited:
            await views.read(PAYER.address, 1)
        assert limited.value.code is Code.RATE_LIMITED
        await views.read(STRANGER.address, 1)
        tick = 1 / ACCOUNT_READS_PER_SECOND
        await views.read(PAYER.address, 1)


async def test_the_page_and_the_api_share_a_limit(at: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an account reads by one, it cannot read again by the other."""
    monkeypatch.setattr("coordinator.domain.resource_bounds.ACCOUNT_READS_BURST", 1)
    monkeypatch.setattr("coordinator.domain.resource_bounds.ACCOUNT_READS_PER_SECOND", 1e-9)
    async with served(at.world) as limited:
        headers = await session(limited, PAYER)
        seen = [(await limited.http.get(path, headers=headers)).status_code for path in ("/v1/account", ACCOUNT_PATH)]
        assert seen == [200, 429]


async def test_bad_sign_ins_stop_no_orders() -> None:
    """Requests to sign in that are nonsense end in a limit of their own: the address's other requests are served."""
    async with served(World()) as at:
        paths = ("/sign-in", "/sign-in/challenge")
        seen = [(await at.http.post(paths[number % 2], content=b"x")).status_code for number in range(SIGN_INS_BURST * 4)]
        assert seen[:SIGN_INS_BURST] == [400] * SIGN_INS_BURST
        assert set(seen) <= {400, 429}
        at.rate_limiter.check_address("127.0.0.1")
        assert (await at.http.get("/v1/info")).status_code == 200

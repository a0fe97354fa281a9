"""Bad input to the real market gets a clear error in OpenAI's shape, costs nothing, and stops no process."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import httpx
import pytest
import websockets

from tallystick.chain.deployment import Deployment
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, Sender
from tallystick.cli.money.purse import fund_purse
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.link import Capacity, Challenge, Hello, Listing, endpoint_of
from tallystick.protocol.messages import Ask, Connect, Outcome, Receipt
from tallystick.protocol.sealing import SealingKey
from tallystick.protocol.types import ZERO_HASH, Amount, JobId
from tallystick.protocol.wire import Dispatch, Kind, dumps, loads, pack_link, unpack_link
from tests.builders import build_ask
from tests.e2e.dishonest_client import Buyer, frames

FUNDS = Amount(5_000_000)
FREE = {"max_cost": Amount(0)}
"""A cap of nothing: the node may refuse the job or work for nothing; either way nothing is charged."""


@pytest.fixture(scope="module")
def escrow_at(market: dict[str, Any]) -> Deployment:
    """The market's deployment."""
    return Deployment(market["chainId"], market["contract"], market["token"], 6, 0, market["rpc"])


@pytest.fixture(scope="module")
def buyer(market: dict[str, Any], escrow_at: Deployment) -> Buyer:
    """A payer with money in its purse."""
    signer = dev_accounts()[5]

    async def fund() -> None:
        rpc = Rpc(market["rpc"])
        await fund_purse(Escrow(rpc, escrow_at), Sender(rpc, signer), signer, FUNDS, mint=True)
        await rpc.close()

    asyncio.run(fund())
    return Buyer.at(market["coordinator"], signer)


@pytest.fixture(autouse=True)
def nothing_charged(market: dict[str, Any], escrow_at: Deployment) -> Any:
    """Checks after each test that the payer's tabs are unchanged and the market still serves."""

    async def settled() -> list[int]:
        rpc = Rpc(market["rpc"])
        escrow, payer = Escrow(rpc, escrow_at), dev_accounts()[5].address
        paid = [int((await escrow.tab(payer, provider)).settled) for provider in market["providers"].values()]
        await rpc.close()
        return paid

    before = asyncio.run(settled())
    yield
    assert asyncio.run(settled()) == before
    assert httpx.get(f"{market['coordinator']}/healthz").json()["status"] == "ok"


def refused(response: httpx.Response, status: int, code: str) -> str:
    """Checks the shape of a refusal. Returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code, error
    assert error.keys() >= {"message", "type", "param", "code"}
    return str(error["message"])


def test_honest_job_is_served(market: dict[str, Any], buyer: Buyer) -> None:
    """The buyer of these tests is served if it is honest, so its refusals are meaningful."""
    kinds = [kind for kind, _ in frames(buyer.post(buyer.prepare(market["model"], terms=FREE)))]
    assert kinds[0] is Kind.MATCH
    assert kinds[-1] in (Kind.RECEIPT, Kind.FAIL)


def test_forged_order(market: dict[str, Any], buyer: Buyer) -> None:
    """An order signed by another key in the payer's name is refused as unauthenticated."""
    submission = buyer.prepare(market["model"])
    (candidate,) = submission.candidates
    thief = Signer(b"\x07" * 32)
    forged = replace(candidate.order, signature=thief.sign_digest(candidate.order.message.digest(buyer.domain)))
    response = buyer.post(replace(submission, candidates=(replace(candidate, order=forged),)))
    assert "expected a signature of" in refused(response, 401, "bad_signature")


def test_altered_order(market: dict[str, Any], buyer: Buyer) -> None:
    """An order whose cap was raised after signing is refused, since its signature is invalid."""
    submission = buyer.prepare(market["model"])
    (candidate,) = submission.candidates
    raised = replace(candidate.order, message=replace(candidate.order.message, ceiling=Amount(10**9)))
    refused(buyer.post(replace(submission, candidates=(replace(candidate, order=raised),))), 401, "bad_signature")


def test_altered_terms(market: dict[str, Any], buyer: Buyer) -> None:
    """Terms that the order does not commit to are refused."""
    submission = buyer.prepare(market["model"])
    (candidate,) = submission.candidates
    other = replace(candidate, terms=replace(candidate.terms, max_output_tokens=15))
    assert "termsHash" in refused(buyer.post(replace(submission, candidates=(other,))), 400, "bad_message")


def test_replayed_order(market: dict[str, Any], buyer: Buyer) -> None:
    """The same job posted twice is refused the second time, and runs once."""
    submission = buyer.prepare(market["model"], terms=FREE)
    assert buyer.post(submission).status_code == 200
    refused(buyer.post(submission), 409, "order_replayed")


def test_expired_order(market: dict[str, Any], buyer: Buyer) -> None:
    """An order past its deadline is refused."""
    submission = buyer.prepare(market["model"], order={"deadline": int(time.time()) - 5})
    assert "deadline" in refused(buyer.post(submission), 400, "order_expired")


def test_price_above_the_cap(market: dict[str, Any], buyer: Buyer) -> None:
    """A client whose price limit is below every ask is told the lowest prices."""
    request = {"model": market["model"], "payer": buyer.signer.address, "maxOutputPrice": 1}
    message = refused(httpx.post(f"{market['coordinator']}/v1/shortlist", json=request), 402, "price_above_cap")
    assert "lowest prices" in message


def test_prices_other_than_the_ask(market: dict[str, Any], buyer: Buyer) -> None:
    """Terms with prices of the client's own are refused."""
    refused(buyer.post(buyer.prepare(market["model"], terms={"output_price": 1})), 400, "order_terms")


def test_unknown_model(market: dict[str, Any]) -> None:
    """The gateway answers 404 for a model that no provider sells, and names it."""
    body = {"model": "no-such-model", "messages": [{"role": "user", "content": "hi"}]}
    response = httpx.post(f"{market['gateway']}/v1/chat/completions", json=body, timeout=120)
    assert "no-such-model" in refused(response, 404, "unknown_model")


def test_payer_without_funds(market: dict[str, Any]) -> None:
    """A payer with an empty purse is told what is missing and how to deposit it."""
    poor = Buyer.at(market["coordinator"], Signer(b"\x09" * 32))
    message = refused(poor.post(poor.prepare(market["model"])), 402, "insufficient_funds")
    assert "tally deposit" in message


@pytest.mark.parametrize("body", [b"this is not JSON", b'{"model": ', b"", b"[1, 2]", b"\xff\xfe"])
def test_body_that_is_not_json(market: dict[str, Any], body: bytes) -> None:
    """A body that is not a JSON object is refused as the client's fault."""
    response = httpx.post(f"{market['gateway']}/v1/chat/completions", content=body, timeout=120)
    refused(response, 400, "bad_message")


@pytest.mark.parametrize("body", [b"", b"\x00\x00\x00\x02{}", b"\xff" * 64, b"\x00\x00\x00\x04null", b"x" * 100_000])
def test_submission_that_does_not_parse(market: dict[str, Any], buyer: Buyer, body: bytes) -> None:
    """A malformed submission is refused with the reason."""
    del market
    refused(buyer.post(body), 400, "bad_message")


class CheatingNode:
    """A provider that takes a job, does nothing and signs a receipt for as much as the order allows."""

    def __init__(self, buyer: Buyer) -> None:
        self.signer, self.sealing = Signer(b"\x0b" * 32), SealingKey("x25519", b"\x0c" * 32)
        self.buyer = buyer

    def _ask(self) -> Ask:
        now = int(time.time())
        return build_ask(
            self.signer.address,
            model="cheap-tricks",
            cached_input_price=1_000_000,
            output_price=1_000_000,
            sealing_key=self.sealing.public,
            valid_from=now - 1,
            valid_until=now + 600,
        )

    async def serve(self, ready: asyncio.Event) -> None:
        """Serves one job and bills too much."""
        domain = self.buyer.domain
        async with websockets.connect(self.buyer.url.replace("http", "ws") + "/v1/node") as socket:
            challenge = Challenge.from_json(loads(unpack_link(await socket.recv())[2], "challenge"))
            connect = Connect(
                provider=self.signer.address,
                coordinator=challenge.coordinator,
                challenge=challenge.challenge,
                endpoint=endpoint_of(self.buyer.url),
            )
            listing = Listing.of_one_group((self.signer.sign(self._ask(), domain),), Capacity(1, 1))
            hello = Hello(self.signer.sign(connect, domain), listing, "cheat")
            await socket.send(pack_link(Kind.HELLO, payload=dumps(hello.to_json())))
            while True:
                kind, job, payload = unpack_link(await socket.recv())
                if kind is Kind.WELCOME:
                    ready.set()
                if kind is Kind.DISPATCH:
                    await socket.send(pack_link(Kind.RECEIPT, job, self._receipt(job, payload)))

    def _receipt(self, _job: JobId, payload: bytes) -> bytes:
        candidate = Dispatch.loads(payload).candidate
        order = candidate.order.message
        receipt = Receipt(
            payer=order.payer,
            provider=order.provider,
            seq=1,
            cumulative_cost=order.ceiling,
            order_hash=order.digest(self.buyer.domain),
            result_commitment=ZERO_HASH,
            input_tokens=1,
            cached_input_tokens=0,
            output_tokens=1,
            cost=order.ceiling,
            outcome=Outcome.COMPLETED,
            finished_at=int(time.time()),
            evidence_root=ZERO_HASH,
        )
        return self.signer.sign(receipt, self.buyer.domain).to_bytes()


async def test_node_that_signs_a_wrong_cost(buyer: Buyer) -> None:
    """A receipt above usage times prices is not forwarded: the client gets an error that names the provider as at fault."""
    node, ready = CheatingNode(buyer), asyncio.Event()
    serving = asyncio.create_task(node.serve(ready))
    try:
        await asyncio.wait_for(ready.wait(), 60)
        submission = await asyncio.to_thread(buyer.prepare, "cheap-tricks")
        answer = await asyncio.to_thread(buyer.post, submission)
    finally:
        serving.cancel()
    kinds = frames(answer)
    assert [kind for kind, _ in kinds] == [Kind.MATCH, Kind.FAIL]
    error = loads(kinds[-1][1], "failure")["error"]
    assert error["code"] == "bad_receipt"
    assert error["fault"] == "provider"
    assert "receipt.cost" in error["message"]

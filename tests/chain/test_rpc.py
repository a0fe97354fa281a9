from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.chain.codec import ContractError, load_abi, revert_error
from tallystick.chain.devnet import build_app, dev_accounts
from tallystick.chain.rpc import Rpc, RpcError, Sender
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import Amount
from tests.chain.world import World, person, serving

ALICE, BOB, CAROL = dev_accounts(3)
Answer = Callable[[dict[str, Any]], Awaitable[Response]]


class Endpoint:
    """A JSON-RPC endpoint that answers as a test says; counts its calls."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.calls = list(answers), list[dict[str, Any]]()
        self.app = Starlette(routes=[Route("/", self.serve, methods=["POST"])])

    async def serve(self, request: Request) -> Response:
        """The next answer; the last one for ever."""
        self.calls.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = {"result": "0x1"}
        assert isinstance(answer, dict)
        return JSONResponse({"jsonrpc": "2.0", "id": self.calls[-1]["id"]} | answer)


def _error(code: int, message: str, **extra: object) -> dict[str, object]:
    return {"error": {"code": code, "message": message} | extra}


@pytest.mark.parametrize(
    "trouble",
    [
        Response(status_code=429),
        Response(status_code=503),
        Response("<html>busy</html>"),
        Response("[]", media_type="application/json"),
        _error(-32005, "limit exceeded"),
        _error(429, "slow down"),
        0.5,
    ],
    ids=["429", "503", "html", "list", "limit", "error 429", "time-out"],
)
async def test_trouble_is_tried_again_and_then_reported(trouble: object) -> None:
    """One bad exchange is bridged; many are Unavailable after a bounded number of attempts."""
    passing, lasting = Endpoint(trouble, {"result": "0x2a"}), Endpoint(trouble)
    with serving(passing.app) as url:
        rpc = Rpc(url, timeout=0.2, backoff=0.001)
        assert await rpc.block_number() == 42
        await rpc.close()
    with serving(lasting.app) as url:
        rpc = Rpc(url, timeout=0.2, attempts=3, backoff=0.001)
        with pytest.raises(Unavailable) as caught:
            await rpc.block_number()
        await rpc.close()
    assert (caught.value.code, caught.value.retry, len(lasting.calls)) == (Code.CHAIN_UNAVAILABLE, True, 3)


async def test_nobody_listens() -> None:
    """A refused connection is Unavailable and names the endpoint."""
    rpc = Rpc("http://127.0.0.1:9", attempts=2, backoff=0.001)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        await rpc.chain_id()
    await rpc.close()


async def test_a_lasting_error_is_not_tried_again() -> None:
    """An answer that will not change is passed on at once."""
    endpoint = Endpoint(_error(-32601, "no such method"))
    with serving(endpoint.app) as url:
        rpc = Rpc(url)
        with pytest.raises(RpcError, match="no such method") as caught:
            await rpc.request("eth_teapot")
        await rpc.close()
    assert (caught.value.number, len(endpoint.calls)) == (-32601, 1)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"data": d}], ids=["plain", "wrapped"])
async def test_a_revert_is_named(wrap: Callable[[str], object]) -> None:
    """Revert data becomes the contract's error by name, however the node wraps it."""
    data = "0x" + _selector("TooEarly") + f"{99:064x}"
    endpoint = Endpoint(_error(3, "execution reverted", data=wrap(data)))
    with serving(endpoint.app) as url:
        rpc = Rpc(url)
        with pytest.raises(ContractError) as caught:
            await rpc.call(ALICE.address, b"")
        await rpc.close()
    assert (caught.value.name, caught.value.values, len(endpoint.calls)) == ("TooEarly", {"readyAt": 99}, 1)


def _selector(name: str) -> str:
    return next(key.hex() for key, entry in load_abi("Escrow").errors.items() if entry.name == name)


def test_what_contracts_say() -> None:
    """Custom errors of ours and of OpenZeppelin, Error(string) and panics are named; anything else is a refusal in words."""
    text = bytes.fromhex("08c379a0" + f"{32:064x}{2:064x}" + b"no".hex().ljust(64, "0"))
    assert (_named(text).name, _named(text).values) == ("Error", {"message": "no"})
    assert _named(bytes.fromhex("4e487b71" + f"{17:064x}")).values == {"code": 17}
    short = _named(bytes.fromhex(_selector("InsufficientFree") + f"{1:064x}{2:064x}"))
    assert (short.code, short.status, short.values) == (Code.INSUFFICIENT_FUNDS, 402, {"available": 1, "wanted": 2})
    for unknown in (b"", b"\x01\x02", bytes(40), bytes.fromhex(_selector("TooEarly")), text[:50]):
        assert type(revert_error(unknown, "out of gas")) is Refusal


def _named(data: bytes) -> ContractError:
    error = revert_error(data)
    assert isinstance(error, ContractError)
    return error


async def test_concurrent_sends_never_collide(rpc: Rpc) -> None:
    """Forty sends at once from one key all arrive, each once."""
    sender, payee = Sender(rpc, BOB, poll=0.001), person("many").address
    results = await asyncio.gather(*(sender.send(payee, b"", value=1) for _ in range(40)))
    assert len({mined.hash for mined in results}) == 40
    assert await rpc.balance(payee) == 40


async def test_a_foreign_transaction_does_not_stop_a_sender(rpc: Rpc) -> None:
    """When something else used the next nonce, the sender asks again and goes on."""
    first, second = Sender(rpc, CAROL, poll=0.001), Sender(rpc, CAROL, poll=0.001)
    payee = person("shared").address
    for value, sender in enumerate((first, second, first, first, second)):
        await sender.send(payee, b"", value=value)
    assert await rpc.balance(payee) == 10


async def test_a_refused_send_uses_no_nonce(world: World) -> None:
    """After a refusal the next transaction goes through."""
    sender = await world.sender(person("clumsy"))
    with pytest.raises(ContractError, match="NoCredit"):
        await world.escrow.cash_out(sender, sender.address)
    await world.escrow.set_fee(sender, 5)
    with pytest.raises(Refusal) as caught:
        await Sender(world.rpc, person("penniless")).send(sender.address, b"")
    assert caught.value.code is Code.INSUFFICIENT_FUNDS
    await world.escrow.set_fee(sender, 6)


async def test_a_mined_failure_is_named_too(world: World) -> None:
    """A transaction that is mined and fails raises what the contract said, and the sender goes on."""
    sender = await world.sender(person("late"))
    call = world.escrow.calldata("cashOut", sender.address)
    with pytest.raises(ContractError, match="NoCredit"):
        await sender.send(world.deployment.escrow, call, gas=200_000)
    await world.escrow.set_fee(sender, 6)


async def test_a_transaction_that_is_never_mined_has_a_deadline(rpc: Rpc) -> None:
    """Waiting for a receipt ends in Unavailable, and the nonce is asked for again."""
    sender = Sender(rpc, person("stuck"), poll=0.001, deadline=0.2)
    await Sender(rpc, ALICE, poll=0.001).send(sender.address, b"", value=10**18)
    sender._nonce = 5  # a gap that nothing fills
    with pytest.raises(Unavailable, match="not mined within"):
        await sender.send(ALICE.address, b"", value=1)
    await sender.send(ALICE.address, b"", value=1)


async def test_an_answer_that_is_lost_sends_once() -> None:
    """When the answer to a send times out, the transaction is found by its hash and not sent with another nonce."""
    inner = build_app()
    lost = {"left": 2}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def listen() -> Any:
            event = await receive()
            body.extend(event.get("body", b""))
            return event

        async def drop(event: Any) -> None:
            if b"eth_sendRawTransaction" in body and lost["left"]:
                if event["type"] == "http.response.start":
                    lost["left"] -= 1
                await asyncio.sleep(0.5)
            await send(event)

        await inner(scope, listen, drop)

    with serving(app) as url:
        rpc = Rpc(url, timeout=0.3, attempts=1)
        mined = await Sender(rpc, ALICE, poll=0.001).send(BOB.address, b"", value=7)
        assert mined.gas_used == 21_000
        assert int(await rpc.request("eth_getTransactionCount", ALICE.address, "latest"), 16) == 1
        await rpc.close()


async def test_a_sender_shows_no_secret(world: World) -> None:
    """Neither the sender nor its signer prints the key."""
    sender = await world.sender(person("quiet"))
    assert person("quiet").secret.hex() not in f"{sender!r} {sender.signer!r} {vars(sender)!r}"
    assert Amount(0) == await world.escrow.token.balance_of(sender.address)

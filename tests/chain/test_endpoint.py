from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick.chain.codec import ContractError, WrongContract, load_abi, revert_error
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.endpoint import MAX_PAUSE
from tallystick.chain.escrow import Escrow
from tallystick.chain.rpc import Rpc, RpcError, WrongChain
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tests.chain.faulty_proxy import Fault, Proxy
from tests.chain.harness import World, serving

(ALICE,) = dev_accounts(1)
Answer = Callable[[dict[str, Any]], Awaitable[Response]]


class Endpoint:
    """A JSON-RPC endpoint that gives scripted answers and counts its calls."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.calls = list(answers), list[dict[str, Any]]()
        self.app = Starlette(routes=[Route("/", self.serve, methods=["POST"])])

    async def serve(self, request: Request) -> Response:
        """Returns the next answer; the last one is repeated."""
        self.calls.append(await request.json())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Response):
            return answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = {"result": "0x1"}
        assert isinstance(answer, dict)
        return JSONResponse({"jsonrpc": "2.0", "id": self.calls[-1]["id"]} | answer, answer.pop("status", 200))


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
        4.0,
    ],
    ids=["429", "503", "html", "list", "limit", "error 429", "time-out"],
)
async def test_failures_are_retried_and_then_reported(trouble: object) -> None:
    """A single failed exchange is retried; repeated failures raise Unavailable after a bounded number of attempts."""
    passing, lasting = Endpoint(trouble, {"result": "0x2a"}), Endpoint(trouble)
    timeout = trouble / 2 if isinstance(trouble, float) else 60.0
    with serving(passing.app) as url:
        rpc = Rpc(url, timeout=timeout, backoff=0.001)
        assert await rpc.block_number() == 42
        await rpc.close()
    with serving(lasting.app) as url:
        rpc = Rpc(url, timeout=timeout, attempts=3, limit_attempts=3, backoff=0.001)
        with pytest.raises(Unavailable) as caught:
            await rpc.block_number()
        await rpc.close()
    assert (caught.value.code, caught.value.retry, len(lasting.calls)) == (Code.CHAIN_UNAVAILABLE, True, 3)


async def test_a_refused_connection() -> None:
    """A refused connection raises Unavailable with the endpoint's name."""
    rpc = Rpc("http://127.0.0.1:9", attempts=2, backoff=0.001)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        await rpc.chain_id()
    await rpc.close()


async def test_a_lasting_error_is_not_tried_again() -> None:
    """A permanent error is raised at once, without a retry."""
    endpoint = Endpoint(_error(-32601, "no such method"))
    with serving(endpoint.app) as url:
        rpc = Rpc(url)
        with pytest.raises(RpcError, match="no such method") as caught:
            await rpc.request("eth_teapot")
        await rpc.close()
    assert (caught.value.number, len(endpoint.calls)) == (-32601, 1)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"data": d}], ids=["plain", "wrapped"])
async def test_a_revert_is_named(wrap: Callable[[str], object]) -> None:
    """Revert data becomes the contract's named error in every form in which nodes wrap it."""
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


def test_contract_errors_are_named() -> None:
    """Our custom errors, OpenZeppelin's, Error(string) and panics are named; any other revert is a refusal with its text."""
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


# ----------------------------------------------------------------------------------------------- either chain, a bad line to it

RETRIED_FAULTS = [fault for fault in Fault if fault not in {Fault.SWALLOW, Fault.NO_METHOD}]


@pytest.mark.parametrize("fault", RETRIED_FAULTS, ids=lambda fault: fault.name)
async def test_a_failed_exchange_is_retried(through: Rpc, proxy: Proxy, fault: Fault) -> None:
    """With a real chain, one failed exchange is retried and goes unnoticed; lasting failure raises Unavailable with the
    endpoint's name.
    """
    proxy.plan("eth_blockNumber", fault)
    assert await through.block_number() >= 0
    proxy.plan("eth_blockNumber", fault, fault)
    with pytest.raises(Unavailable) as caught:
        await through.block_number()
    assert (caught.value.code, caught.value.retry, proxy.calls["eth_blockNumber"]) == (Code.CHAIN_UNAVAILABLE, True, 4)
    if fault is not Fault.LIMIT_ERROR:
        assert proxy.url in str(caught.value)
    assert await through.block_number() >= 0


async def test_a_batch_is_one_exchange(either_rpc: Rpc) -> None:
    """A batch's answers have the order of its requests; one failing request does not affect the others."""
    number, nothing, wrong, chain_id = await either_rpc.batch(
        ("eth_blockNumber",), ("eth_getTransactionByHash", "0x" + "11" * 32), ("eth_teapot",), ("eth_chainId",)
    )
    assert (int(number, 16) >= 0, nothing, chain_id) == (True, None, "0x7a69")
    assert isinstance(wrong, RpcError)
    assert wrong.number == -32601


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.NONSENSE, Fault.BROKEN], ids=lambda fault: fault.name)
async def test_a_batch_is_tried_again_too(through: Rpc, proxy: Proxy, fault: Fault) -> None:
    """A batch that failed as a whole is retried."""
    proxy.plan("eth_blockNumber", fault)
    assert len(await through.batch(("eth_blockNumber",), ("eth_chainId",))) == 2


async def test_another_chain_is_refused_at_once(either: World) -> None:
    """A deployment of another chain is refused at the first call, before anything is read or signed; the error says what to
    do.
    """
    foreign = replace(either.deployment, chain_id=1)
    rpc = Rpc(either.rpc.url)
    escrow = Escrow(rpc, foreign)
    for attempt in (escrow.check, lambda: escrow.purse(ALICE.address)):
        with pytest.raises(WrongChain, match=r"on chain 1, but .* is chain 31337") as caught:
            await attempt()
        assert not caught.value.retry
    await rpc.close()


async def test_a_missing_deployment_is_reported(either: World) -> None:
    """If a local chain was restarted empty, reading, writing and checking report that the contract is missing."""
    gone = Escrow(either.rpc, replace(either.deployment, escrow=ALICE.address))
    for attempt in (gone.check, lambda: gone.purse(ALICE.address), lambda: gone.set_fee(either.deployer, 1)):
        with pytest.raises(WrongContract):
            await attempt()
    swapped = Escrow(either.rpc, replace(either.deployment, token=ALICE.address))
    with pytest.raises(WrongContract, match="settles in"):
        await swapped.check()


@pytest.mark.parametrize("answer", [None, "", "0x", "0xzz", 5, [], {}, "0x" + "f" * 64], ids=str)
async def test_nonsense_is_never_a_number(answer: object) -> None:
    """A result that should be a number and is not raises Unavailable and no other error."""
    endpoint = Endpoint({"result": answer})
    with serving(endpoint.app) as url:
        rpc = Rpc(url)
        if answer == "0x" + "f" * 64:
            assert await rpc.block_number() == 2**256 - 1
        else:
            with pytest.raises(Unavailable):
                await rpc.block_number()
        for attempt in (rpc.timestamp, lambda: rpc.call(ALICE.address, b"")):
            with contextlib.suppress(Unavailable):
                await attempt()
        await rpc.close()


@pytest.mark.parametrize(
    ("status", "answer"),
    [(401, Response("no key", 401)), (403, Response("{}", 403)), (-32602, _error(-32602, "too many blocks") | {"status": 400})],
    ids=["401", "403", "400 with an error"],
)
async def test_a_refusal_of_the_endpoint_is_passed_on(status: int, answer: object) -> None:
    """A permanent HTTP refusal is not retried; a refusal that carries a JSON-RPC error raises that error."""
    endpoint = Endpoint(answer)
    with serving(endpoint.app) as url:
        rpc = Rpc(url)
        with pytest.raises(RpcError) as caught:
            await rpc.block_number()
        await rpc.close()
    assert (caught.value.number, len(endpoint.calls)) == (status, 1)


async def test_retry_after_is_obeyed() -> None:
    """A 429's Retry-After is obeyed up to a limit."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    limits = [Response(status_code=429, headers={"retry-after": text}) for text in ("3", "9999", "soon")]
    endpoint = Endpoint(*limits, {"result": "0x2a"})
    with serving(endpoint.app) as url:
        rpc = Rpc(url, timeout=60, backoff=0.1, sleep=sleep)
        assert await rpc.block_number() == 42
        await rpc.close()
    assert slept == [3.0, MAX_PAUSE, 2.0]


async def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading an answer stops at the largest permitted size."""
    monkeypatch.setattr("tallystick.chain.rpc_transport.MAX_RESPONSE_BYTES", 1_000)
    endpoint = Endpoint({"result": "0x" + "00" * 1_000})
    with serving(endpoint.app) as url:
        rpc = Rpc(url, attempts=1)
        with pytest.raises(Unavailable, match="more than 1000 bytes"):
            await rpc.request("eth_getCode")
        await rpc.close()


def test_importing_the_chain_package_is_cheap() -> None:
    """Calling a chain does not import web3 or eth_account, whose import takes most of a second."""
    code = "import sys, tallystick.chain.escrow; print([name for name in ('web3', 'eth_account') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

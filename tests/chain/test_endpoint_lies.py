"""Endpoints with false answers: each answer ends in an error of this project and has a bounded cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from eth_abi.abi import encode
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tallystick.chain.codec import WrongContract, load_abi, revert_error
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.events import read_logs
from tallystick.chain.rpc import Rpc, Sender
from tallystick.chain.sender import MAX_FEE
from tallystick.chain.token import Token
from tallystick.protocol.errors import TallyError, Unavailable
from tallystick.protocol.types import Address, Amount, Seconds
from tests.chain.faulty_proxy import Proxy
from tests.chain.harness import World, person, serving

PLACE = {"blockNumber": "0x1", "logIndex": "0x0", "blockHash": "0x" + "11" * 32, "transactionHash": "0x" + "22" * 32}
BOB = dev_accounts(2)[1]
ERRORS = [b"", *load_abi("Escrow").errors, *load_abi("TestUSD").errors, bytes.fromhex("08c379a0"), bytes.fromhex("4e487b71")]
FUNCTIONS = [(name, function) for name in ("Escrow", "TestUSD") for function in load_abi(name)._functions]

_number = st.integers(0, 300) | st.integers(0, 12).map(lambda n: 32 * n) | st.integers(0, 255).map(lambda n: 1 << n)
_word = _number.map(lambda n: n.to_bytes(32, "big")) | st.binary(min_size=32, max_size=32) | st.just(b"\xff" * 32)
hostile = st.builds(lambda words, cut: b"".join(words)[cut:], st.lists(_word, max_size=12), st.sampled_from([0, 0, 0, 1, 31]))


@given(error=st.sampled_from(ERRORS), data=hostile)
def test_no_revert_is_a_crash(error: bytes, data: bytes) -> None:
    """A revert with arbitrary bytes, also such that begin like a known error, never crashes the reader."""
    assert isinstance(revert_error(error + data), TallyError)


@given(function=st.sampled_from(FUNCTIONS), data=hostile)
def test_no_result_is_a_crash(function: tuple[str, str], data: bytes) -> None:
    """Any result of a view gives values of the declared types, or an error that it may be another contract's."""
    try:
        load_abi(function[0]).result(function[1], data)
    except WrongContract:
        return


@given(event=st.sampled_from([*load_abi("Escrow").events]), topics=st.lists(_word, max_size=4), data=hostile)
def test_no_log_is_a_crash(event: bytes, topics: list[bytes], data: bytes) -> None:
    """Any log of the escrow's address gives events, or is reported as malformed."""
    log = {"address": "0x1", "topics": ["0x" + topic.hex() for topic in (event, *topics)], "data": "0x" + data.hex()}
    try:
        read_logs([log | PLACE], Address("0x1"))
    except Unavailable:
        return


PLACES: list[dict[str, Any]] = [
    {"blockNumber": "-0x1"},
    {"blockNumber": hex(1 << 63)},
    {"blockNumber": 1},
    {"logIndex": hex(1 << 64)},
    {"blockHash": None},
    {"blockHash": "0x" + "11" * 1_000},
    {"transactionHash": {"a": 1}},
    {"transactionHash": "0x" + "zz" * 32},
]


@pytest.mark.parametrize("change", PLACES, ids=str)
def test_no_place_that_a_chain_cannot_have_reaches_a_database(change: dict[str, Any]) -> None:
    """Block numbers above 63 bits and malformed hashes end the reading; the same log at a valid position is an event."""
    (event,) = (key for key, entry in load_abi("Escrow").events.items() if entry.name == "FeeSet")
    log = {"address": "0x1", "topics": ["0x" + event.hex(), "0x" + bytes(32).hex()], "data": "0x" + bytes(32).hex()} | PLACE
    assert read_logs([log], Address("0x1"))
    with pytest.raises(Unavailable):
        read_logs([log | change], Address("0x1"))


@pytest.mark.parametrize(
    "change", [{"hash": "0x" + "11" * 1_000}, {"hash": None}, {"number": hex(1 << 63)}, {"timestamp": hex(1 << 80)}], ids=str
)
def test_no_block_that_a_chain_cannot_have_is_believed(change: dict[str, Any]) -> None:
    """Malformed block hashes and times are refused, since the hash is stored as the tip and the time is compared with
    deadlines.
    """
    block = {"hash": "0x" + "11" * 32, "number": "0x1", "timestamp": "0x1"}
    assert Rpc("http://127.0.0.1:1").read_block(block)
    with pytest.raises(Unavailable):
        Rpc("http://127.0.0.1:1").read_block(block | change)


@pytest.mark.parametrize("number", [[], {}, None, "1", True], ids=str)
async def test_an_answer_to_no_request_is_no_crash(number: object) -> None:
    """An answer whose id is not a number is ignored."""

    async def answer(_: Request) -> JSONResponse:
        return JSONResponse([{"jsonrpc": "2.0", "id": number, "result": "0x1"}])

    with serving(Starlette(routes=[Route("/", answer, methods=["POST"])])) as url:
        rpc = Rpc(url, attempts=1)
        rpc._ids = itertools.count(5)
        with pytest.raises(Unavailable):
            await rpc.batch(("eth_chainId",), ("eth_blockNumber",))
        await rpc.close()


SPOILED: list[dict[str, Any]] = [
    {"status": "yes"},
    {"blockNumber": ""},
    {"gasUsed": "0x"},
    {"gasUsed": "21000 "},
    {"effectiveGasPrice": "cheap"},
    {"effectiveGasPrice": 5},
    {"contractAddress": "0x12"},
    {"logs": None},
    {"logs": {}},
    {"status": None},
]


@pytest.mark.parametrize("change", SPOILED, ids=str)
async def test_no_receipt_is_a_crash(chain_url: str, proxies: Callable[[str], Proxy], change: dict[str, Any]) -> None:
    """A malformed transaction receipt ends the send with an error of this project."""
    proxy = proxies(chain_url)
    receipt: dict[str, Any] = {"transactionHash": "0x" + "11" * 32, "status": "0x1", "blockNumber": "0x1", "gasUsed": "0x5208"}
    proxy.answers["eth_getTransactionReceipt"] = receipt | {"logs": [], "effectiveGasPrice": "0x1"} | change
    rpc = Rpc(proxy.url)
    with pytest.raises(TallyError):
        await Sender(rpc, BOB, poll=0.01, deadline=0.3).send(person("payee").address, b"", value=1)
    await rpc.close()


async def test_an_endpoint_does_not_turn_coins_into_tips(chain_url: str, proxies: Callable[[str], Proxy]) -> None:
    """A unit of gas costs at most MAX_FEE, however high a fee the endpoint reports."""
    proxy = proxies(chain_url)
    proxy.answers["eth_maxPriorityFeePerGas"] = hex(10**30)
    rpc = Rpc(proxy.url)
    mined = await Sender(rpc, BOB, poll=0.01).send(person("payee").address, b"", value=1)
    assert mined.fee <= mined.gas_used * MAX_FEE
    await rpc.close()


@pytest.mark.parametrize(("chain", "contract"), [(1, None), (31337, "0x" + "ab" * 20)], ids=["chain", "contract"])
async def test_no_permit_is_signed_for_another_chain(
    world: World, proxies: Callable[[str], Proxy], chain_url: str, chain: int, contract: str | None
) -> None:
    """A token domain that names another chain or contract is refused, because a permit for it would move money there."""
    types = ["bytes1", "string", "string", "uint256", "address", "bytes32", "uint256[]"]
    token = world.deployment.token
    raw = encode(types, [b"\x0f", "USD Coin", "2", chain, contract or token, bytes(32), []])
    proxy = proxies(chain_url)
    rpc = Rpc(proxy.url)
    nonce = (await Token(world.rpc, token)._read("nonces", BOB.address))[0]
    assert nonce == 0
    proxy.answers["eth_call"] = "0x" + raw.hex()
    with pytest.raises(WrongContract, match="nothing was signed"):
        await Token(rpc, token).domain()
    with pytest.raises(WrongContract):
        await Token(rpc, token).permit(BOB, world.deployment.escrow, Amount(1), Seconds(1 << 40))
    await rpc.close()

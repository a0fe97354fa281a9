from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from eth_account import Account
from web3 import AsyncHTTPProvider, AsyncWeb3
from web3.exceptions import ContractCustomError

from tallystick.chain.codec import load_abi
from tallystick.chain.devnet import MAX_BATCH, MAX_BODY, build_app, dev_accounts
from tallystick.chain.evm import MAX_QUEUED
from tallystick.chain.rpc import Rpc
from tests.chain.harness import World, person, serving

TEST_SECONDS = 3_600
"""Longer than any test takes, on any machine."""

ALICE, BOB = dev_accounts(2)


@pytest.fixture
async def http(chain_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A bare HTTP client of the chain."""
    async with httpx.AsyncClient(base_url=chain_url, timeout=120) as client:
        yield client


async def _ask(http: httpx.AsyncClient, method: str, *params: object) -> Any:
    answer = (await http.post("/", json={"jsonrpc": "2.0", "id": 7, "method": method, "params": params})).json()
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", 7)
    return answer["result"] if "result" in answer else answer["error"]


def _transfer(nonce: int, **changes: object) -> str:
    fields = {"type": 2, "chainId": 31337, "nonce": nonce, "gas": 21_000, "value": 1, "to": person("payee").address}
    fields |= {"maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**9, "to": bytes.fromhex(person("payee").address[2:])} | changes
    return "0x" + bytes(Account.sign_transaction(fields, BOB.secret).raw_transaction).hex()


async def _nonce(http: httpx.AsyncClient) -> int:
    return int(await _ask(http, "eth_getTransactionCount", BOB.address, "pending"), 16)


def test_the_accounts_are_the_well_known_test_accounts() -> None:
    """The funded accounts are the first two keys of the common test mnemonic, which wallets and other test chains also have."""
    assert [a.address for a in dev_accounts(2)] == [
        "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266",
        "0x70997970c51812dc3a010c7d01b50e0d17dc79c8",
    ]


async def test_a_fresh_chain() -> None:
    """A new chain has the requested id, funded accounts and one block."""
    with serving(build_app(chain_id=4242, accounts=3)) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            assert await _ask(http, "eth_chainId") == hex(4242)
            assert await _ask(http, "net_version") == "4242"
            assert await _ask(http, "eth_blockNumber") == "0x0"
            assert await _ask(http, "eth_accounts") == [a.address for a in dev_accounts(3)]
            assert int(await _ask(http, "eth_getBalance", dev_accounts(3)[2].address, "latest"), 16) == 10**24
            assert int(await _ask(http, "eth_getBalance", dev_accounts(4)[3].address, "latest"), 16) == 0


async def test_web3_works_with_the_chain(chain_url: str) -> None:
    """web3's own calls work: balances, blocks, fees, a signed transfer and its receipt, code, logs and custom errors."""
    web3 = AsyncWeb3(AsyncHTTPProvider(chain_url))
    assert await web3.eth.chain_id == 31337
    tip, price, history = await asyncio.gather(
        web3.eth.max_priority_fee, web3.eth.gas_price, web3.eth.fee_history(4, "latest", [10, 50])
    )
    assert tip == 10**9 < price
    assert len(history["baseFeePerGas"]) == len(history["gasUsedRatio"]) + 1
    bob = web3.to_checksum_address(BOB.address)
    sent = await web3.eth.send_raw_transaction(_transfer(await web3.eth.get_transaction_count(bob)))  # type: ignore[arg-type]
    receipt = await web3.eth.wait_for_transaction_receipt(sent, timeout=60)
    assert (receipt["status"], receipt["gasUsed"]) == (1, 21_000)
    transaction = await web3.eth.get_transaction(sent)
    assert (transaction["from"], transaction["value"], transaction["input"]) == (bob, 1, b"")
    block = await web3.eth.get_block(receipt["blockNumber"], full_transactions=True)
    bodies: Any = block["transactions"]
    assert [body["hash"] for body in bodies] == [sent]
    assert (await web3.eth.get_block(block["hash"]))["number"] == receipt["blockNumber"]
    await web3.provider.disconnect()


async def test_custom_errors_reach_a_web3_library(world: World, chain_url: str) -> None:
    """A revert's data is returned by calls and by gas estimates."""
    web3 = AsyncWeb3(AsyncHTTPProvider(chain_url))
    to, data = web3.to_checksum_address(world.deployment.escrow), load_abi("Escrow").call("cashOut", BOB.address)
    for attempt in (web3.eth.call({"to": to, "data": data}), web3.eth.estimate_gas({"to": to, "data": data})):
        with pytest.raises(ContractCustomError) as caught:
            await attempt
        assert str(caught.value.data).endswith(BOB.address[2:])
    await web3.provider.disconnect()


async def test_batches(http: httpx.AsyncClient) -> None:
    """A batch is answered in order, including a malformed request within it."""
    batch = [{"jsonrpc": "2.0", "id": i, "method": m, "params": []} for i, m in enumerate(("eth_chainId", "nonsense"))]
    answers = (await http.post("/", json=[*batch, 5])).json()
    assert answers[0]["result"] == "0x7a69"
    assert [a.get("error", {}).get("code") for a in answers] == [None, -32601, -32600]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", -32700),
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b"5", -32600),
        (b"[]", -32600),
        (b"{}", -32600),
        (b'{"id": 1, "method": 5}', -32600),
        (b'{"id": 1, "method": "eth_call", "params": {}}', -32602),
        (b'{"id": 1, "method": "eth_call", "params": [5]}', -32602),
        (b'{"id": 1, "method": "eth_call", "params": [{"to": "0x12"}]}', -32602),
        (b'{"id": 1, "method": "eth_getBalance", "params": []}', -32602),
        (b'{"id": 1, "method": "eth_getBalance", "params": ["0xzz", "latest"]}', -32602),
        (b'{"id": 1, "method": "eth_getBlockByNumber", "params": ["later", false]}', -32602),
        (b'{"id": 1, "method": "eth_getLogs", "params": [{"fromBlock": -1}]}', -32602),
        (b'{"id": 1, "method": "eth_sendRawTransaction", "params": ["0x02ff"]}', -32000),
        (b'{"id": 1, "method": "eth_sendRawTransaction", "params": ["0x"]}', -32000),
        (b'{"id": 1, "method": "evm_setNextBlockTimestamp", "params": ["0x1"]}', -32000),
        (b'{"id": 1, "method": "eth_call", "params": [{"to": null}, "0xffffff"]}', -32000),
    ],
)
async def test_malformed_requests_are_answered(http: httpx.AsyncClient, body: bytes, code: int) -> None:
    """Every malformed request gets a JSON-RPC error, and the chain keeps working."""
    answer = await http.post("/", content=body)
    assert answer.json()["error"]["code"] == code
    assert await _ask(http, "eth_chainId") == "0x7a69"


async def test_sizes_are_bounded(http: httpx.AsyncClient) -> None:
    """A body or a batch above the limit is refused."""
    assert (await http.post("/", content=b" " * (MAX_BODY + 1))).status_code == 413
    batch = [{"jsonrpc": "2.0", "id": 1, "method": "eth_chainId"}] * (MAX_BATCH + 1)
    assert (await http.post("/", json=batch)).json()["error"]["code"] == -32600


async def test_nonces(http: httpx.AsyncClient) -> None:
    """A transaction with a later nonce waits; a used nonce, an account without funds and another chain id are refused."""
    nonce = await _nonce(http)
    later = await _ask(http, "eth_sendRawTransaction", _transfer(nonce + 1))
    assert await _ask(http, "eth_getTransactionReceipt", later) is None
    first = await _ask(http, "eth_sendRawTransaction", _transfer(nonce))
    numbers = [int((await _ask(http, "eth_getTransactionReceipt", key))["blockNumber"], 16) for key in (first, later)]
    assert numbers[1] == numbers[0] + 1
    assert "nonce too low" in (await _ask(http, "eth_sendRawTransaction", _transfer(nonce)))["message"]
    for changes in ({"value": 10**30}, {"chainId": 1}, {"gas": 20_000}, {"maxFeePerGas": 10**9, "maxPriorityFeePerGas": 10**10}):
        answer = await _ask(http, "eth_sendRawTransaction", _transfer(nonce + 2, **changes))
        assert isinstance(answer, dict), changes
        assert answer["code"] == -32000
    assert await _nonce(http) == nonce + 2


async def test_pending_transactions_are_bounded() -> None:
    """The number of pending transactions that can never run is bounded."""
    with serving(build_app()) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            for start in range(1, MAX_QUEUED + 1, MAX_BATCH):
                batch = [
                    {"jsonrpc": "2.0", "id": n, "method": "eth_sendRawTransaction", "params": [_transfer(n)]}
                    for n in range(start, start + MAX_BATCH)
                ]
                assert all("result" in answer for answer in (await http.post("/", json=batch)).json())
            assert "full" in (await _ask(http, "eth_sendRawTransaction", _transfer(MAX_QUEUED + 1)))["message"]


async def test_the_clock_can_be_moved(http: httpx.AsyncClient) -> None:
    """The clock moves by the requested interval, or to the requested second."""
    before = int((await _ask(http, "eth_getBlockByNumber", "latest", False))["timestamp"], 16)
    await _ask(http, "evm_increaseTime", 1_000_000)
    await _ask(http, "evm_mine")
    after = int((await _ask(http, "eth_getBlockByNumber", "latest", False))["timestamp"], 16)
    assert 1_000_000 <= after - before <= 1_000_000 + TEST_SECONDS
    await _ask(http, "evm_setNextBlockTimestamp", after + 500)
    await _ask(http, "evm_mine", "0x3")
    blocks = int(await _ask(http, "eth_blockNumber"), 16)
    assert int((await _ask(http, "eth_getBlockByNumber", hex(blocks - 2), False))["timestamp"], 16) == after + 500


async def test_the_pending_block(either: World) -> None:
    """The pending block has the time that a transaction would get now: at least the last block's, and moved with the clock."""
    last = await either.rpc.timestamp()
    assert last <= await either.rpc.now() <= last + TEST_SECONDS
    await either.rpc.request("evm_increaseTime", 1_000_000)
    assert 1_000_000 <= await either.rpc.now() - last <= 1_000_000 + TEST_SECONDS
    result = await either.escrow.set_fee(either.deployer, 1)
    block = await either.rpc.block(result.block)
    assert block is not None
    assert 1_000_000 <= block.timestamp - last <= 1_000_000 + TEST_SECONDS


async def test_snapshot_and_revert(http: httpx.AsyncClient) -> None:
    """A revert removes blocks, balances, receipts and logs after the snapshot; a snapshot that was reverted is unknown."""
    payee = person("payee").address
    mark, nonce = await _ask(http, "evm_snapshot"), await _nonce(http)
    balance = await _ask(http, "eth_getBalance", payee, "latest")
    sent = await _ask(http, "eth_sendRawTransaction", _transfer(nonce))
    reverted_snapshot = await _ask(http, "evm_snapshot")
    assert await _ask(http, "eth_getBalance", payee, "latest") != balance
    assert await _ask(http, "evm_revert", mark) is True
    assert await _ask(http, "eth_getBalance", payee, "latest") == balance
    assert await _ask(http, "eth_getTransactionReceipt", sent) is None
    assert await _nonce(http) == nonce
    assert await _ask(http, "evm_revert", reverted_snapshot) is False
    assert await _ask(http, "eth_sendRawTransaction", _transfer(nonce)) == sent


async def test_earlier_states_can_be_read(http: httpx.AsyncClient) -> None:
    """The state of earlier blocks can be read by number, by tag and by hash."""
    payee, nonce = person("historian").address, await _nonce(http)
    to = bytes.fromhex(payee[2:])
    await _ask(http, "eth_sendRawTransaction", _transfer(nonce, to=to))
    block = await _ask(http, "eth_getBlockByNumber", "latest", False)
    await _ask(http, "eth_sendRawTransaction", _transfer(nonce + 1, to=to))
    for at in (block["number"], {"blockNumber": block["number"]}, {"blockHash": block["hash"]}):
        assert await _ask(http, "eth_getBalance", payee, at) == "0x1"
    assert await _ask(http, "eth_getBalance", payee, "earliest") == "0x0"
    assert await _ask(http, "eth_getBalance", payee, "pending") == "0x2"


async def test_logs_are_filtered(world: World, rpc: Rpc) -> None:
    """Logs are filtered by address, by topics with alternatives and wildcards, by block range and by block hash."""
    start = hex(await rpc.block_number() + 1)
    for name in ("a", "b"):
        await world.purse(person(f"{name} key"), person("owner"), 0)
    opened = [log async for log in _logs(rpc, {"address": world.deployment.escrow, "fromBlock": start})]
    assert len(opened) == 2
    kind, key = opened[0]["topics"][0], opened[1]["topics"][1]
    for criteria, expected_count in (
        ({"topics": [kind]}, 2),
        ({"topics": [None, key]}, 1),
        ({"topics": [kind, [key, opened[0]["topics"][1]]]}, 2),
        ({"topics": ["0x" + "00" * 32]}, 0),
        ({"topics": [None, None, None, None]}, 0),
        ({"toBlock": opened[0]["blockNumber"]}, 1),
        ({"address": [world.deployment.escrow, world.deployment.token]}, 2),
        ({"address": person("nobody").address}, 0),
    ):
        fields = {"address": world.deployment.escrow, "fromBlock": start} | criteria
        assert len([log async for log in _logs(rpc, fields)]) == expected_count, criteria
    assert [log async for log in _logs(rpc, {"blockHash": opened[0]["blockHash"]})] == opened[:1]


async def _logs(rpc: Rpc, wanted: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for log in await rpc.request("eth_getLogs", wanted):
        yield log


async def test_health_does_not_wait_for_the_chain(http: httpx.AsyncClient) -> None:
    """The health endpoint answers while the chain mines a thousand blocks."""
    answered_meanwhile = False
    for _ in range(10):  # one answer may be late on a busy machine
        busy = asyncio.create_task(_ask(http, "evm_mine", 1_000))
        await asyncio.sleep(0.1)
        answer = await asyncio.wait_for(http.get("/health"), 60)
        assert answer.json() == {"status": "ok", "chain_id": 31337}
        answered_meanwhile = answered_meanwhile or not busy.done()
        await busy
        if answered_meanwhile:
            break
    assert answered_meanwhile

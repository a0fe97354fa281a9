from __future__ import annotations

from collections.abc import Callable

import pytest

from tallystick.chain.calldata import MAX_ROWS, find_claims, find_orders
from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.codec import load_abi
from tallystick.chain.events import Settled
from tallystick.chain.rpc import Rpc
from tallystick.chain.settlements import MAX_REQUESTS, MAX_TRANSACTIONS, settling_claims, settling_orders
from tallystick.protocol.codecs import keccak
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.types import Address, Amount
from tests.chain.faulty_proxy import Proxy
from tests.chain.harness import DOLLAR, World, person

KEY, OWNER, PROVIDER, OTHER, STRANGER = (person(name) for name in ("key", "owner", "provider", "other", "stranger"))
FORWARDER = bytes.fromhex("601980600b6000396000f3602436038060246000376000600082600060006004355af100")
"""Creates a contract that calls the address in its second word with what follows."""

NONSENSE: list[object] = [None, 5, [], {"calls": {"to": 1}}]


def _call(*claims: ClaimBatch) -> bytes:
    return load_abi("Escrow").call("settle", [claim.encode() for claim in claims])


async def _paid(world: World, *rows: SettleRow, by: ClaimBatch | None = None) -> str:
    result = await world.escrow.settle(world.deployer, [by or world.claim(PROVIDER, *rows)])
    assert result.of(Settled)
    return result.hash


# ------------------------------------------------------------------------------------------------------------ on a chain


async def test_a_payment_is_explained_by_the_order_of_the_payers_own_key(world: World) -> None:
    """The newest settlement has an order that the payer's key signed, with a ceiling of at least the settled total."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    first = await _paid(world, world.row(KEY, PROVIDER.address, 5))
    row = SettleRow(world.order(KEY, PROVIDER.address, DOLLAR), 7, Amount(DOLLAR - 1))
    second = await _paid(world, row)
    orders = await settling_orders(world.escrow, KEY.address, PROVIDER.address)
    assert [settling.transaction for settling in orders] == [second, first]
    newest = orders[0]
    assert (newest.order.message, newest.seq, newest.cumulative_cost) == (row.order.message, 7, DOLLAR - 1)
    settled = (await world.escrow.tab(KEY.address, PROVIDER.address)).settled
    assert newest.order.message.ceiling >= settled
    assert await settling_orders(world.escrow, KEY.address, PROVIDER.address, enough=settled) == [newest]


async def test_orders_of_other_tabs_explain_nothing(world: World) -> None:
    """Among rows of other payers and providers in one transaction, only the tab's own order is found."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.purse(OTHER, OWNER, 10 * DOLLAR)
    own_row, other_row = world.row(KEY, PROVIDER.address, 3), world.row(OTHER, PROVIDER.address, 4)
    elsewhere = world.claim(STRANGER, world.row(KEY, STRANGER.address, 9))
    await world.escrow.settle(world.deployer, [elsewhere, world.claim(PROVIDER, other_row, own_row)])
    (settling,) = await settling_orders(world.escrow, KEY.address, PROVIDER.address)
    assert settling.order.message == own_row.order.message
    assert await settling_orders(world.escrow, KEY.address, OTHER.address) == []


async def test_a_settlement_through_another_contract_is_found(world: World) -> None:
    """If a wallet or a multicall makes the call, order and claim are found in the outer call's calldata."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    forwarder = (await world.deployer.send(None, FORWARDER)).created
    row = world.row(KEY, PROVIDER.address, 5)
    call = b"\xaa" * 4 + bytes.fromhex(world.deployment.escrow[2:]).rjust(32, b"\0") + _call(world.claim(PROVIDER, row))
    assert forwarder is not None
    await world.deployer.send(forwarder, call, gas=500_000)
    (order,) = await settling_orders(world.escrow, KEY.address, PROVIDER.address)
    (claim,) = await settling_claims(world.escrow, KEY.address, PROVIDER.address)
    assert order.order.message == row.order.message
    assert claim.calldata_claim.claim.message.rows[0].order_hash == order.order.digest


async def test_a_settlement_out_of_other_data_is_found_where_the_endpoint_traces(world: World, proxy_of_world: Proxy) -> None:
    """If a contract builds the call from data outside its calldata, it is found with debug_traceTransaction."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    row = world.row(KEY, PROVIDER.address, 5)
    claim = world.claim(PROVIDER, row)
    await _paid(world, by=claim)
    escrow = type(world.escrow)(Rpc(proxy_of_world.url), world.deployment)
    proxy_of_world.answers["eth_getTransactionByHash"] = {"to": STRANGER.address, "input": "0x12345678"}
    assert await settling_claims(escrow, KEY.address, PROVIDER.address) == []
    inner = {"to": world.deployment.escrow.upper().replace("X", "x"), "input": "0x" + _call(claim).hex(), "calls": None}
    trace = {
        "to": STRANGER.address,
        "input": "0x12345678",
        "calls": [5, {"to": OTHER.address, "calls": [inner]}, {"input": "0x"}],
    }
    proxy_of_world.answers["debug_traceTransaction"] = trace
    (order,) = await settling_orders(escrow, KEY.address, PROVIDER.address)
    (settling,) = await settling_claims(escrow, KEY.address, PROVIDER.address)
    assert order.order.message == row.order.message
    assert settling.calldata_claim.claim.message == claim.claim(world.domain)
    for nonsense in NONSENSE:
        proxy_of_world.answers["debug_traceTransaction"] = nonsense
        assert await settling_claims(escrow, KEY.address, PROVIDER.address) == []
    await escrow.rpc.close()


async def test_an_endpoint_that_makes_settlements_up_shows_no_order(world: World, proxy_of_world: Proxy) -> None:
    """Calldata with a payment that the key never allowed, or with an altered or unsigned order, gives no order."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    await _paid(world, world.row(KEY, PROVIDER.address, 5))
    lies = world.order(STRANGER, PROVIDER.address, 9 * DOLLAR)
    forged = SettleRow(type(lies)(world.order(KEY, PROVIDER.address, 9 * DOLLAR).message, lies.signature), 1, Amount(9))
    call = "0x" + _call(ClaimBatch(PROVIDER.address, (forged,), bytes(65))).hex()
    proxy_of_world.answers["eth_getTransactionByHash"] = {"to": world.deployment.escrow, "input": call}
    escrow = type(world.escrow)(Rpc(proxy_of_world.url), world.deployment)
    assert await settling_orders(escrow, KEY.address, PROVIDER.address) == []
    assert await settling_claims(escrow, KEY.address, PROVIDER.address) == []
    await escrow.rpc.close()


@pytest.mark.parametrize("answer", [5, {}, {"input": None}, {"input": "0xzz"}, {"input": ["0x"]}], ids=str)
async def test_a_malformed_transaction_is_the_endpoints_fault(world: World, proxy_of_world: Proxy, answer: object) -> None:
    """A malformed transaction raises Unavailable and never gives an order."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    await _paid(world, world.row(KEY, PROVIDER.address, 5))
    proxy_of_world.answers["eth_getTransactionByHash"] = answer
    escrow = type(world.escrow)(Rpc(proxy_of_world.url), world.deployment)
    with pytest.raises(Unavailable):
        await settling_orders(escrow, KEY.address, PROVIDER.address)
    await escrow.rpc.close()


async def test_an_endpoint_cannot_keep_a_search_busy_for_ever(world: World, proxy_of_world: Proxy) -> None:
    """A chain that reports 2^60 empty blocks, or any number of payments, causes a bounded number of requests."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    escrow = type(world.escrow)(Rpc(proxy_of_world.url), world.deployment)
    proxy_of_world.most_blocks = 4_000
    proxy_of_world.answers |= {"eth_blockNumber": hex(1 << 60), "eth_getLogs": []}
    assert await settling_orders(escrow, KEY.address, PROVIDER.address) == []
    assert proxy_of_world.calls["eth_getLogs"] <= MAX_REQUESTS
    proxy_of_world.reset()
    for n in range(MAX_TRANSACTIONS + 2):
        await _paid(world, world.row(KEY, PROVIDER.address, n + 1))
    assert len(await settling_orders(escrow, KEY.address, PROVIDER.address)) == MAX_TRANSACTIONS
    assert proxy_of_world.calls["eth_getTransactionByHash"] == MAX_TRANSACTIONS
    await escrow.rpc.close()


async def test_a_search_goes_back_over_many_ranges(world: World, proxy_of_world: Proxy) -> None:
    """If an endpoint serves few blocks at a time, the search asks for fewer until the payment is found."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    transaction = await _paid(world, world.row(KEY, PROVIDER.address, 5))
    for _ in range(30):
        await world.rpc.request("evm_mine")
    proxy_of_world.most_blocks = 3
    escrow = type(world.escrow)(Rpc(proxy_of_world.url), world.deployment)
    assert [settling.transaction for settling in await settling_orders(escrow, KEY.address, PROVIDER.address)] == [transaction]
    await escrow.rpc.close()


# --------------------------------------------------------------------------------------------------------------- pure


async def test_claims_are_read_as_the_contract_reads_them(world: World) -> None:
    """A claim whose rows precede it, with a backward offset and unused bits set, pays and is found."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    claim = world.claim(PROVIDER, world.row(KEY, PROVIDER.address, 5))
    _, (row,), signature = claim.encode()
    words = [n.to_bytes(32, "big") if isinstance(n, int) else n for n in row]
    words[3] = b"\xff" * 18 + words[3][18:]
    body = (1).to_bytes(32, "big") + b"".join(words)

    def number(value: int) -> bytes:
        return (value % (1 << 256)).to_bytes(32, "big")

    # the argument's offset, the rows, the list of one claim, the claim's head, its signature
    before = number(32 + len(body)) + body + number(1) + number(32)
    head = bytes.fromhex(PROVIDER.address[2:]).rjust(32, b"\0") + number(32 - len(before)) + number(96)
    call = _call()[:4] + before + head + number(65) + signature.ljust(96, b"\0")
    mined = await world.deployer.send(world.deployment.escrow, call)
    assert mined.logs
    assert (await world.escrow.tab(KEY.address, PROVIDER.address)).settled == 5
    (settling,) = await settling_claims(world.escrow, KEY.address, PROVIDER.address)
    assert (settling.calldata_claim.claim.message, settling.calldata_claim.claim.signature) == (
        claim.claim(world.domain),
        claim.signature,
    )
    (order,) = await settling_orders(world.escrow, KEY.address, PROVIDER.address)
    assert order.order.message == claim.rows[0].order.message


def _overlapping_claims(provider: Address, payer: Address, claims: int, rows: int) -> bytes:
    """Claims that share all their rows: short calldata with much work to decode."""
    row = bytes.fromhex(payer[2:]) + bytes(204)
    region = rows.to_bytes(32, "big") + row * rows
    data = region
    for n in range(claims):
        head = bytes.fromhex(provider[2:]).rjust(32, b"\0")
        data += head + (-len(data) % (1 << 256)).to_bytes(32, "big") + (96).to_bytes(32, "big")
        data += (65).to_bytes(32, "big") + keccak(n.to_bytes(4, "big")) * 3
    return data


async def test_overlapping_claims_do_not_cost_a_reader_more_than_it_allows(world: World) -> None:
    """Calldata in which hundreds of claims share their rows is given up after MAX_ROWS rows."""
    call = _overlapping_claims(PROVIDER.address, KEY.address, 400, 4_000)
    assert MAX_ROWS * 50 < 400 * 4_000
    assert list(find_claims(call, PROVIDER.address, KEY.address, world.domain)) == []
    assert list(find_orders(call, KEY.address, PROVIDER.address, world.domain)) == []


@pytest.fixture
def proxy_of_world(chain_url: str, proxies: Callable[[str], Proxy]) -> Proxy:
    """A proxy in front of the embedded chain."""
    return proxies(chain_url)

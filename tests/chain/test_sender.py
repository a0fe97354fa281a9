from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tallystick.chain.codec import ContractError
from tallystick.chain.devnet import dev_accounts
from tallystick.chain.rpc import Replaced, Rpc, Sender
from tallystick.protocol.eip712 import Signer
from tallystick.protocol.errors import Code, Refusal, Unavailable
from tallystick.protocol.types import Address, Amount
from tests.chain.faulty_proxy import Fault, Proxy
from tests.chain.harness import World, person

ALICE, BOB = dev_accounts(2)
COIN = 10**18


async def _funded_key(rpc: Rpc, name: str) -> Signer:
    """A key with coins that no other test uses, so its transactions are only this test's."""
    signer = person(f"{name} {await rpc.block_number()}")
    await Sender(rpc, BOB, poll=0.001).send(signer.address, b"", value=COIN)
    return signer


async def _count(rpc: Rpc, account: Address, block: str = "latest") -> int:
    return await rpc.quantity("eth_getTransactionCount", account, block)


@pytest.fixture
async def manual(anvil_url: str) -> AsyncIterator[Rpc]:
    """An anvil chain that mines only on request."""
    rpc = Rpc(anvil_url)
    await rpc.request("evm_setAutomine", False)
    yield rpc
    await rpc.request("anvil_dropAllTransactions")
    await rpc.request("evm_setAutomine", True)
    await rpc.close()


async def _until(condition: Any, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------- nonces, fees


async def test_concurrent_sends_never_collide(either_rpc: Rpc) -> None:
    """Forty concurrent sends from one key all arrive, each once."""
    signer, payee = await _funded_key(either_rpc, "busy"), person("many").address
    before = await either_rpc.balance(payee)
    sender = Sender(either_rpc, signer, poll=0.001)
    results = await asyncio.gather(*(sender.send(payee, b"", value=1) for _ in range(40)))
    assert len({mined.hash for mined in results}) == 40
    assert await either_rpc.balance(payee) - before == 40
    assert await _count(either_rpc, signer.address) == 40


async def test_refused_sends_among_others_leave_no_hole(either: World) -> None:
    """Refused sends among many concurrent ones use no nonce, and the others all succeed."""
    sender, payee = Sender(either.rpc, await _funded_key(either.rpc, "mixed"), poll=0.001), person("payee").address
    refused = either.escrow.calldata("cashOut", payee)

    async def send(number: int) -> None:
        if number % 3:
            await sender.send(payee, b"", value=number)
        elif number % 2:  # refused by the gas estimate, before it is sent
            await sender.send(either.deployment.escrow, refused)
        else:  # refused by the node: more than the account's balance
            await sender.send(payee, b"", value=2 * COIN, gas=21_000)

    results = await asyncio.gather(*map(send, range(1, 19)), return_exceptions=True)
    codes = [result.code for result in results if isinstance(result, Refusal)]
    assert len(codes) == 6
    assert set(codes) == {Code.INSUFFICIENT_FUNDS}
    assert [result for result in results if not isinstance(result, Refusal)] == [None] * 12
    assert await _count(either.rpc, sender.address, "pending") == 12


async def test_a_foreign_transaction_does_not_stop_a_sender(either_rpc: Rpc) -> None:
    """If another program used the next nonce, the sender continues with the nonce after it."""
    signer = await _funded_key(either_rpc, "shared")
    first, second = Sender(either_rpc, signer, poll=0.001), Sender(either_rpc, signer, poll=0.001)
    payee = person("shared payee").address
    before = await either_rpc.balance(payee)
    for value, sender in enumerate((first, second, first, first, second)):
        await sender.send(payee, b"", value=value)
    assert await either_rpc.balance(payee) - before == 10


async def test_two_programs_of_one_key_at_once(either_rpc: Rpc) -> None:
    """With two programs sending from one key, each send happens exactly once or raises an error."""
    signer, payee = await _funded_key(either_rpc, "torn"), person("torn payee").address
    before = await either_rpc.balance(payee)
    senders = [Sender(either_rpc, signer, poll=0.001, bump_after=0.2) for _ in range(2)]
    values = [1 << number for number in range(16)]
    sends = (senders[value % 3 % 2].send(payee, b"", value=value) for value in values)
    results = await asyncio.gather(*sends, return_exceptions=True)
    assert all(isinstance(error, Unavailable) for error in results if isinstance(error, BaseException))
    happened = sum(value for value, result in zip(values, results, strict=True) if not isinstance(result, BaseException))
    assert await either_rpc.balance(payee) - before == happened


async def test_a_refused_send_uses_no_nonce(either: World) -> None:
    """After a refused send the next transaction succeeds."""
    sender = await either.sender(person("clumsy"))
    with pytest.raises(ContractError, match="NoCredit"):
        await either.escrow.cash_out(sender, sender.address)
    await either.escrow.set_fee(sender, 5)
    with pytest.raises(Refusal) as caught:
        await Sender(either.rpc, person("penniless")).send(sender.address, b"", value=1)
    assert caught.value.code is Code.INSUFFICIENT_FUNDS
    await either.escrow.set_fee(sender, 6)


async def test_a_mined_failure_is_named_too(either: World) -> None:
    """A transaction that is mined and fails raises the contract's error, and the sender continues."""
    sender = await either.sender(person("late"))
    call = either.escrow.calldata("cashOut", sender.address)
    with pytest.raises(ContractError, match="NoCredit") as caught:
        await sender.send(either.deployment.escrow, call, gas=200_000)
    assert caught.value.name == "NoCredit"
    await either.escrow.set_fee(sender, 6)


async def test_a_contract_error_without_a_better_code_is_chain_refused(either: World) -> None:
    """A contract's refusal has another code than a malformed message."""
    with pytest.raises(ContractError) as caught:
        await either.escrow.withdraw_stake(either.deployer)
    assert (caught.value.code, caught.value.status) == (Code.CHAIN_REFUSED, 409)


async def test_fees_follow_the_market(manual: Rpc) -> None:
    """After a tenfold rise of the base fee, the next transaction offers enough."""
    sender = Sender(manual, await _fund(manual, "market"), poll=0.001)
    bids = []
    for base in (10**9, 10**10):
        await manual.request("anvil_setNextBlockBaseFeePerGas", hex(base))
        await manual.request("evm_mine")
        sending = asyncio.create_task(sender.send(ALICE.address, b"", value=1))
        await _until(lambda: _is_pending(manual, sender.address))
        (waiting,) = await _waiting(manual, sender.address)
        bids.append(int(waiting["maxFeePerGas"], 16))
        await manual.request("evm_mine")
        await sending
    assert bids[0] > 10**9
    assert bids[1] > 10**10


async def _fund(rpc: Rpc, name: str) -> Signer:
    """Gives an account coins while nothing is mined automatically."""
    signer = person(f"{name} {await rpc.block_number()}")
    await rpc.request("anvil_setBalance", signer.address, hex(COIN))
    return signer


async def _waiting(rpc: Rpc, account: Address) -> list[dict[str, Any]]:
    """Returns an account's pending transactions, by nonce."""
    pool: dict[str, dict[str, dict[str, Any]]] = (await rpc.request("txpool_content"))["pending"]
    transactions: dict[str, dict[str, Any]] = next((queue for address, queue in pool.items() if address.lower() == account), {})
    return [transactions[nonce] for nonce in sorted(transactions, key=int)]


async def _is_pending(rpc: Rpc, account: Address) -> bool:
    return bool(await _waiting(rpc, account))


# ------------------------------------------------------------------------------------------------- stuck, replaced, taken back


async def test_a_stuck_transaction_is_replaced(manual: Rpc) -> None:
    """A transaction that waits too long is replaced at the same nonce, with fees 10 % higher, until one version is mined."""
    sender = Sender(manual, await _fund(manual, "stuck"), poll=0.01, bump_after=0.2)
    before = await manual.balance(BOB.address)
    sending = asyncio.create_task(sender.send(BOB.address, b"", value=7))
    await _until(lambda: _is_pending(manual, sender.address))
    (first,) = await _waiting(manual, sender.address)

    async def replaced() -> bool:
        return [waiting["hash"] for waiting in await _waiting(manual, sender.address)] != [first["hash"]]

    await _until(replaced)
    await manual.request("evm_mine")
    mined = await sending
    for fee in ("maxFeePerGas", "maxPriorityFeePerGas"):
        transaction = await manual.request("eth_getTransactionByHash", mined.hash)
        assert 10 * int(transaction[fee], 16) >= 11 * int(first[fee], 16)
    assert mined.hash != first["hash"]
    assert (await manual.balance(BOB.address) - before, await _count(manual, sender.address, "pending")) == (7, 1)


async def test_the_original_may_be_mined(proxy: Proxy, through: Rpc, either_rpc: Rpc) -> None:
    """If the original is mined after its replacement was sent, the original's receipt is returned."""
    signer = await _funded_key(either_rpc, "original")
    proxy.plan("eth_sendRawTransaction", Fault.LOSE)
    proxy.answers["eth_getTransactionReceipt"] = None  # the node reports the receipt late

    async def speak() -> None:
        await _until(lambda: _sent(proxy, 3))
        del proxy.answers["eth_getTransactionReceipt"]

    sender = Sender(through, signer, poll=0.01, bump_after=0.1)
    mined, _ = await asyncio.gather(sender.send(ALICE.address, b"", value=3), speak(), return_exceptions=True)
    if isinstance(mined, Replaced):  # two queries found the nonce used and no receipt
        pytest.fail("the original was taken for lost")
    assert not isinstance(mined, BaseException)
    assert mined.gas_used == 21_000
    assert await _count(either_rpc, signer.address) == 1


async def _sent(proxy: Proxy, times: int) -> bool:
    return proxy.calls["eth_getTransactionReceipt"] >= times


@pytest.mark.parametrize("fault", [Fault.SWALLOW, Fault.LOSE, Fault.HANG, Fault.CUT, Fault.BROKEN], ids=lambda f: f.name)
async def test_a_send_that_goes_wrong_arrives_once(proxy: Proxy, through: Rpc, either_rpc: Rpc, fault: Fault) -> None:
    """A transaction that is lost on either way, or dropped by the node, is sent again and happens once."""
    signer, payee = await _funded_key(either_rpc, "once"), person(f"once {fault.name}").address
    before = await either_rpc.balance(payee)
    proxy.plan("eth_sendRawTransaction", fault, fault, fault)
    sender = Sender(through, signer, poll=0.01, bump_after=0.3)
    mined = await asyncio.gather(*(sender.send(payee, b"", value=1) for _ in range(3)))
    assert len({transaction.hash for transaction in mined}) == 3
    assert await either_rpc.balance(payee) - before == 3
    assert await _count(either_rpc, signer.address, "pending") == 3


@pytest.mark.parametrize(
    "fault", [Fault.RATE_LIMIT, Fault.LIMIT_ERROR, Fault.GARBAGE, Fault.CUT, Fault.HANG], ids=lambda f: f.name
)
async def test_waiting_outlasts_an_endpoint_that_fails(proxy: Proxy, through: Rpc, either_rpc: Rpc, fault: Fault) -> None:
    """While a transaction is pending, the sender waits for an endpoint that does not answer."""
    proxy.plan("eth_getTransactionReceipt", *[fault] * 5)
    signer = await _funded_key(either_rpc, "patient")
    mined = await Sender(through, signer, poll=0.01).send(ALICE.address, b"", value=1)
    assert mined.gas_used == 21_000


async def test_a_foreign_transaction_at_the_nonce_is_reported(proxy: Proxy, through: Rpc, either_rpc: Rpc) -> None:
    """If another program's transaction takes the nonce of a sent one, the latter is reported as replaced; the next one
    succeeds.
    """
    signer, payee = await _funded_key(either_rpc, "stolen"), person("thief's payee").address
    before = await either_rpc.balance(payee)
    proxy.plan("eth_sendRawTransaction", Fault.SWALLOW)
    ours = Sender(through, signer, poll=0.01, bump_after=0.2)
    sending = asyncio.create_task(ours.send(payee, b"", value=5))
    await _until(lambda: _sent(proxy, 1))
    await Sender(either_rpc, signer, poll=0.001).send(payee, b"", value=1)
    with pytest.raises(Replaced, match="another program") as caught:
        await sending
    assert caught.value.retry
    await ours.send(payee, b"", value=2)
    assert await either_rpc.balance(payee) - before == 3


async def test_higher_fees_that_the_account_cannot_pay(manual: Rpc) -> None:
    """If the account cannot pay for a replacement, the sender keeps waiting for the original."""
    signer = await _fund(manual, "poor")
    sender = Sender(manual, signer, poll=0.01, bump_after=0.1)
    sending = asyncio.create_task(sender.send(ALICE.address, b"", value=1, gas=21_000))
    await _until(lambda: _is_pending(manual, signer.address))
    (first,) = await _waiting(manual, signer.address)
    await manual.request("anvil_setBalance", signer.address, hex(21_000 * int(first["maxFeePerGas"], 16) + 1))
    await asyncio.sleep(0.4)
    await manual.request("evm_mine")
    assert (await sending).hash == first["hash"]


async def test_fees_stop_at_their_limit(manual: Rpc) -> None:
    """A fee limit allows only replacements below it."""
    signer = await _fund(manual, "limited")
    latest, tip = await manual.block(), await manual.quantity("eth_maxPriorityFeePerGas")
    assert latest is not None
    assert latest.base_fee is not None
    limit = (2 * latest.base_fee + tip) * 115 // 100
    sender = Sender(manual, signer, poll=0.01, bump_after=0.1, max_fee=limit)
    sending = asyncio.create_task(sender.send(ALICE.address, b"", value=1))

    async def is_at_limit() -> bool:
        fees = [int(waiting["maxFeePerGas"], 16) for waiting in await _waiting(manual, signer.address)]
        assert all(fee <= limit for fee in fees)
        return any(fee > limit * 95 // 100 for fee in fees)

    await _until(is_at_limit)
    (waiting,) = await _waiting(manual, signer.address)
    await manual.request("evm_mine")
    assert (await sending).hash == waiting["hash"]


async def test_the_nonce_of_an_abandoned_transaction_is_used_again(manual: Rpc) -> None:
    """After the deadline the send raises an error, and the next transaction takes its nonce, so only one of the two can
    happen.
    """
    sender = Sender(manual, await _fund(manual, "deadline"), poll=0.01, deadline=0.3)
    before = await manual.balance(BOB.address)
    with pytest.raises(Unavailable, match="not mined within"):
        await sender.send(BOB.address, b"", value=100)
    sending = asyncio.create_task(sender.send(BOB.address, b"", value=1))

    async def taken_over() -> bool:
        return [int(waiting["value"], 16) for waiting in await _waiting(manual, sender.address)] == [1]

    await _until(taken_over)
    await manual.request("evm_mine")
    await sending
    await manual.request("evm_mine")
    assert (await manual.balance(BOB.address) - before, await _count(manual, sender.address, "pending")) == (1, 1)


async def test_a_transaction_comes_back_after_a_reorg(manual: Rpc) -> None:
    """With confirmations, a transaction in a removed block does not count: it is sent again and confirmed in another block."""
    sender = Sender(manual, await _fund(manual, "confirmed"), poll=0.01, bump_after=0.5, confirmations=2)
    before = await manual.balance(BOB.address)
    mark = await manual.request("evm_snapshot")
    sending = asyncio.create_task(sender.send(BOB.address, b"", value=9))
    await _until(lambda: _is_pending(manual, sender.address))
    await manual.request("evm_mine")
    await manual.request("evm_mine")
    await asyncio.sleep(0.1)
    assert not sending.done()
    assert await manual.request("evm_revert", mark)
    await manual.request("evm_mine")  # a block without it
    assert await _count(manual, sender.address) == 0
    await _until(lambda: _is_pending(manual, sender.address))
    for _ in range(3):
        await manual.request("evm_mine")
    mined = await sending
    assert (await manual.balance(BOB.address) - before, await _count(manual, sender.address)) == (9, 1)
    assert await manual.block_number() - mined.block >= 2


async def test_too_few_confirmations_have_a_deadline(either_rpc: Rpc) -> None:
    """If no further block is mined, the wait for confirmations ends with an error that says so."""
    sender = Sender(either_rpc, await _funded_key(either_rpc, "lonely"), poll=0.01, deadline=0.3, confirmations=3)
    with pytest.raises(Unavailable, match="fewer than 3 confirmations within"):
        await sender.send(ALICE.address, b"", value=1)


async def test_nonces_are_reused_after_a_reorg(either_rpc: Rpc) -> None:
    """After a reorganization that dropped its transactions, a sender uses their nonces again."""
    signer, payee = await _funded_key(either_rpc, "rewound"), person("rewound payee").address
    sender = Sender(either_rpc, signer, poll=0.001)
    mark, before = await either_rpc.request("evm_snapshot"), await either_rpc.balance(payee)
    for _ in range(3):
        await sender.send(payee, b"", value=5)
    assert await either_rpc.request("evm_revert", mark)
    await asyncio.gather(*(sender.send(payee, b"", value=1) for _ in range(3)))
    assert (await either_rpc.balance(payee) - before, await _count(either_rpc, signer.address)) == (3, 3)


async def test_cancelling_a_send_leaves_no_hole(proxy: Proxy, through: Rpc, either_rpc: Rpc) -> None:
    """Cancelling a caller whose transaction is not sent yet does not block later transactions."""
    signer = await _funded_key(either_rpc, "fickle")
    proxy.plan("eth_sendRawTransaction", Fault.SWALLOW)
    sender = Sender(through, signer, poll=0.01)
    sending = asyncio.create_task(sender.send(ALICE.address, b"", value=1))
    await _until(lambda: _sent(proxy, 1))
    sending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sending
    await sender.send(ALICE.address, b"", value=1)
    assert await _count(either_rpc, signer.address) == 1


async def test_a_sender_shows_no_secret(world: World) -> None:
    """The representations of the sender and of its signer do not contain the key."""
    sender = await world.sender(person("quiet"))
    assert person("quiet").secret.hex() not in f"{sender!r} {sender.signer!r} {vars(sender)!r}"
    assert Amount(0) == await world.escrow.token.balance_of(sender.address)

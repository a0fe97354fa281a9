from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from coordinator.chain.claim_value import NOTHING_OWED, UNFUNDED
from coordinator.chain.settler import BATCH_CLAIMS, MAX_ROWS, REFUSED, Settler
from coordinator.domain.exposure import Exposure
from coordinator.storage.memory import MemoryStore
from tallystick.chain.claims import ClaimBatch, pack_batches
from tallystick.chain.codec import ContractError
from tallystick.chain.event_reader import DeepReorg
from tallystick.chain.events import LogPosition, ReleaseStarted
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import BadMessage, BadSignature, Code, PeerError, Refusal, Unavailable
from tallystick.protocol.health import Health
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Order
from tallystick.protocol.types import Amount, JobId, Seconds
from tests.coordinator.fake_escrow import DEPLOYMENT, FakeEscrow, make_settler
from tests.coordinator.harness import COORDINATOR, PAYER, START, Clock, make_ask, make_claim, make_order, make_terms, person

ANN, BOB = person("ann"), person("bob")


@pytest.fixture
def escrow(monkeypatch: pytest.MonkeyPatch) -> FakeEscrow:
    """A chain on which the payer has funds."""
    made = FakeEscrow()
    made.free[PAYER.address] = 10_000
    monkeypatch.setattr("coordinator.chain.settler.read_events", made.read_events)
    return made


@pytest.fixture
def store() -> MemoryStore:
    """The store of claims."""
    return MemoryStore()


@pytest.fixture
def settler(escrow: FakeEscrow, store: MemoryStore) -> Settler:
    """A settler between the two."""
    return make_settler(escrow, store)


def _order(provider: Signer = ANN, payer: Signer = PAYER, **changes: Any) -> Verified[Order]:
    return make_order(make_terms(make_ask(provider), JobId(bytes(16))), provider.address, payer, **changes)


def _claim(provider: Signer = ANN, total: int = 20, seq: int = 1, **order: Any) -> ClaimRequest:
    return make_claim(provider, (_order(provider, **order), seq, total))


def _closed(store: MemoryStore) -> list[str | None]:
    return [tx for _, tx in store.claims.values()]


# Accepting claims


async def test_a_good_claim_waits(settler: Settler, store: MemoryStore) -> None:
    """A valid claim waits for the next batch."""
    claim = _claim()
    await settler.accept_claim(ANN.address, claim)
    assert [pending.request for pending in await store.pending_claims(9)] == [claim]


def _unsigned() -> ClaimRequest:
    claim = _claim()
    return replace(claim, claim=replace(claim.claim, message=replace(claim.claim.message, provider=BOB.address)))


def _raised() -> ClaimRequest:
    claim = _claim()
    rows = (replace(claim.claim.message.rows[0], cumulative_cost=Amount(9_999)),)
    return replace(claim, claim=replace(claim.claim, message=replace(claim.claim.message, rows=rows)))


def _forged_order() -> ClaimRequest:
    claim = _claim()
    order = replace(claim.orders[0], message=replace(claim.orders[0].message, ceiling=Amount(10**9)))
    return replace(claim, orders=(order,))


def _other_order() -> ClaimRequest:
    return replace(_claim(), orders=_claim(ceiling=Amount(10**9)).orders)


def _anothers_order() -> ClaimRequest:
    return make_claim(ANN, (_order(BOB), 1, 20))


@pytest.mark.parametrize(
    ("claim", "error", "says"),
    [
        (_unsigned(), BadSignature, "expected a signature of"),
        (_raised(), BadSignature, "expected a signature of"),
        (_forged_order(), BadSignature, "order"),
        (_other_order(), BadMessage, "does not match its order"),
        (_anothers_order(), BadMessage, "does not match its order"),
        (_claim(BOB), BadMessage, "claim.provider: expected"),
        (make_claim(ANN), BadMessage, "claim.rows: expected 1 to"),
    ],
)
async def test_a_claim_that_contradicts_itself(
    settler: Settler, store: MemoryStore, claim: ClaimRequest, error: type[PeerError], says: str
) -> None:
    """Forged, altered, mismatched and empty claims and claims of others are refused and not stored."""
    with pytest.raises(error, match=says):
        await settler.accept_claim(ANN.address, claim)
    assert store.claims == {}


async def test_a_claim_that_no_transaction_can_carry(settler: Settler) -> None:
    """A claim has at most as many rows as fit into a transaction; the largest one does fit."""
    order = _order()
    with pytest.raises(BadMessage, match=f"expected 1 to {MAX_ROWS}, .* got {MAX_ROWS + 1}"):
        await settler.accept_claim(ANN.address, make_claim(ANN, *[(order, 1, 20)] * (MAX_ROWS + 1)))
    largest = make_claim(ANN, *[(order, 1, 20)] * MAX_ROWS)
    await settler.accept_claim(ANN.address, largest)
    batch = ClaimBatch.of(largest.claim, largest.orders, DEPLOYMENT.domain)
    assert list(pack_batches([batch])) == [[batch]]


# Settling


async def test_claims_are_sent_in_one_batch(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """Pending claims are sent together, paid, and closed with the transaction."""
    await settler.accept_claim(ANN.address, _claim(ANN, 20))
    await settler.accept_claim(BOB.address, _claim(BOB, 30))
    await settler.settle()
    assert [[claim.provider for claim in tx] for tx in escrow.sent] == [[ANN.address, BOB.address]]
    assert escrow.settled == {(PAYER.address, ANN.address): 20, (PAYER.address, BOB.address): 30}
    assert _closed(store) == [f"0x{escrow.block:064x}"] * 2


async def test_many_claims_need_several_batches(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """All pending claims are sent, in several batches if need be."""
    for total in range(1, BATCH_CLAIMS + 4):
        await settler.accept_claim(ANN.address, _claim(total=total))
    await settler.settle()
    assert len(escrow.sent) == 2
    assert None not in _closed(store)
    assert escrow.settled == {(PAYER.address, ANN.address): BATCH_CLAIMS + 3}


async def test_no_gas_for_unpayable_claims(store: MemoryStore, escrow: FakeEscrow) -> None:
    """A claim on an empty purse, or one that pays too little, costs no gas; sent again after a deposit, it is settled."""
    settler = make_settler(escrow, store, min_claim=15)
    escrow.free[PAYER.address] = 10
    await settler.accept_claim(ANN.address, _claim(total=20))
    await settler.settle()
    assert (escrow.sent, _closed(store)) == ([], [UNFUNDED])
    escrow.reserved[PAYER.address, ANN.address] = 5
    await settler.accept_claim(ANN.address, _claim(total=20))
    await settler.settle()
    assert len(escrow.sent) == 1


async def test_claims_that_wait_for_the_chain(store: MemoryStore, escrow: FakeEscrow) -> None:
    """While the chain takes no claims, those that wait are a warning, with their number and the time of the first to expire."""
    clock = Clock()
    settler = make_settler(escrow, store, clock)
    await settler.accept_claim(ANN.address, _claim(ANN, claim_by=Seconds(START + 7_230)))
    await settler.accept_claim(BOB.address, _claim(BOB, claim_by=Seconds(START + 90_000)))
    assert (await settler.check())["claims"].status is Health.PASS
    escrow.down = True
    running = asyncio.create_task(settler.run())
    while (result := (await settler.check())["claims"]).status is Health.PASS:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    assert (result.value, result.output) == (2, "2 claims wait for the chain; the first expires in 120 min")
    assert f"tally chain fund {COORDINATOR.address}" in result.remedy
    clock.seconds += 7_230
    assert (await settler.check())["claims"].output.endswith("the first has expired")
    escrow.down = False
    while (await settler.check())["claims"].status is not Health.PASS:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    running.cancel()
    assert escrow.sent


async def test_nothing_waits(settler: Settler, escrow: FakeEscrow) -> None:
    """Without claims no gas is spent."""
    await settler.settle()
    assert escrow.sent == []


@pytest.mark.parametrize(
    "claim",
    [
        _claim(total=20),
        _claim(total=15),
        _claim(total=99, ceiling=Amount(20)),
        _claim(total=99, claim_by=START - 1),
        _claim(total=0),
    ],
)
async def test_what_pays_nothing_is_not_sent(
    settler: Settler, store: MemoryStore, escrow: FakeEscrow, claim: ClaimRequest
) -> None:
    """Claims on settled tabs, above their ceiling, after their last day or for nothing are closed without gas."""
    await settler.accept_claim(ANN.address, _claim(total=20))
    await settler.settle()
    await settler.follow_events()
    await settler.accept_claim(ANN.address, claim)
    await settler.settle()
    assert len(escrow.sent) == 1
    assert _closed(store)[-1] == NOTHING_OWED


async def test_a_claim_that_pays_nothing_does_not_hold_up_others(
    settler: Settler, store: MemoryStore, escrow: FakeEscrow
) -> None:
    """Of a batch, only claims that may pay are sent; each other one is closed with its reason."""
    await settler.accept_claim(ANN.address, _claim(total=0))
    await settler.accept_claim(BOB.address, _claim(BOB, 30))
    await settler.settle()
    assert [[claim.provider for claim in tx] for tx in escrow.sent] == [[BOB.address]]
    assert _closed(store) == [NOTHING_OWED, f"0x{escrow.block:064x}"]


async def test_a_claim_with_one_good_row_is_sent(settler: Settler, escrow: FakeEscrow) -> None:
    """A claim whose signature covers a row that pays and one that does not is sent whole."""
    poor = _order(payer=person("somebody"), claim_by=START - 1)
    await settler.accept_claim(ANN.address, make_claim(ANN, (poor, 1, 50), (_order(), 1, 20)))
    await settler.settle()
    assert escrow.settled == {(PAYER.address, ANN.address): 20}


async def test_a_shortfall_can_be_claimed_again(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """An amount that a purse could not pay is not lost: sending the same claim again collects the rest."""
    escrow.free[PAYER.address] = 5
    for _ in range(2):
        await settler.accept_claim(ANN.address, _claim(total=20))
        await settler.settle()
        await settler.follow_events()
        escrow.free[PAYER.address] = 100
    assert escrow.settled == {(PAYER.address, ANN.address): 20}
    assert len(store.claims) == 1


# Failures


async def test_a_chain_that_is_down(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """While the chain is down, claims are accepted and stay pending; when it is back, they are paid."""
    escrow.down = True
    await settler.accept_claim(ANN.address, _claim())
    with pytest.raises(Unavailable):
        await settler.settle()
    assert _closed(store) == [None]
    escrow.down = False
    await settler.settle()
    assert escrow.settled == {(PAYER.address, ANN.address): 20}


async def test_one_bad_claim_does_not_block_the_batch(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """A claim that the contract refuses is closed alone; the others of its batch are paid."""
    escrow.refuses[BOB.address] = ContractError("Surprise", {})
    for provider in (ANN, BOB, person("cat")):
        await settler.accept_claim(provider.address, _claim(provider))
    await settler.settle()
    assert {provider for _, provider in escrow.settled} == {ANN.address, person("cat").address}
    assert _closed(store)[1] == REFUSED
    assert None not in _closed(store)


async def test_an_unknown_revert_counts_as_the_claims_fault(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """A revert without a known error does not block the queue either."""
    escrow.refuses[BOB.address] = Refusal(Code.BAD_MESSAGE, "the contract refused: no reason")
    await settler.accept_claim(BOB.address, _claim(BOB))
    await settler.settle()
    assert _closed(store) == [REFUSED]


async def test_an_empty_gas_tank_closes_nothing(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """A coordinator that cannot pay gas keeps all claims until it can."""
    escrow.refuses[ANN.address] = Refusal(Code.INSUFFICIENT_FUNDS, "insufficient funds for gas")
    await settler.accept_claim(ANN.address, _claim())
    await settler.accept_claim(BOB.address, _claim(BOB))
    with pytest.raises(Refusal, match="gas"):
        await settler.settle()
    assert _closed(store) == [None, None]


async def test_a_crash_between_send_and_close(store: MemoryStore, escrow: FakeEscrow) -> None:
    """If the process dies between sending and closing a batch, the next one sees that it was paid and sends nothing."""
    settler = make_settler(escrow, store)
    await settler.accept_claim(ANN.address, _claim())
    await settler.settle()
    number, (request, _) = next(iter(store.claims.items()))
    store.claims[number] = (request, None)  # the close was lost
    await _run(make_settler(escrow, store), lambda: _closed(store) == [NOTHING_OWED])
    assert len(escrow.sent) == 1
    assert escrow.settled == {(PAYER.address, ANN.address): 20}


# Following the chain


async def test_settlements_are_followed(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Settlements on chain by any sender are stored with their transaction and lower a payer's debt."""
    exposure = Exposure()
    exposure.record_receipt(PAYER.address, ANN.address, Amount(20), Amount(20))
    settler = make_settler(escrow, store, exposure=exposure)
    await settler.accept_claim(ANN.address, _claim(total=20))
    await settler.settle()
    await settler.follow_events()
    settlement = await store.settlement(PAYER.address, ANN.address)
    assert settlement is not None
    assert (settlement.settled, settlement.tx, settlement.block) == (20, f"0x{escrow.block:064x}", escrow.block)
    tab = exposure.known(PAYER.address, ANN.address)
    assert tab is not None
    assert tab.uncovered() == 0


async def test_a_reservation_that_is_released_covers_nothing(store: MemoryStore, escrow: FakeEscrow) -> None:
    """Once a release shows on chain, the reservation no longer frees the payer's balance for other providers."""
    exposure = Exposure()
    exposure.record_receipt(PAYER.address, ANN.address, Amount(500), Amount(500))
    exposure.observe(PAYER.address, ANN.address, settled=Amount(0), reserved=Amount(500))
    exposure.admit(PAYER.address, BOB.address, Amount(500), Amount(500))
    exposure.release(PAYER.address, BOB.address, Amount(500))
    at = LogPosition(escrow.block, 0, "0x" + "00" * 32, "0x" + "01" * 32)
    escrow.events.append(ReleaseStarted(at=at, payer=PAYER.address, provider=ANN.address, release_at=Seconds(START)))
    await make_settler(escrow, store, exposure=exposure).follow_events()
    with pytest.raises(Refusal, match="free"):
        exposure.admit(PAYER.address, BOB.address, Amount(500), Amount(500))


async def test_all_pages_are_read(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """Events are read until none is new, from where the last read ended."""
    for total in (10, 20, 30, 40, 50):
        await settler.accept_claim(ANN.address, _claim(total=total))
        await settler.settle()
    await settler.follow_events()
    assert (cursor := await store.cursor()) is not None
    assert cursor.block == escrow.block + 1
    settlement = await store.settlement(PAYER.address, ANN.address)
    assert settlement is not None
    assert settlement.settled == 50


async def test_following_twice_changes_nothing(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """Events that are read again, as after a crash before the cursor was stored, change nothing."""
    await settler.accept_claim(ANN.address, _claim())
    await settler.settle()
    await settler.follow_events()
    before = dict(store.settlements)
    store.read = None
    await settler.follow_events()
    assert store.settlements == before
    assert (cursor := await store.cursor()) is not None
    assert cursor.block == escrow.block + 1


async def test_a_reorg_of_final_blocks(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """Settlements are forgotten after a deep reorganisation; the claim is sent and paid again, once."""
    await settler.accept_claim(ANN.address, _claim(total=20))
    await settler.settle()
    await settler.follow_events()
    escrow.take_back()
    before = settler._sender._nonces
    await settler.follow_events()
    assert settler._sender._nonces is not before, "the chain may have dropped the account's transactions too"
    assert await store.settlement(PAYER.address, ANN.address) is None
    for _ in range(2):
        await settler.settle()
        await settler.follow_events()
    assert (len(escrow.sent), escrow.free[PAYER.address]) == (2, 10_000 - 20)
    settlement = await store.settlement(PAYER.address, ANN.address)
    assert settlement is not None
    assert settlement.settled == 20


async def test_an_endpoint_that_takes_everything_back_each_time_does_not_spin_the_settler(
    settler: Settler, escrow: FakeEscrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an endpoint reports a deep reorganisation every time, one call reads and forgets once."""
    reads = 0

    async def always(*_: Any, **__: Any) -> Any:
        nonlocal reads
        reads += 1
        raise DeepReorg(escrow.block, "0x00", "0x01")

    monkeypatch.setattr("coordinator.chain.settler.read_events", always)
    async with asyncio.timeout(60):
        await settler.follow_events()
    assert reads == 1


async def test_settlements_wait_for_confirmations(store: MemoryStore, escrow: FakeEscrow) -> None:
    """A settlement without its confirmations does not count yet."""
    settler = make_settler(escrow, store, confirmations=2)
    await settler.accept_claim(ANN.address, _claim())
    await settler.settle()
    await settler.follow_events()
    assert await store.settlement(PAYER.address, ANN.address) is None
    escrow.block += 2
    await settler.follow_events()
    assert await store.settlement(PAYER.address, ANN.address) is not None


async def _run(settler: Settler, until: Any) -> None:
    """Runs the settler's loop until a condition is true."""
    task = asyncio.create_task(settler.run())
    try:
        async with asyncio.timeout(60):
            while not until() and not task.done():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert until()


async def test_the_loop_outlives_failures(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """The loop continues by itself after the chain was down."""
    escrow.down = True
    await settler.accept_claim(ANN.address, _claim())
    task = asyncio.create_task(settler.run())
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    escrow.down = False
    await _run(settler, lambda: (PAYER.address, ANN.address) in store.settlements)


async def test_events_are_followed_although_sending_fails(settler: Settler, store: MemoryStore, escrow: FakeEscrow) -> None:
    """A coordinator that cannot send still learns what others settled."""
    await settler.accept_claim(ANN.address, _claim(total=10))
    await settler.settle()
    escrow.refuses[ANN.address] = Refusal(Code.INSUFFICIENT_FUNDS, "insufficient funds for gas")
    await settler.accept_claim(ANN.address, _claim(total=20))
    await _run(settler, lambda: (PAYER.address, ANN.address) in store.settlements)
    assert _closed(store)[-1] is None


async def test_time_is_the_settlers_own(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Whether an order can still be claimed on is decided when it is settled, not when the claim arrived."""
    clock = Clock()
    settler = make_settler(escrow, store, clock)
    await settler.accept_claim(ANN.address, _claim(claim_by=START + 10))
    clock.seconds = 11
    await settler.settle()
    assert (escrow.sent, _closed(store)) == ([], [NOTHING_OWED])


# Replicas that do not settle


async def test_a_replica_follows_what_another_one_settles(escrow: FakeEscrow, store: MemoryStore) -> None:
    """It reads the chain from where the settler had read, keeps its own exposure current, and writes nothing."""
    exposure = Exposure()
    exposure.record_receipt(PAYER.address, ANN.address, Amount(20), Amount(20))
    settling, watching = make_settler(escrow, store), make_settler(escrow, store, exposure=exposure)
    known = await watching.watch_events(None)
    await settling.accept_claim(ANN.address, _claim())
    await settling.settle()
    assert await watching.watch_events(known) is not None
    tab = exposure.known(PAYER.address, ANN.address)
    assert tab is not None
    assert (tab.settled, await store.cursor(), await store.settlement(PAYER.address, ANN.address)) == (20, None, None)


async def test_a_replica_reads_only_what_is_new(escrow: FakeEscrow, store: MemoryStore) -> None:
    """It goes on where it was: an old event is not applied again over newer knowledge of a release."""
    exposure = Exposure()
    watching = make_settler(escrow, store, exposure=exposure)
    exposure.record_receipt(PAYER.address, ANN.address, Amount(20), Amount(20))
    escrow.block += 1
    at = LogPosition(escrow.block, 0, "0x" + "00" * 32, "0x" + "00" * 32)
    escrow.events.append(ReleaseStarted(at=at, payer=PAYER.address, provider=ANN.address, release_at=Seconds(9)))
    known = await watching.watch_events(None)
    exposure.observe(PAYER.address, ANN.address, settled=Amount(0), reserved=Amount(20))
    again = await watching.watch_events(known)
    tab = exposure.known(PAYER.address, ANN.address)
    assert tab is not None
    assert (tab.reserved, again) == (20, known)


async def test_a_replica_begins_anew_after_a_deep_reorganisation(escrow: FakeEscrow, store: MemoryStore) -> None:
    """It forgets what was settled on the former chain, and reads the new one."""
    exposure = Exposure()
    exposure.record_receipt(PAYER.address, ANN.address, Amount(20), Amount(20))
    settling, watching = make_settler(escrow, store), make_settler(escrow, store, exposure=exposure)
    await settling.accept_claim(ANN.address, _claim())
    await settling.settle()
    known = await watching.watch_events(None)
    escrow.take_back()
    assert await watching.watch_events(known) is None
    tab = exposure.known(PAYER.address, ANN.address)
    assert tab is not None
    assert tab.settled == 0


async def test_the_watch_outlives_the_chain(escrow: FakeEscrow, store: MemoryStore) -> None:
    """A chain that is down delays what a replica knows, and does not end it."""
    exposure = Exposure()
    exposure.record_receipt(PAYER.address, ANN.address, Amount(20), Amount(20))
    settling, watching = make_settler(escrow, store), make_settler(escrow, store, exposure=exposure)
    await settling.accept_claim(ANN.address, _claim())
    await settling.settle()
    escrow.down = True
    watch = asyncio.create_task(watching.watch())
    await asyncio.sleep(0)
    escrow.down = False
    try:
        async with asyncio.timeout(60):
            while (tab := exposure.known(PAYER.address, ANN.address)) is None or tab.settled != 20:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    finally:
        watch.cancel()

"""The settler's reads and costs per provider are bounded, and no provider's claims wait for a stranger's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator import ports
from coordinator.chain import claim_value
from coordinator.chain.claim_value import IDLE_ROWS, INCLUSION_SECONDS, MAX_PURSELESS_PAYERS, NO_PURSE, NOTHING_OWED, UNFUNDED
from coordinator.chain.settler import CLAIMS_BURST, CLAIMS_PER_SECOND, MAX_ROWS, WASTED_READS_BURST, WASTED_READS_PER_SECOND
from coordinator.storage.memory import MemoryStore
from tallystick.protocol.eip712 import Signer, Verified
from tallystick.protocol.errors import BadMessage, Code, Unavailable
from tallystick.protocol.link import ClaimRequest
from tallystick.protocol.messages import Order
from tallystick.protocol.types import JobId
from tests.coordinator.fake_escrow import FakeEscrow, make_settler
from tests.coordinator.harness import PAYER, START, Clock, make_ask, make_claim, make_order, make_terms, person

ANN, BOB = person("ann"), person("bob")


@pytest.fixture
def escrow() -> FakeEscrow:
    """A chain on which one payer has funds."""
    made = FakeEscrow()
    made.free[PAYER.address] = 10_000
    return made


@pytest.fixture
def store() -> MemoryStore:
    """The store of claims."""
    return MemoryStore()


def _order(provider: Signer = ANN, payer: Signer = PAYER, seq: int = 1) -> Verified[Order]:
    return make_order(make_terms(make_ask(provider), JobId(bytes(16))), provider.address, payer, seq=seq)


def _junk(number: int, rows: int, provider: Signer = ANN) -> ClaimRequest:
    """Returns a claim on payers that do not exist."""
    payers = (person(f"nobody {number} {row}") for row in range(rows))
    return make_claim(provider, *((_order(provider, payer), 1, 50) for payer in payers))


def _closed(store: MemoryStore) -> list[str | None]:
    return [tx for _, tx in store.claims.values()]


def _reads(escrow: FakeEscrow) -> int:
    return escrow.reads + escrow.tab_reads


async def test_one_payable_unit_does_not_carry_a_transaction_of_junk(escrow: FakeEscrow, store: MemoryStore) -> None:
    """A claim that pays less than one unit per row is closed with advice; a claim on the paying rows is sent."""
    escrow.free = {person(f"poor {row}").address: 0 for row in range(40)} | {PAYER.address: 1}
    settler = make_settler(escrow, store)
    junk = [(_order(ANN, person(f"poor {row}")), 1, 50) for row in range(40)]
    await settler.accept_claim(ANN.address, make_claim(ANN, (_order(), 1, 1), *junk))
    await settler.settle()
    assert (escrow.sent, _closed(store)) == ([], [IDLE_ROWS])
    await settler.accept_claim(ANN.address, make_claim(ANN, (_order(), 1, 1)))
    await settler.settle()
    assert escrow.settled == {(PAYER.address, ANN.address): 1}


@pytest.mark.parametrize(("paid", "sent"), [(29, 0), (30, 1)])
async def test_what_a_row_must_bring_is_counted_for_every_row(
    escrow: FakeEscrow, store: MemoryStore, paid: int, sent: int
) -> None:
    """At ten units a row, three rows need thirty, whichever of them pays, and not one less."""
    settler = make_settler(escrow, store, min_claim_row=10)
    others = [_order(seq=2), _order(seq=3)]
    await settler.accept_claim(ANN.address, make_claim(ANN, (_order(), 1, paid), *((order, 2, 1) for order in others)))
    await settler.settle()
    assert len(escrow.sent) == sent


async def test_a_provider_does_not_make_the_settler_send_what_it_owes_itself(escrow: FakeEscrow, store: MemoryStore) -> None:
    """The contract skips rows whose payer is the provider, so such a claim is refused."""
    escrow.free[ANN.address] = 10_000
    settler = make_settler(escrow, store)
    with pytest.raises(BadMessage, match="provider itself"):
        await settler.accept_claim(ANN.address, make_claim(ANN, (_order(), 1, 50), (_order(ANN, ANN), 1, 50)))
    assert _closed(store) == []


@pytest.mark.parametrize(("left", "sent"), [(INCLUSION_SECONDS - 1, 0), (INCLUSION_SECONDS, 1)])
async def test_no_gas_is_spent_on_what_expires_before_it_lands(
    escrow: FakeEscrow, store: MemoryStore, left: int, sent: int
) -> None:
    """An order that can be claimed on for less than a transaction takes counts for nothing."""
    settler = make_settler(escrow, store, Clock())
    made = make_order(make_terms(make_ask(ANN), JobId(bytes(16))), ANN.address, claim_by=START + left)
    await settler.accept_claim(ANN.address, make_claim(ANN, (made, 1, 50)))
    await settler.settle()
    assert len(escrow.sent) == sent


async def test_one_debt_is_not_counted_for_many_rows(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Twenty rows of one payer are one tab: what they pay together is what the highest one pays."""
    settler = make_settler(escrow, store)
    await settler.accept_claim(ANN.address, make_claim(ANN, *((_order(seq=seq), seq, 5) for seq in range(1, 21))))
    await settler.settle()
    assert (escrow.sent, _closed(store)) == ([], [IDLE_ROWS])


async def test_one_debt_is_not_counted_for_many_claims(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Of claims on the same money only the first one costs gas."""
    settler = make_settler(escrow, store)
    for seq in range(1, 6):
        await settler.accept_claim(ANN.address, make_claim(ANN, (_order(seq=seq), seq, 50)))
    await settler.settle()
    assert [len(batch) for batch in escrow.sent] == [1]
    assert _closed(store)[1:] == [NOTHING_OWED] * 4


async def test_one_purse_is_not_counted_for_many_providers(escrow: FakeEscrow, store: MemoryStore) -> None:
    """A purse that covers one provider's claim does not make the next one's worth its gas."""
    escrow.free[PAYER.address] = 50
    settler = make_settler(escrow, store, min_claim=50)
    for provider in (ANN, BOB):
        await settler.accept_claim(provider.address, make_claim(provider, (_order(provider), 1, 50)))
    await settler.settle()
    assert escrow.settled == {(PAYER.address, ANN.address): 50}
    assert _closed(store)[1] == UNFUNDED


async def test_a_stranger_costs_no_more_than_a_few_reads(escrow: FakeEscrow, store: MemoryStore) -> None:
    """A claim with no purse behind it costs eight chain reads, however many rows it has."""
    settler = make_settler(escrow, store)
    await settler.accept_claim(ANN.address, _junk(0, MAX_ROWS))
    await settler.settle()
    assert (_reads(escrow), _closed(store)) == (MAX_PURSELESS_PAYERS, [NO_PURSE])


async def test_one_purse_does_not_open_the_door_for_many_strangers(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Payers without a purse are read up to the number of payers with one, plus eight."""
    settler = make_settler(escrow, store, min_claim=1_000)
    junk = [(_order(ANN, person(f"nobody {row}")), 1, 50) for row in range(100)]
    await settler.accept_claim(ANN.address, make_claim(ANN, (_order(), 1, 50), *junk))
    await settler.settle()
    assert (_reads(escrow), _closed(store)) == (2 + MAX_PURSELESS_PAYERS + 1, [NO_PURSE])


async def test_reads_in_vain_do_not_go_on_for_ever(escrow: FakeEscrow, store: MemoryStore) -> None:
    """A provider whose claims pay nothing gets a burst of reads, then one per second; its claims stay pending meanwhile."""
    clock = Clock()
    settler = make_settler(escrow, store, clock)
    number = 0
    for _ in range(3):
        for _ in range(20):
            await settler.accept_claim(ANN.address, _junk(number := number + 1, MAX_PURSELESS_PAYERS))
        await settler.settle()
    assert WASTED_READS_BURST - MAX_PURSELESS_PAYERS < _reads(escrow) <= WASTED_READS_BURST + MAX_PURSELESS_PAYERS
    assert None in _closed(store)
    before = _reads(escrow)
    clock.seconds += 5 * MAX_PURSELESS_PAYERS / WASTED_READS_PER_SECOND
    await settler.settle()
    assert 4 * MAX_PURSELESS_PAYERS <= _reads(escrow) - before <= 6 * MAX_PURSELESS_PAYERS


async def test_a_stranger_does_not_hold_up_others(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Providers take turns: however many claims one has pending, the first claim of another is in the next batch."""
    settler = make_settler(escrow, store)
    for number in range(100):
        await settler.accept_claim(ANN.address, _junk(number, MAX_PURSELESS_PAYERS))
    await settler.accept_claim(BOB.address, make_claim(BOB, (_order(BOB), 1, 20)))
    first = [pending.request.claim.message.provider for pending in await store.pending_claims(2)]
    assert first == [ANN.address, BOB.address]
    await settler.settle()
    assert escrow.settled == {(PAYER.address, BOB.address): 20}


async def test_claims_of_one_provider_do_not_fill_the_store(
    escrow: FakeEscrow, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider has a maximum of pending claims; claims closed without payment are deleted when the next one arrives."""
    monkeypatch.setattr("coordinator.storage.memory.WAITING_CLAIMS", 3)
    settler = make_settler(escrow, store)
    for number in range(3):
        await settler.accept_claim(ANN.address, _junk(number, 1))
    with pytest.raises(Unavailable) as caught:
        await settler.accept_claim(ANN.address, _junk(3, 1))
    assert caught.value.code is Code.RATE_LIMITED
    await settler.accept_claim(ANN.address, _junk(2, 1))
    await settler.settle()
    assert _closed(store) == [NO_PURSE] * 3
    await settler.accept_claim(ANN.address, _junk(4, 1))
    assert _closed(store) == [None]


async def test_reads_are_not_repeated(escrow: FakeEscrow, store: MemoryStore) -> None:
    """The claims of many providers on one payer read its purse once a batch, and each tab once."""
    settler = make_settler(escrow, store)
    providers = [person(f"provider {number}") for number in range(10)]
    for provider in providers:
        await settler.accept_claim(provider.address, make_claim(provider, (_order(provider), 1, 20)))
    await settler.settle()
    assert (escrow.reads, escrow.tab_reads) == (1, 10)
    assert len(escrow.settled) == 10


def test_the_stated_numbers() -> None:
    """The docstring's numbers are the code's."""
    assert MAX_ROWS <= 340
    assert (ports.WAITING_CLAIMS, claim_value.MAX_PURSELESS_PAYERS, WASTED_READS_BURST, WASTED_READS_PER_SECOND) == (
        128,
        8,
        256,
        1,
    )
    assert (CLAIMS_BURST, CLAIMS_PER_SECOND) == (128, 1)


async def test_a_flood_of_claims_is_not_checked_one_by_one(escrow: FakeEscrow, store: MemoryStore) -> None:
    """Claims above a provider's rate are refused before a signature is checked; those of others are accepted."""
    clock = Clock()
    settler = make_settler(escrow, store, clock)
    for _ in range(CLAIMS_BURST):
        await settler.accept_claim(ANN.address, _junk(0, 1))
    forged = replace(_junk(0, 1), orders=())
    with pytest.raises(Unavailable):
        await settler.accept_claim(ANN.address, forged)
    await settler.accept_claim(BOB.address, _junk(0, 1, BOB))
    clock.seconds += 1 / CLAIMS_PER_SECOND
    await settler.accept_claim(ANN.address, _junk(0, 1))

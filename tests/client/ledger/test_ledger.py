from __future__ import annotations

import asyncio
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.ledger.ledger import Ledger
from tallystick.client.ledger.receipt_writes import IncomingReceipt
from tallystick.client.ledger.schema import JobState, OrderState
from tallystick.client.orders.signing import PlacedOrder
from tallystick.client.receipts.delivery_check import Delivery
from tallystick.protocol.eip712 import Domain
from tallystick.protocol.errors import Unavailable
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import ZERO_HASH, Address, Amount, Hash, JobId
from tests.client.parties import ALICE, BOB, DOMAIN, NOW_S, PAYER, bill, take

FINE = Delivery(200, 50, ZERO_HASH, finished=True)


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """An empty ledger."""
    ledger = await Ledger.open(tmp_path / "state.db", PAYER.address)
    yield ledger
    await ledger.close()


def arrival(job: JobId, placed: PlacedOrder, receipt: Receipt, delivered: Delivery | None = FINE) -> IncomingReceipt:
    """A signed receipt as it arrives."""
    key = next(p for p in (ALICE, BOB) if p.address == placed.provider).signer
    return IncomingReceipt(DOMAIN, job, placed, key.sign(receipt, DOMAIN), delivered, NOW_S)


async def test_orders_are_open_until_their_job_ends(ledger: Ledger) -> None:
    """All orders of a shortlist count as open until the job has its receipt; then only the receipt counts."""
    job, (alice, _) = await take(ledger, ALICE, BOB)
    cap = alice.terms.max_cost
    assert (await ledger.tab(DOMAIN, BOB.address, NOW_S)).open_caps == cap
    assert await ledger.record_receipt(arrival(job, alice, bill(alice))) is None
    first, second = [await ledger.tab(DOMAIN, p.address, NOW_S) for p in (ALICE, BOB)]
    assert (first.accepted, first.open_caps, first.ceiling) == (3, 0, cap)
    assert (second.accepted, second.open_caps, second.ceiling) == (0, 0, cap)
    known = await ledger.find_job(job)
    assert known is not None
    assert [order.state for order in known.orders] == [OrderState.RECORDED, OrderState.CLOSED]
    assert (known.state, known.domain) == (JobState.COMPLETED, DOMAIN)


async def test_orders_expire(ledger: Ledger) -> None:
    """If the end of an order's job is unknown, the order counts until the second after which its provider can no longer
    collect on it. A receipt that comes later is still recorded.
    """
    job, (alice,) = await take(ledger)
    await ledger.end_job(job, JobState.LOST, "gone", NOW_S)
    until = alice.order.message.claim_by
    assert (await ledger.tab(DOMAIN, ALICE.address, until - 1)).open_caps == alice.terms.max_cost
    assert (await ledger.tab(DOMAIN, ALICE.address, until)).open_caps == 0
    assert await ledger.unresolved_jobs() == [job]
    assert await ledger.record_receipt(arrival(job, alice, bill(alice), None)) is None
    assert await ledger.unresolved_jobs() == []


async def test_the_same_receipt_twice_counts_once(ledger: Ledger) -> None:
    """Recording is idempotent."""
    job, (alice,) = await take(ledger)
    for _ in range(3):
        assert await ledger.record_receipt(arrival(job, alice, bill(alice))) is None
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).accepted == 3


async def test_lost_receipts_are_learnt_from_later_ones(ledger: Ledger) -> None:
    """If an order expired without its receipt, a later total that includes it raises the next ceiling, and the provider
    continues.
    """
    lost, (first,) = await take(ledger)
    cap, until = first.terms.max_cost, first.order.message.claim_by
    await ledger.end_job(lost, JobState.FAILED, "", NOW_S, matched=[first.order.digest])
    job, (alice,) = await take(ledger)
    later = bill(alice, seq=2, cumulative_cost=Amount(3 + 40))
    assert await ledger.record_receipt(arrival(job, alice, later)) is None
    _, (third,) = await take(ledger)
    assert third.order.message.ceiling == 3 + 2 * cap, "while it can be collected on, it counts in full"
    _, (fourth,) = await take(ledger, at=until)
    assert fourth.order.message.ceiling == 43 + cap


async def test_in_flight_receipts_explain_a_total(ledger: Ledger) -> None:
    """A total that an open order explains does not raise the ceiling above accepted plus open."""
    first, (first_placed,) = await take(ledger)
    second, (two,) = await take(ledger)
    assert await ledger.record_receipt(arrival(second, two, bill(two, seq=2, cumulative_cost=Amount(6)))) is None
    _, (three,) = await take(ledger)
    assert three.order.message.ceiling == 3 + 2 * first_placed.terms.max_cost
    assert await ledger.record_receipt(arrival(first, first_placed, bill(first_placed))) is None
    assert (await ledger.tab(DOMAIN, ALICE.address, NOW_S)).accepted == 6


async def test_dishonest_receipt_is_kept_and_blocks(ledger: Ledger) -> None:
    """Evidence is stored durably, and only its provider gets no more orders."""
    job, (alice, _) = await take(ledger, ALICE, BOB)
    complaint = await ledger.record_receipt(arrival(job, alice, bill(alice, result_commitment=Hash(b"\1" * 32))))
    assert complaint is not None
    (kept,) = await ledger.evidence()
    assert (kept.job, kept.reason) == (job, str(complaint))
    assert list(await ledger.blocked(DOMAIN)) == [ALICE.address]
    _, placed = await take(ledger, ALICE, BOB)
    assert [p.provider for p in placed] == [BOB.address]
    assert (await take(ledger, ALICE))[1] == []
    known = await ledger.find_job(job)
    assert known is not None
    assert (known.state, known.receipt) == (JobState.DISPUTED, None)


async def test_deployments_have_tabs_of_their_own(ledger: Ledger) -> None:
    """Orders for one contract do not count for another."""
    await take(ledger)
    other = Domain(1, Address("0x" + "11" * 20))
    _, (placed,) = await take(ledger, domain=other)
    assert placed.order.message.ceiling == placed.terms.max_cost


async def test_state_survives(tmp_path: Path) -> None:
    """Orders and receipts survive a restart, in a file that only its owner can read."""
    path = tmp_path / "deep" / "state.db"
    ledger = await Ledger.open(path, PAYER.address)
    job, (alice,) = await take(ledger)
    await take(ledger)
    await ledger.record_receipt(arrival(job, alice, bill(alice)))
    await ledger.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = await Ledger.open(path, PAYER.address)
    tab = await again.tab(DOMAIN, ALICE.address, NOW_S)
    assert (tab.accepted, tab.open_caps) == (3, alice.terms.max_cost)
    await again.close()


async def test_unusable_file(tmp_path: Path) -> None:
    """A ledger file that cannot be created or read gives an error that says so."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unavailable, match="ledger_file: unable to open"):
        await Ledger.open(tmp_path / "folder", PAYER.address)


async def test_two_ledgers_in_one_process(tmp_path: Path) -> None:
    """Two ledgers on one file never sign from the same state of the tab."""
    path = tmp_path / "state.db"
    ledgers = [await Ledger.open(path, PAYER.address) for _ in range(2)]
    taken = await asyncio.gather(*(take(ledgers[i % 2]) for i in range(40)))
    ceilings = sorted(placed[0].order.message.ceiling for _, placed in taken)
    cap = taken[0][1][0].terms.max_cost
    assert ceilings == [cap * (i + 1) for i in range(40)]
    assert len({placed[0].order.message.seq for _, placed in taken}) == 40
    for ledger in ledgers:
        await ledger.close()


TAKER = """
import asyncio, sys
from pathlib import Path
from tallystick.client.ledger.ledger import Ledger
from tests.client.parties import PAYER, take

async def main():
    ledger = await Ledger.open(Path(sys.argv[1]), PAYER.address)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(15):
        _, (placed,) = await take(ledger)
        print(int(placed.order.message.ceiling), flush=True)
    if sys.argv[2] == "stay":
        sys.stdin.readline()
    await ledger.close()

asyncio.run(main())
"""


def test_processes_share_a_wallet(tmp_path: Path) -> None:
    """Processes that start and sign at the same time never sign the same ceiling, and a killed process loses nothing."""
    path = tmp_path / "state.db"
    endings = ("end", "stay")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(path), ending], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for ending in endings
    ]
    ceilings: list[int] = []
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process, ending in zip(processes, endings, strict=True):
        assert process.stdout is not None
        ceilings += [int(process.stdout.readline()) for _ in range(15)]
        if ending == "stay":
            process.kill()
        process.communicate()
    cap = min(ceilings)
    assert sorted(ceilings) == [cap * (i + 1) for i in range(30)]

    async def total() -> Amount:
        ledger = await Ledger.open(path, PAYER.address)
        tab = await ledger.tab(DOMAIN, ALICE.address, NOW_S)
        await ledger.close()
        return tab.open_caps

    assert asyncio.run(total()) == 30 * cap

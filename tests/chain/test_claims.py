from __future__ import annotations

from dataclasses import replace

import pytest

from tallystick.chain.claims import BATCH_GAS, CLAIM_GAS, ROW_GAS, ClaimBatch, SettleRow, pack_batches
from tallystick.chain.events import Settled
from tallystick.chain.rpc import MAX_TRANSACTION_GAS
from tallystick.protocol.eip712 import Domain, Signed
from tallystick.protocol.errors import BadMessage, BadSignature
from tallystick.protocol.messages import Order
from tallystick.protocol.types import ZERO_ADDRESS, Amount
from tests.builders import build_order
from tests.chain.harness import DOLLAR, World, person

KEY, OWNER, PROVIDER = person("key"), person("owner"), person("provider")
DOMAIN = Domain(chain_id=1, contract=ZERO_ADDRESS)


def _order(seq: int) -> Signed[Order]:
    return KEY.sign(build_order(KEY.address, PROVIDER.address, seq=seq), DOMAIN)


def _batch(rows: int, signature: bytes = b"") -> ClaimBatch:
    row = SettleRow(_order(1), 1, Amount(1))
    return ClaimBatch(PROVIDER.address, (row,) * rows, signature)


def test_a_claim_is_rebuilt_from_its_message() -> None:
    """A signed claim and its orders, in any order, give a batch from which the same claim is rebuilt."""
    rows = tuple(SettleRow(_order(n), n, Amount(n)) for n in (1, 2, 3))
    claim = PROVIDER.sign(ClaimBatch(PROVIDER.address, rows).claim(DOMAIN), DOMAIN)
    orders = [row.order for row in reversed(rows)]
    batch = ClaimBatch.of(claim, orders, DOMAIN)
    assert [row.order.message for row in batch.rows] == [row.order.message for row in rows]
    assert (batch.claim(DOMAIN), batch.signature) == (claim.message, claim.signature)
    with pytest.raises(BadMessage, match="expected the order of each row, 1 are missing"):
        ClaimBatch.of(claim, orders[1:], DOMAIN)


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(65), bytes(32) + b"\x80" + bytes(31) + b"\x1b"])
def test_a_signature_without_compact_form_never_leaves(signature: bytes) -> None:
    """A signature without a compact form is refused at encoding instead of corrupting the row."""
    with pytest.raises(BadSignature):
        SettleRow(Signed(_order(1).message, signature), 1, Amount(1)).encode()


def test_batches_fit() -> None:
    """Each batch stays within its bound, no row is lost, and the order of rows is kept."""
    claims = [_batch(n, b"signed") for n in (300, 20, 15, 1, 320, 2)]
    batches = list(pack_batches(claims))
    assert [claim for batch in batches for claim in batch] == claims
    assert len(batches) == 3
    for batch in batches:
        bound = BATCH_GAS + sum(CLAIM_GAS + ROW_GAS * len(c.rows) for c in batch)
        assert bound <= MAX_TRANSACTION_GAS
    assert list(pack_batches([])) == []


def test_a_providers_rows_are_divided_before_it_signs() -> None:
    """Each claim of the provider fits a transaction when it is signed, so none is divided later, and no row is lost."""
    rows = _batch(1_000).rows
    claims = ClaimBatch.sign(PROVIDER, rows, DOMAIN)
    assert tuple(row for claim in claims for row in claim.rows) == rows
    assert [[claim] for claim in claims] == list(pack_batches(claims))
    assert max(len(claim.rows) for claim in claims) * ROW_GAS < MAX_TRANSACTION_GAS
    for claim in claims:
        assert Signed(claim.claim(DOMAIN), claim.signature).verify(DOMAIN)
    assert [len(b[0].rows) for b in pack_batches([_batch(1_000, b"signed")])] == [1_000]
    assert ClaimBatch.sign(PROVIDER, (), DOMAIN) == []


async def test_the_bounds_hold_on_chain(world: World) -> None:
    """Rows that open their tabs, use reservations and pay a new coordinator's fee each stay below the planned gas."""
    count, rows = 8, []
    for n in range(count):
        key, coordinator = person(f"key {n}"), person(f"coordinator {n}")
        await world.purse(key, OWNER, 10 * DOLLAR)
        await world.escrow.set_fee(await world.sender(coordinator), 100)
        terms = {"coordinator": coordinator.address, "max_fee_bps": 100, "reserve_target": Amount(DOLLAR)}
        rows.append(world.row(key, PROVIDER.address, DOLLAR, None, **terms))
    claim = world.claim(PROVIDER, *rows)
    result = await world.escrow.settle(world.deployer, [claim])
    assert len(result.of(Settled)) == count
    assert result.gas_used < BATCH_GAS + CLAIM_GAS + ROW_GAS * count


async def test_settle_all_pays_everything(world: World) -> None:
    """Claims that exceed one transaction are settled by several transactions."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    sender = await world.sender(PROVIDER)
    rows = tuple(world.row(KEY, PROVIDER.address, n + 1) for n in range(340))
    results = await world.escrow.settle_all(sender, ClaimBatch.sign(PROVIDER, rows, world.domain))
    assert len(results) == 2
    assert sum(e.paid for r in results for e in r.of(Settled)) == 340
    assert all(result.gas_used < MAX_TRANSACTION_GAS for result in results)


def test_rows_are_plain_values() -> None:
    """Two rows of the same order are equal; a changed total is another row."""
    row = SettleRow(_order(1), 1, Amount(1))
    assert row == SettleRow(_order(1), 1, Amount(1)) != replace(row, cumulative_cost=Amount(2))

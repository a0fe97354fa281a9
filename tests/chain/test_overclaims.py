from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tallystick.chain.calldata import CalldataClaim
from tallystick.chain.claims import ClaimBatch, SettleRow
from tallystick.chain.events import Slashed
from tallystick.chain.overclaims import find_overclaims
from tallystick.chain.settlements import SettlingClaim, settling_claims
from tallystick.protocol.eip712 import Signed
from tallystick.protocol.messages import Receipt
from tallystick.protocol.types import Amount
from tests.builders import build_order, build_receipt
from tests.chain.harness import DOLLAR, World, person
from tests.chain.test_claims import DOMAIN

KEY, OWNER, PROVIDER, OTHER, REPORTER = (person(name) for name in ("key", "owner", "provider", "other", "reporter"))
pairs = st.tuples(st.integers(1, 6), st.integers(0, 9))


def _receipt(seq: int, total: int) -> Signed[Receipt]:
    return Signed(build_receipt(KEY.address, PROVIDER.address, seq=seq, cumulative_cost=Amount(total)), b"")


def _claim(*rows: tuple[int, int]) -> SettlingClaim:
    order = build_order(KEY.address, PROVIDER.address, 9)
    batch = ClaimBatch(PROVIDER.address, tuple(SettleRow(Signed(order, b""), seq, Amount(total)) for seq, total in rows))
    return SettlingClaim(CalldataClaim(PROVIDER.sign(batch.claim(DOMAIN), DOMAIN), batch), "0x", 1)


@given(claimed=st.lists(pairs, max_size=4), signed=st.lists(pairs, max_size=5))
def test_exactly_the_slashable_overclaims_are_found(claimed: list[tuple[int, int]], signed: list[tuple[int, int]]) -> None:
    """A claimed seq is reported exactly if a receipt of the same or a later seq has a lower total, with the greatest excess."""
    wanted: dict[int, int] = {}
    for seq, total in claimed:
        for other, signed_for in signed:
            if seq <= other and total > signed_for:
                wanted[seq] = max(wanted.get(seq, 0), total - signed_for)
    overclaims = find_overclaims([_claim(row) for row in claimed], [_receipt(*pair) for pair in signed])
    assert {overclaim.claimed.seq: int(overclaim.excess) for overclaim in overclaims} == wanted
    together = find_overclaims([_claim(*claimed)] if claimed else [], [_receipt(*pair) for pair in signed])
    assert {overclaim.claimed.seq: int(overclaim.excess) for overclaim in together} == wanted
    for overclaim in overclaims:
        assert overclaim.claimed.seq <= overclaim.receipt.message.seq
        assert overclaim.claimed.cumulative_cost > overclaim.receipt.message.cumulative_cost


async def test_found_evidence_is_accepted_by_the_contract(world: World) -> None:
    """Evidence found on the chain beside other payers' rows slashes the provider, and its id is the contract's."""
    await world.purse(KEY, OWNER, 10 * DOLLAR)
    await world.purse(OTHER, OWNER, 10 * DOLLAR)
    await world.stake(PROVIDER, 50 * DOLLAR)
    receipts = [world.receipt(PROVIDER, KEY.address, seq, seq) for seq in (1, 2, 3)]
    own_row, other_row = world.row(KEY, PROVIDER.address, 5), world.row(OTHER, PROVIDER.address, 9)
    await world.settle(await world.sender(PROVIDER), other_row, own_row)
    claims = await settling_claims(world.escrow, KEY.address, PROVIDER.address)
    (overclaim,) = find_overclaims(claims, receipts)
    assert (overclaim.row, overclaim.excess) == (1, 4)
    assert not await world.escrow.evidence_used(overclaim.evidence_id)
    tx = await world.escrow.slash_overclaim(await world.sender(REPORTER), overclaim.claim, overclaim.row, overclaim.receipt)
    assert tx.of(Slashed)[0].evidence == overclaim.evidence_id
    assert await world.escrow.evidence_used(overclaim.evidence_id)


async def test_a_claim_that_was_not_paid_is_evidence_too(world: World) -> None:
    """A signed claim is evidence even if it was skipped because the purse was empty."""
    await world.purse(KEY, OWNER, 0)
    await world.settle(await world.sender(PROVIDER), world.row(KEY, PROVIDER.address, 5))
    claims = await settling_claims(world.escrow, KEY.address, PROVIDER.address)
    assert len(find_overclaims(claims, [world.receipt(PROVIDER, KEY.address, 1, 4)])) == 1
    assert find_overclaims(claims, [world.receipt(PROVIDER, OTHER.address, 1, 4)]) == []
    assert find_overclaims(claims, []) == []

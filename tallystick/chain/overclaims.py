"""Claims above receipts: what a provider collected, or tried to collect, beside what it signed for. Pure.

The contract slashes a claim row of seq s and total c where a receipt of the same tab, of seq s or later, has a total below c. A
row with a seq above every receipt at hand proves nothing yet: the provider's next receipt decides.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from eth_abi.abi import encode

from tallystick.chain.settlements import SettlingClaim
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.messages import Claim, ClaimRow, Receipt
from tallystick.protocol.types import Amount, Hash


@dataclass(frozen=True, slots=True)
class Overclaim:
    """All that IEscrow.slashOverclaim takes: row number `row` of `claim` is above `receipt`. `transaction` carried the claim."""

    claim: Verified[Claim]
    row: int
    receipt: Signed[Receipt]
    transaction: str

    @property
    def claimed(self) -> ClaimRow:
        """The row that is too high."""
        return self.claim.message.rows[self.row]

    @property
    def excess(self) -> Amount:
        """What the row claims above the receipt, in base units."""
        return self.claimed.cumulative_cost - self.receipt.message.cumulative_cost

    @property
    def evidence(self) -> Hash:
        """The contract's name for this evidence: one for each (provider, payer, claimed seq)."""
        claimed = self.claimed
        types = ["string", "address", "address", "uint64"]
        return keccak(encode(types, ["overclaim", self.claim.message.provider, claimed.payer, claimed.seq]))


def find_overclaims(claims: Iterable[SettlingClaim], receipts: Sequence[Signed[Receipt]]) -> list[Overclaim]:
    """The claims above these receipts, which are of one tab: of each claimed seq the row that is furthest above."""
    if not receipts:
        return []
    ordered = sorted(receipts, key=lambda one: one.message.seq)
    payer, provider = ordered[0].message.payer, ordered[0].message.provider
    seqs = [one.message.seq for one in ordered]
    lowest = list(accumulate(reversed(ordered), _lower))[::-1]
    found: dict[Hash, Overclaim] = {}
    for one in claims:
        claim = one.calldata_claim.claim
        for place, row in enumerate(claim.message.rows):
            first = bisect_left(seqs, row.seq)
            if (row.payer, claim.message.provider) != (payer, provider) or first == len(seqs):
                continue
            over = Overclaim(claim, place, lowest[first], one.transaction)
            if over.excess > 0 and (over.evidence not in found or found[over.evidence].excess < over.excess):
                found[over.evidence] = over
    return list(found.values())


def _lower(one: Signed[Receipt], other: Signed[Receipt]) -> Signed[Receipt]:
    return min(one, other, key=lambda receipt: receipt.message.cumulative_cost)


def highest_claim(claims: Iterable[SettlingClaim], receipt: Receipt) -> ClaimRow | None:
    """The row of the receipt's tab with the greatest total."""
    rows = [row for one in claims for row in one.calldata_claim.claim.message.rows if row.payer == receipt.payer]
    return max(rows, key=lambda row: row.cumulative_cost, default=None)

"""Detection of overclaims: claim rows with a higher total than the provider's own receipts. Pure.

The contract slashes a claim row of seq s and total c if a receipt of the same tab, of seq s or later, has a total below c. A row
with a seq above every known receipt proves nothing until the provider signs its next receipt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tallystick.chain.abi_values import encode
from tallystick.chain.settlements import SettlingClaim
from tallystick.protocol.codecs import keccak
from tallystick.protocol.eip712 import Signed, Verified
from tallystick.protocol.messages import Claim, ClaimRow, Receipt
from tallystick.protocol.types import Amount, Hash


@dataclass(frozen=True, slots=True)
class Overclaim:
    """The evidence for IEscrow.slashOverclaim: row `row` of `claim` is above `receipt`. `transaction` contains the claim."""

    claim: Verified[Claim]
    row: int
    receipt: Signed[Receipt]
    transaction: str

    @property
    def claimed(self) -> ClaimRow:
        """The row that claims too much."""
        return self.claim.message.rows[self.row]

    @property
    def excess(self) -> Amount:
        """The difference between the row and the receipt, in base units."""
        return self.claimed.cumulative_cost - self.receipt.message.cumulative_cost

    @property
    def evidence_id(self) -> Hash:
        """The contract's identifier of this evidence, one for each (provider, payer, claimed seq)."""
        claimed = self.claimed
        types = ["string", "address", "address", "uint64"]
        return keccak(encode(types, ["overclaim", self.claim.message.provider, claimed.payer, claimed.seq]))


def find_overclaims(claims: Iterable[SettlingClaim], receipts: Sequence[Signed[Receipt]]) -> list[Overclaim]:
    """The overclaims above these receipts of one tab. For each claimed seq it is the row with the largest excess."""
    if not receipts:
        return []
    ordered = sorted(receipts, key=lambda receipt: receipt.message.seq)
    payer, provider = ordered[0].message.payer, ordered[0].message.provider
    seqs = [receipt.message.seq for receipt in ordered]
    lowest = list(accumulate(reversed(ordered), _lower))[::-1]
    worst: dict[Hash, Overclaim] = {}
    for settling in claims:
        claim = settling.calldata_claim.claim
        for index, row in enumerate(claim.message.rows):
            first = bisect_left(seqs, row.seq)
            if (row.payer, claim.message.provider) != (payer, provider) or first == len(seqs):
                continue
            overclaim = Overclaim(claim, index, lowest[first], settling.transaction)
            known = worst.get(overclaim.evidence_id)
            if overclaim.excess > 0 and (known is None or known.excess < overclaim.excess):
                worst[overclaim.evidence_id] = overclaim
    return list(worst.values())


def _lower(first: Signed[Receipt], second: Signed[Receipt]) -> Signed[Receipt]:
    return min(first, second, key=lambda receipt: receipt.message.cumulative_cost)


def highest_claim(claims: Iterable[SettlingClaim], receipt: Receipt) -> ClaimRow | None:
    """The row of the receipt's tab with the highest total; None without one."""
    rows = [row for settling in claims for row in settling.calldata_claim.claim.message.rows if row.payer == receipt.payer]
    return max(rows, key=lambda row: row.cumulative_cost, default=None)

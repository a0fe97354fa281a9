"""Overclaims, which are claims above the provider's receipts: finding and slashing them, for `tally receipt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tallystick.cli.onchain import require_gas
from tallystick.cli.output import dollars, show_json, show_table, step
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Address, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.overclaims import Overclaim
    from tallystick.chain.settlements import SettlingClaim
    from tallystick.protocol.eip712 import Signed, Signer
    from tallystick.protocol.messages import Receipt


class NoOverclaim(Refusal):
    """No claim on chain is above the receipts, as with an honest provider."""


async def find(
    escrow: Escrow, receipts: Sequence[Signed[Receipt]], transaction: str | None, context: str = ""
) -> list[Overclaim]:
    """The claims above these receipts, which are all of one tab, in one transaction or in the newest settlements. `context`
    precedes the messages of errors.

    Raises BadSignature for a receipt that its provider did not sign, NoOverclaim if there is none, Refusal that names what is
    missing, Unavailable.
    """
    from tallystick.chain.overclaims import find_overclaims
    from tallystick.chain.settlements import claims_in, settling_claims

    payer, provider = receipts[0].message.payer, receipts[0].message.provider
    if transaction is None:
        claims = await settling_claims(escrow, payer, provider)
    else:
        claims = await claims_in(escrow, transaction, payer, provider)
    overclaims = find_overclaims(claims, receipts)
    for overclaim in overclaims:
        overclaim.receipt.verify(escrow.deployment.domain)
    if not overclaims:
        raise _reason_for_none(claims, receipts, transaction, context)
    unused = [overclaim for overclaim in overclaims if not await escrow.evidence_used(overclaim.evidence_id)]
    if not unused:
        raise Refusal(Code.BAD_MESSAGE, f"{provider} has lost the whole penalty for this claim already: evidence counts once")
    return unused


def _reason_for_none(
    claims: Sequence[SettlingClaim], receipts: Sequence[Signed[Receipt]], transaction: str | None, context: str
) -> Refusal:
    from tallystick.chain.overclaims import highest_claim

    last = max((receipt.message for receipt in receipts), key=lambda receipt: receipt.seq)
    top = highest_claim(claims, last)
    searched = "the newest settlements" if transaction is None else f"transaction {transaction}"
    if top is None:
        kind = NoOverclaim if transaction is None else Refusal
        return kind(
            Code.BAD_MESSAGE,
            f"{context}no claim that {last.provider} signed with a row of {last.payer} is in {searched}. Name the "
            "transaction with --claim TX; if a contract made the call from other data, use an endpoint (--rpc) that has "
            "debug_traceTransaction",
        )
    text = f"{context}the provider's highest claim in {searched} is {dollars(top.cumulative_cost)} as of receipt {top.seq}"
    if top.seq > last.seq:
        return Refusal(
            Code.BAD_MESSAGE,
            f"{text}, and the last receipt here is number {last.seq}, of {dollars(last.cumulative_cost)}. The contract "
            f"compares a claim with a receipt of the same or a later number: bring one of {top.seq} or more with a total below "
            "the claim",
        )
    return NoOverclaim(Code.BAD_MESSAGE, f"{text}, which is not above the receipts here: nothing to slash")


async def slash(escrow: Escrow, signer: Signer, overclaims: Sequence[Overclaim], *, as_json: bool) -> None:
    """Submits each overclaim to the contract and prints the result. Raises Refusal (also if the provider has no stake)."""
    from tallystick.chain.events import Slashed
    from tallystick.cli.transactions import ShownSender

    await require_gas(escrow, signer.address)
    sender, provider, slashed, documents = ShownSender(escrow.rpc, signer), overclaims[0].claim.message.provider, 0, []
    for overclaim in overclaims:
        tx = await escrow.slash_overclaim(sender, overclaim.claim, overclaim.row, overclaim.receipt)
        penalty = sum(event.amount for event in tx.of(Slashed))
        slashed += penalty
        documents.append(describe(overclaim) | {"slashed": str(penalty), "tx": tx.hash, "block": tx.block})
    if as_json:
        show_json({"provider": provider, "slashed": str(slashed), "overclaims": documents})
    else:
        show(overclaims)
        report_slashed(provider, slashed)


def report_slashed(provider: Address, slashed: int) -> None:
    """Says what a provider lost, in base units given, and how the reporter gets its part."""
    step(f"{provider} lost {dollars(slashed)}; your part is credit: tally cash-out")


def describe(overclaim: Overclaim) -> dict[str, object]:
    """An overclaim as JSON. Amounts are base units as text."""
    claimed, receipt = overclaim.claimed, overclaim.receipt.message
    return {
        "payer": claimed.payer,
        "seq": claimed.seq,
        "claimed": str(int(claimed.cumulative_cost)),
        "receiptSeq": receipt.seq,
        "receipt": str(int(receipt.cumulative_cost)),
        "claimTx": overclaim.transaction,
    }


def show(overclaims: Sequence[Overclaim]) -> None:
    """Prints overclaims as a table."""
    rows = [
        (
            overclaim.claimed.seq,
            format_amount(overclaim.claimed.cumulative_cost),
            f"{format_amount(overclaim.receipt.message.cumulative_cost)} (receipt {overclaim.receipt.message.seq})",
            overclaim.transaction,
        )
        for overclaim in overclaims
    ]
    columns = ("as of receipt", "claimed, dollars", "signed, dollars", "transaction")
    show_table(columns, rows, title=f"Overclaims of {overclaims[0].claim.message.provider}")

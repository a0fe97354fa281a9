"""Taking a claim above the receipts to the chain: what `tally receipt report` and `tally receipt overclaims` share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tallystick.cli.onchain import require_coins
from tallystick.cli.output import show_json, show_rows, step
from tallystick.protocol.errors import Code, Refusal
from tallystick.protocol.types import Amount, format_amount

if TYPE_CHECKING:
    from tallystick.chain.escrow import Escrow
    from tallystick.chain.overclaims import Overclaim
    from tallystick.chain.settlements import SettlingClaim
    from tallystick.protocol.eip712 import Signed, Signer
    from tallystick.protocol.messages import Receipt


class NoOverclaim(Refusal):
    """The chain shows no claim above the receipts, as with an honest provider."""


async def find(escrow: Escrow, receipts: Sequence[Signed[Receipt]], transaction: str | None, also: str = "") -> list[Overclaim]:
    """The claims above these receipts, all of one tab, out of one transaction or of the newest settlements. `also`: what else was
    looked for in vain.

    Raises BadSignature for a receipt that its provider did not sign, NoOverclaim where there is none, Refusal that says what is
    missing, Unavailable.
    """
    from tallystick.chain.overclaims import find_overclaims
    from tallystick.chain.settlements import claims_in, settling_claims

    payer, provider = receipts[0].message.payer, receipts[0].message.provider
    if transaction is None:
        claims = await settling_claims(escrow, payer, provider)
    else:
        claims = await claims_in(escrow, transaction, payer, provider)
    found = find_overclaims(claims, receipts)
    for one in found:
        one.receipt.verify(escrow.deployment.domain)
    if not found:
        raise _why_none(claims, receipts, transaction, also)
    fresh = [one for one in found if not await escrow.evidence_used(one.evidence)]
    if not fresh:
        raise Refusal(Code.BAD_MESSAGE, f"{provider} has lost the whole penalty for this already: evidence counts once")
    return fresh


def _why_none(
    claims: Sequence[SettlingClaim], receipts: Sequence[Signed[Receipt]], transaction: str | None, also: str
) -> Refusal:
    from tallystick.chain.overclaims import highest_claim

    last = max((receipt.message for receipt in receipts), key=lambda one: one.seq)
    top = highest_claim(claims, last)
    where = "the newest settlements" if transaction is None else f"transaction {transaction}"
    if top is None:
        kind = NoOverclaim if transaction is None else Refusal
        return kind(
            Code.BAD_MESSAGE,
            f"{also}no claim that {last.provider} signed with a row of {last.payer} is in {where}. Name the transaction with "
            "--claim TX; if a contract made the call from other data, ask an endpoint (--rpc) that has debug_traceTransaction",
        )
    said = f"the provider's highest claim in {where} is {format_amount(top.cumulative_cost)} as of receipt {top.seq}"
    if top.seq > last.seq:
        return Refusal(
            Code.BAD_MESSAGE,
            f"{also}{said}, and the last receipt here is number {last.seq}, of {format_amount(last.cumulative_cost)}. The "
            f"contract punishes a claim by a receipt of the same or a later number: bring one of {top.seq} or more with a total "
            "below the claim",
        )
    return NoOverclaim(Code.BAD_MESSAGE, f"{also}{said}, which is not above the receipts here: nothing to punish")


async def slash(escrow: Escrow, signer: Signer, found: Sequence[Overclaim], *, as_json: bool) -> None:
    """Sends each as evidence, and shows what became of it. Raises ContractError, for one where nothing is at stake."""
    from tallystick.chain.events import Slashed
    from tallystick.chain.sender import Sender

    await require_coins(escrow, signer.address)
    sender, provider, taken, told = Sender(escrow.rpc, signer), found[0].claim.message.provider, 0, []
    for one in found:
        tx = await escrow.slash_overclaim(sender, one.claim, one.row, one.receipt)
        lost = sum(event.amount for event in tx.of(Slashed))
        taken += lost
        told.append(describe(one) | {"slashed": str(lost), "tx": tx.hash, "block": tx.block})
    if as_json:
        show_json({"provider": provider, "slashed": str(taken), "overclaims": told})
    else:
        show(found)
        step(f"{provider} lost {format_amount(Amount(taken))}; your part is credit: tally cash-out")


def describe(one: Overclaim) -> dict[str, object]:
    """An overclaim for programs; amounts are base units."""
    claimed, receipt = one.claimed, one.receipt.message
    return {
        "payer": claimed.payer,
        "seq": claimed.seq,
        "claimed": str(int(claimed.cumulative_cost)),
        "receiptSeq": receipt.seq,
        "receipt": str(int(receipt.cumulative_cost)),
        "claimTx": one.transaction,
    }


def show(found: Sequence[Overclaim]) -> None:
    """Overclaims for people."""
    rows = [
        (
            one.claimed.seq,
            format_amount(one.claimed.cumulative_cost),
            f"{format_amount(one.receipt.message.cumulative_cost)} (receipt {one.receipt.message.seq})",
            one.transaction,
        )
        for one in found
    ]
    show_rows(("as of receipt", "claimed", "signed for", "transaction"), rows, title=f"{found[0].claim.message.provider} claimed")

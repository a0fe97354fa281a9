"""Exports a job as one JSON document, with its order and receipt complete, so that any wallet library can check them."""

from __future__ import annotations

from typing import Any

from tallystick.client.ledger.queries import KnownJob, KnownOrder
from tallystick.client.ledger.schema import OrderState
from tallystick.protocol.eip712 import Domain, Message, Signed, typed_data
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage, usage_of
from tallystick.protocol.types import ZERO_HASH, format_amount


def signed_document(signed: Signed[Message], domain: Domain) -> dict[str, Any]:
    """A signed message as typed data (EIP-712, eth_signTypedData_v4), with its signature and digest in hex."""
    return {
        "typedData": typed_data(signed.message, domain),
        "signature": "0x" + signed.signature.hex(),
        "digest": "0x" + signed.message.digest(domain).hex(),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """Token counts under the names that receipts use."""
    return {"inputTokens": usage.input, "cachedInputTokens": usage.cached, "outputTokens": usage.output}


def job_json(job: KnownJob) -> dict[str, Any]:
    """All that the ledger knows of a job.

    `order`, `terms`, `receipt`, `usage` and `cost` (base units, as a decimal string) are null until they are known.
    `evidenceRoot` is null if the receipt commits to no evidence.
    """
    receipt, answered = job.receipt, _answered_order(job)
    return {
        "job": job.job.hex(),
        "state": job.state.value,
        "reason": job.reason,
        "model": job.model,
        "path": job.path,
        "payer": job.orders[0].order.message.payer if job.orders else None,
        "provider": answered.order.message.provider if answered else None,
        "chainId": job.domain.chain_id,
        "contract": job.domain.contract,
        "createdAt": job.created_at,
        "finishedAt": job.finished_at,
        "order": signed_document(answered.order, job.domain) if answered else None,
        "terms": answered.terms.to_json() if answered else None,
        "receipt": signed_document(receipt, job.domain) if receipt else None,
        **_billed(receipt),
        "shortlist": [_order_json(order) for order in job.orders],
    }


def _answered_order(job: KnownJob) -> KnownOrder | None:
    """The order that the receipt is for, whether it is honest or not."""
    ended = (OrderState.RECORDED, OrderState.DISPUTED)
    return next((order for order in job.orders if order.state in ended), None)


def _billed(receipt: Signed[Receipt] | None) -> dict[str, Any]:
    if receipt is None:
        return {"outcome": None, "usage": None, "cost": None, "costDollars": None, "evidenceRoot": None}
    message = receipt.message
    return {
        "outcome": Outcome(message.outcome).name.lower(),
        "usage": usage_json(usage_of(message)),
        "cost": str(int(message.cost)),
        "costDollars": format_amount(message.cost),
        "evidenceRoot": None if message.evidence_root == ZERO_HASH else "0x" + message.evidence_root.hex(),
    }


def _order_json(known: KnownOrder) -> dict[str, Any]:
    order = known.order.message
    return {
        "provider": order.provider,
        "digest": "0x" + known.digest.hex(),
        "state": known.state.value,
        "cap": str(int(known.terms.max_cost)),
        "ceiling": str(int(order.ceiling)),
    }

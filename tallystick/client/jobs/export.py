"""What the client knows of a job, as one JSON document: order and receipt whole, so that any wallet library can check them."""

from __future__ import annotations

from typing import Any

from tallystick.client.ledger.queries import KnownJob, KnownOrder
from tallystick.client.ledger.schema import OrderState
from tallystick.protocol.eip712 import Domain, Message, Signed, typed_data
from tallystick.protocol.messages import Outcome, Receipt
from tallystick.protocol.pricing import Usage, usage_of
from tallystick.protocol.types import format_amount


def document(signed: Signed[Message], domain: Domain) -> dict[str, Any]:
    """A signed message as a typed-data document (eth_signTypedData_v4), with its signature and digest in hex."""
    return {
        "typedData": typed_data(signed.message, domain),
        "signature": "0x" + signed.signature.hex(),
        "digest": "0x" + signed.message.digest(domain).hex(),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """Token counts, named as receipts name them."""
    return {"inputTokens": usage.input, "cachedInputTokens": usage.cached, "outputTokens": usage.output}


def job_json(known: KnownJob) -> dict[str, Any]:
    """All of it. `order`, `terms`, `receipt`, `usage`, `cost` (base units, decimal string) are null until they are known."""
    receipt, chosen = known.receipt, _chosen(known)
    return {
        "job": known.job.hex(),
        "state": known.state.value,
        "reason": known.reason,
        "model": known.model,
        "path": known.path,
        "payer": known.orders[0].order.message.payer if known.orders else None,
        "provider": chosen.order.message.provider if chosen else None,
        "chainId": known.domain.chain_id,
        "contract": known.domain.contract,
        "createdAt": known.created_at,
        "finishedAt": known.finished_at,
        "order": document(chosen.order, known.domain) if chosen else None,
        "terms": chosen.terms.to_json() if chosen else None,
        "receipt": document(receipt, known.domain) if receipt else None,
        **_bill(receipt),
        "shortlist": [_tell_order(order) for order in known.orders],
    }


def _chosen(known: KnownJob) -> KnownOrder | None:
    """The order that the receipt, honest or not, was given on."""
    ended = (OrderState.RECORDED, OrderState.DISPUTED)
    return next((order for order in known.orders if order.state in ended), None)


def _bill(receipt: Signed[Receipt] | None) -> dict[str, Any]:
    if receipt is None:
        return {"outcome": None, "usage": None, "cost": None, "costDollars": None}
    message = receipt.message
    return {
        "outcome": Outcome(message.outcome).name.lower(),
        "usage": usage_json(usage_of(message)),
        "cost": str(int(message.cost)),
        "costDollars": format_amount(message.cost),
    }


def _tell_order(known: KnownOrder) -> dict[str, Any]:
    order = known.order.message
    return {
        "provider": order.provider,
        "digest": "0x" + known.digest.hex(),
        "state": known.state.value,
        "cap": str(int(known.terms.max_cost)),
        "ceiling": str(int(order.ceiling)),
    }

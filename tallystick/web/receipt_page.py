"""The page that checks a proof file in the browser: what its script needs of the protocol. No file leaves the browser."""

from __future__ import annotations

import json
from typing import Any

from tallystick.protocol.jobs import CHARGES
from tallystick.protocol.messages import Order, Outcome, Receipt, Terms

TEMPLATE = "receipt.html"


def receipt_values() -> dict[str, Any]:
    """What the template TEMPLATE needs: the EIP-712 types of the signed messages, and what each outcome may charge, as JSON."""
    types = Order.SCHEMA.types() | Receipt.SCHEMA.types() | Terms.SCHEMA.types()
    return {"types": json.dumps(types), "charges": json.dumps([CHARGES[outcome].name.lower() for outcome in Outcome])}

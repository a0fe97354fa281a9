"""Tallystick: an open market for inference, where a signed order meets a signed receipt.

    from tallystick import Market, open_wallet

    async with Market("https://coordinator.example", open_wallet("default")) as market:
        result = await market.chat("some-model", [{"role": "user", "content": "hello"}])

`SyncMarket` is the same without async. Errors are a `TallyError`, which says whose `fault` it is and whether to `retry`: a
`PeerError` (BadMessage, BadSignature, BadReceipt, BadSeal: the other side broke a rule; keep the evidence, never retry), a
`Refusal` (a lawful no, final for this request; its `code` is the reason) or `Unavailable` (try again; an `Unfinished` one only
where nothing was billed). All of it is loaded when first asked for, so that the protocol can be imported without the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tallystick.client.choice import Options
    from tallystick.client.config import ClientConfig
    from tallystick.client.job import Job
    from tallystick.client.many import Done
    from tallystick.client.proof import Proof, read_proof
    from tallystick.client.result import Result, Unfinished
    from tallystick.client.sdk import Market
    from tallystick.client.stream import TextStream
    from tallystick.client.sync import SyncJob, SyncMarket, SyncTextStream
    from tallystick.protocol.eip712 import Signer
    from tallystick.protocol.errors import (
        BadMessage,
        BadReceipt,
        BadSeal,
        BadSignature,
        Code,
        Fault,
        PeerError,
        Refusal,
        TallyError,
        Unavailable,
    )
    from tallystick.protocol.requirements import Requirements
    from tallystick.protocol.types import Amount, format_amount, parse_amount
    from tallystick.runtime.keys import open_wallet

__version__ = "0.1.0"
_ERRORS = "BadMessage BadReceipt BadSeal BadSignature Code Fault PeerError Refusal TallyError Unavailable"
_HOMES = {
    "Amount": "tallystick.protocol.types",
    "ClientConfig": "tallystick.client.config",
    "Done": "tallystick.client.many",
    "Job": "tallystick.client.job",
    "Market": "tallystick.client.sdk",
    "Options": "tallystick.client.choice",
    "Proof": "tallystick.client.proof",
    "Requirements": "tallystick.protocol.requirements",
    "Result": "tallystick.client.result",
    "Signer": "tallystick.protocol.eip712",
    "SyncJob": "tallystick.client.sync",
    "SyncMarket": "tallystick.client.sync",
    "SyncTextStream": "tallystick.client.sync",
    "TextStream": "tallystick.client.stream",
    "Unfinished": "tallystick.client.result",
    "format_amount": "tallystick.protocol.types",
    "open_wallet": "tallystick.runtime.keys",
    "parse_amount": "tallystick.protocol.types",
    "read_proof": "tallystick.client.proof",
} | dict.fromkeys(_ERRORS.split(), "tallystick.protocol.errors")
__all__ = [
    "Amount",
    "BadMessage",
    "BadReceipt",
    "BadSeal",
    "BadSignature",
    "ClientConfig",
    "Code",
    "Done",
    "Fault",
    "Job",
    "Market",
    "Options",
    "PeerError",
    "Proof",
    "Refusal",
    "Requirements",
    "Result",
    "Signer",
    "SyncJob",
    "SyncMarket",
    "SyncTextStream",
    "TallyError",
    "TextStream",
    "Unavailable",
    "Unfinished",
    "__version__",
    "format_amount",
    "open_wallet",
    "parse_amount",
    "read_proof",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tallystick' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

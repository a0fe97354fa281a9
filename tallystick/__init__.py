"""Tallystick: an open market for inference, where a signed order meets a signed receipt.

    from tallystick import Market, open_wallet

    async with Market("https://coordinator.example", open_wallet("default")) as market:
        result = await market.chat("some-model", [{"role": "user", "content": "hello"}])

`SyncMarket` is the same API without async. All errors are a `TallyError`, which names the party at fault (`fault`) and whether a
retry can help (`retry`). A `PeerError` (BadMessage, BadSignature, BadReceipt, BadSeal) means that the other side broke a rule:
keep the evidence and never retry. A `Refusal` is final for this request; its `code` is the reason. After `Unavailable` a retry
may succeed; after `StreamInterrupted` only if nothing was billed, or with the same idempotency key. Names are loaded on first
use, so the protocol can be imported without the client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tallystick.version import __version__ as __version__

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.jobs.job import Job
    from tallystick.client.jobs.result import Result, StreamInterrupted
    from tallystick.client.receipts.proof import Proof, read_proof
    from tallystick.client.sdk.batch import BatchResult
    from tallystick.client.sdk.market import Market
    from tallystick.client.sdk.stream import TextStream
    from tallystick.client.sdk.sync import SyncJob, SyncMarket, SyncTextStream
    from tallystick.client.selection.options import RequestOptions
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
    from tallystick.protocol.weights import Weights
    from tallystick.runtime.keystore import open_wallet

_ERRORS = "BadMessage BadReceipt BadSeal BadSignature Code Fault PeerError Refusal TallyError Unavailable"
_HOMES = {
    "Amount": "tallystick.protocol.types",
    "ClientConfig": "tallystick.client.config",
    "BatchResult": "tallystick.client.sdk.batch",
    "Job": "tallystick.client.jobs.job",
    "Market": "tallystick.client.sdk.market",
    "RequestOptions": "tallystick.client.selection.options",
    "Proof": "tallystick.client.receipts.proof",
    "Requirements": "tallystick.protocol.requirements",
    "Weights": "tallystick.protocol.weights",
    "Result": "tallystick.client.jobs.result",
    "Signer": "tallystick.protocol.eip712",
    "SyncJob": "tallystick.client.sdk.sync",
    "SyncMarket": "tallystick.client.sdk.sync",
    "SyncTextStream": "tallystick.client.sdk.sync",
    "TextStream": "tallystick.client.sdk.stream",
    "StreamInterrupted": "tallystick.client.jobs.result",
    "format_amount": "tallystick.protocol.types",
    "open_wallet": "tallystick.runtime.keystore",
    "parse_amount": "tallystick.protocol.types",
    "read_proof": "tallystick.client.receipts.proof",
} | dict.fromkeys(_ERRORS.split(), "tallystick.protocol.errors")
__all__ = [
    "Amount",
    "BadMessage",
    "BadReceipt",
    "BadSeal",
    "BadSignature",
    "BatchResult",
    "ClientConfig",
    "Code",
    "Fault",
    "Job",
    "Market",
    "PeerError",
    "Proof",
    "Refusal",
    "RequestOptions",
    "Requirements",
    "Result",
    "Signer",
    "StreamInterrupted",
    "SyncJob",
    "SyncMarket",
    "SyncTextStream",
    "TallyError",
    "TextStream",
    "Unavailable",
    "Weights",
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

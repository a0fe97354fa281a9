"""Tallystick: an open market for inference, where a signed order meets a signed receipt.

`from tallystick import Market, SyncMarket, ClientConfig, Signer` is the client's SDK; it is loaded when first asked for, so that
the protocol can be imported without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tallystick.client.config import ClientConfig
    from tallystick.client.job import Job, Result
    from tallystick.client.sdk import Market
    from tallystick.client.sync import SyncMarket
    from tallystick.protocol.eip712 import Signer

__version__ = "0.1.0"
__all__ = ["ClientConfig", "Job", "Market", "Result", "Signer", "SyncMarket", "__version__"]

_HOMES = {
    "ClientConfig": "tallystick.client.config",
    "Job": "tallystick.client.job",
    "Market": "tallystick.client.sdk",
    "Result": "tallystick.client.job",
    "Signer": "tallystick.protocol.eip712",
    "SyncMarket": "tallystick.client.sync",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tallystick' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

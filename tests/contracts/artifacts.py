"""Test-only contracts, as compiled by scripts/build-contracts."""

from __future__ import annotations

import json
from pathlib import Path

from tallystick.chain.codec import Abi


def load(name: str) -> Abi:
    """The interface and creation code of a contract in contracts/test."""
    raw = json.loads((Path(__file__).parent / "abi" / f"{name}.json").read_text())
    return Abi(raw["abi"], bytes.fromhex(raw["bytecode"][2:]))

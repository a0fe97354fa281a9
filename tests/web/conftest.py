from __future__ import annotations

from tests.chain.conftest import anvil_url, chain_url, either, either_rpc, either_url, rpc, world

__all__ = ["anvil_url", "chain_url", "either", "either_rpc", "either_url", "rpc", "world"]

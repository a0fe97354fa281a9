from __future__ import annotations

from tests.chain.conftest import chain_url, rpc, world

__all__ = ["chain_url", "rpc", "world"]

from __future__ import annotations

import pytest

from tests.chain.conftest import chain_url, rpc, world
from tests.contracts.freshness import check_freshness

__all__ = ["chain_url", "rpc", "world"]


@pytest.fixture(autouse=True, scope="session")
def fresh_bytecode() -> None:
    """No test here runs on bytecode of earlier sources."""
    check_freshness()

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tests.client.fake_coordinator import FakeMarket
from tests.client.parties import signer


@pytest.fixture
def wallet() -> Signer:
    """The payer's key."""
    return signer("payer")


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    """Settings with a ledger file of its own, and waits within those of a test."""
    return ClientConfig(ledger_file=tmp_path / "client.db", cancel_seconds=60, request_seconds=60, stream_idle_seconds=60)


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market that serves."""
    async with FakeMarket().serve() as market:
        yield market


@pytest.fixture
async def market(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[Market]:
    """A client of the fake market."""
    async with Market(fake.url, wallet, config) as market:
        yield market

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tallystick.client.config import ClientConfig
from tallystick.client.sdk import Market
from tallystick.protocol.eip712 import Signer
from tests.client.fake import FakeMarket, signer


@pytest.fixture
def wallet() -> Signer:
    """The payer's key."""
    return signer("payer")


@pytest.fixture
def config(tmp_path: Path) -> ClientConfig:
    """Settings with short waits and a state file of its own."""
    return ClientConfig(state=tmp_path / "client.db", cancel_seconds=2, control_seconds=2, idle_seconds=2)


@pytest.fixture
async def fake() -> AsyncIterator[FakeMarket]:
    """A market that serves."""
    async with FakeMarket().serve() as market:
        yield market


@pytest.fixture
async def market(fake: FakeMarket, wallet: Signer, config: ClientConfig) -> AsyncIterator[Market]:
    """A client of it."""
    async with Market(fake.url, wallet, config) as market:
        yield market

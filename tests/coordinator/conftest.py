from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.coordinator.harness import World
from tests.coordinator.live_server import Served, served


@pytest.fixture
def world() -> World:
    """A market without nodes, with one payer that has funds."""
    return World()


@pytest.fixture
async def at() -> AsyncIterator[Served]:
    """A market on a real port."""
    async with served() as running:
        yield running

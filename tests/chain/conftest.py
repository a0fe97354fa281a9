from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tallystick.chain.devnet import build_app
from tallystick.chain.rpc import Rpc
from tests.chain.world import World, serving


@pytest.fixture(scope="session")
def chain_url() -> Iterator[str]:
    """An embedded chain on a port of its own, for all tests of one worker."""
    with serving(build_app()) as url:
        yield url


@pytest.fixture
async def rpc(chain_url: str) -> AsyncIterator[Rpc]:
    """A client of the embedded chain."""
    rpc = Rpc(chain_url)
    yield rpc
    await rpc.close()


@pytest.fixture
async def world(rpc: Rpc) -> World:
    """A market with contracts of its own."""
    return await World.make(rpc)

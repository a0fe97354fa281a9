from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tallystick.chain.devnet import build_app
from tallystick.chain.rpc import Rpc
from tests.chain.faulty_proxy import Proxy, misbehaving
from tests.chain.harness import World, serving
from tests.contracts.freshness import check_freshness


@pytest.fixture(scope="session")
def chain_url() -> Iterator[str]:
    """An embedded chain on a port of its own, for all tests of one worker. Fails if the contracts' bytecode is stale."""
    check_freshness()
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


@pytest.fixture
def anvil_url() -> Iterator[str]:
    """The anvil chain. Its clock and its mining are shared, so one test uses it at a time."""
    url = os.environ.get("TALLYSTICK_TEST_ANVIL")
    if not url:
        if os.environ.get("TALLYSTICK_REQUIRE_SERVICES"):
            pytest.fail("needs anvil, which scripts/test starts")
        pytest.skip("needs anvil, which scripts/test starts")
    lock = Path(tempfile.gettempdir()) / f"tallystick-anvil-{urlsplit(url).port}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield url


@pytest.fixture(params=["embedded", "anvil"])
def either_url(request: pytest.FixtureRequest) -> str:
    """The embedded chain, then anvil."""
    return str(request.getfixturevalue("chain_url" if request.param == "embedded" else "anvil_url"))


@pytest.fixture
async def either_rpc(either_url: str) -> AsyncIterator[Rpc]:
    """A client of either chain."""
    rpc = Rpc(either_url)
    yield rpc
    await rpc.close()


@pytest.fixture
async def either(either_rpc: Rpc) -> World:
    """A market with contracts of its own on either chain."""
    return await World.make(either_rpc)


@pytest.fixture(scope="session")
def proxies() -> Iterator[Callable[[str], Proxy]]:
    """A proxy before each chain, for all tests of one worker."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Proxy] = {}

        def before(url: str) -> Proxy:
            if url not in made:
                made[url] = stack.enter_context(misbehaving(url))
            made[url].reset()
            return made[url]

        yield before


@pytest.fixture
def proxy(either_url: str, proxies: Callable[[str], Proxy]) -> Proxy:
    """A proxy before either chain."""
    return proxies(either_url)


@pytest.fixture
async def through(proxy: Proxy) -> AsyncIterator[Rpc]:
    """A client of the proxy that tries twice."""
    rpc = Rpc(proxy.url, timeout=60.0, attempts=2, limit_attempts=2, backoff=0.001)
    yield rpc
    await rpc.close()

"""Endpoints under which a node may dial this coordinator: equal spellings, and endpoints of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from coordinator.domain.endpoints import check_endpoint, endpoints_of, is_loopback
from tallystick.protocol.errors import BadMessage, Code, Refusal
from tallystick.protocol.link import endpoint_of
from tests.coordinator.harness import person
from tests.coordinator.live_server import LinkNode, Served, served, until

PUBLIC = endpoints_of(["https://Coordinator.Example", "wss://[2001:db8::1]:8443", "http://bücher.example:8420"])
ANN = person("ann")


@pytest.mark.parametrize(
    "url",
    [
        "https://coordinator.example",
        "wss://COORDINATOR.example:443/v1/node",
        "https://coordinator.example./",
        "https://[2001:DB8:0:0::1]:8443",
        "http://xn--bcher-kva.example:8420",
    ],
)
def test_spellings_of_its_own_address(url: str) -> None:
    """A node that dialled a public address in another spelling is accepted, whatever the local address."""
    check_endpoint(endpoint_of(url), PUBLIC, ("10.0.0.1", 8420))


@pytest.mark.parametrize(
    "dialled",
    [
        "relay.example:443",
        "coordinator.example:8420",
        "coordinator.example.evil.example:443",
        "evil.example:443#coordinator.example:443",
        "coordinator.example",
        ":443",
        "",
        "localhost:8421",
        "localhost.evil.example:8420",
        "127.0.0.1.evil.example:8420",
        "2130706433:8420",
        "a." * 50_000 + ":443",
        "\u202ecoordinator.example:443",
    ],
)
def test_another_address_is_not_its_own(dialled: str) -> None:
    """Another endpoint is refused; the error names the dialled endpoint and this coordinator's own."""
    with pytest.raises(Refusal) as caught:
        check_endpoint(dialled, PUBLIC, ("127.0.0.1", 8420))
    assert caught.value.code is Code.UNAUTHENTICATED
    assert "coordinator.example:443" in str(caught.value)
    assert repr(dialled[:200]) in str(caught.value)


@pytest.mark.parametrize("dialled", ["localhost:8420", "127.0.0.1:8420", "[::1]:8420", "127.0.0.9:8420", "LOCALHOST:8420"])
def test_loopback_counts_over_loopback_only(dialled: str) -> None:
    """Loopback names count for connections over loopback; from outside they are another machine's."""
    check_endpoint(dialled, (), ("127.0.0.1", 8420))
    check_endpoint(dialled, (), ("::1", 8420))
    for bound in (("10.0.0.1", 8420), ("127.0.0.1", 8421), ("/run/socket", None), None):
        with pytest.raises(Refusal):
            check_endpoint(dialled, (), bound)


def test_what_is_loopback() -> None:
    """Names and addresses that are reachable only from this machine are recognized."""
    assert all(map(is_loopback, ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "localhost.example", "coordinator"]))


def test_a_public_url_that_is_none() -> None:
    """A URL without a host is refused."""
    with pytest.raises(BadMessage):
        endpoints_of(["coordinator"])


@asynccontextmanager
async def _relay(at: Served) -> AsyncIterator[str]:
    """A relay that connects every client to the coordinator, without altering a byte."""

    async def pump(source: ClientConnection | ServerConnection, sink: ClientConnection | ServerConnection) -> None:
        async for message in source:
            await sink.send(message)
        await sink.close()

    async def between(node: ServerConnection) -> None:
        async with connect(at.node_url, proxy=None, compression=None) as coordinator:
            await asyncio.gather(pump(node, coordinator), pump(coordinator, node))

    async with serve(between, "127.0.0.1", 0, compression=None) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/v1/node"


async def test_a_relay_does_not_pass_as_a_coordinator(at: Served) -> None:
    """A HELLO that a relay forwards is refused with both addresses; the node's own connection stays."""
    own = await LinkNode.join(at, ANN)
    async with _relay(at) as url:
        led = await LinkNode.open(url, ANN)
        await led.hello()
        error = await led.refusal()
    assert error.code is Code.UNAUTHENTICATED
    assert led.endpoint in str(error)
    assert own.endpoint.replace("127.0.0.1", "localhost") in str(error)
    await own.send_beat()
    await until(lambda: at.hub.connected == 1)


async def test_a_relay_that_names_the_true_host_does_not_pass(at: Served) -> None:
    """Headers do not count: a relay that connects under the coordinator's own name still relays the wrong answer."""
    async with connect(at.node_url, proxy=None, additional_headers={"x-forwarded-host": "relay.example:443"}) as socket:
        node = LinkNode(ANN, socket, (), "relay.example:443")
        await node.hello()
        assert (await node.refusal()).code is Code.UNAUTHENTICATED
    assert at.hub.connected == 0


async def test_a_public_address_is_let_in() -> None:
    """Behind a proxy, nodes dial its name, which the coordinator knows from its settings."""
    async with served(endpoints=endpoints_of(["https://coordinator.example"])) as at:
        node = await LinkNode.open(at, ANN)
        node.endpoint = "coordinator.example:443"
        await node.hello()
        await until(lambda: at.hub.connected == 1)

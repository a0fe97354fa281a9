"""The links of a node to the replicas of its coordinators, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from node.coordinator.coordinator_links import CoordinatorLinks
from node.coordinator.link import NodeLink
from node.coordinator.link_settings import LinkSettings, node_url
from node.ports import Link
from tallystick.protocol.link import Capacity, Listing
from tallystick.protocol.replicas import Reach, replica_order
from tallystick.protocol.types import Address, JobId
from tallystick.protocol.wire import NO_JOB, Kind, dumps
from tests.node.fake_coordinator import Connection, FakeCoordinator
from tests.node.harness import COORDINATOR, DOMAIN, PROVIDER, make_asks, signer

QUICK = LinkSettings(connect_seconds=30, heartbeat_seconds=30, min_backoff_seconds=0.01, max_backoff_seconds=0.05)


class Handler:
    """A link handler that keeps the open links."""

    def __init__(self) -> None:
        self.open: list[Link] = []

    def connected(self, link: Link) -> None:
        self.open.append(link)

    def frame_received(self, link: Link, kind: Kind, job: JobId, payload: bytes) -> None:
        """Nothing comes here."""

    def disconnected(self, link: Link) -> None:
        self.open.remove(link)


class Node:
    """The links of a node."""

    def __init__(self, *seeds: str, settings: LinkSettings = QUICK, pinned: Address | None = None) -> None:
        self.handler, self.settings, self.pinned = Handler(), settings, pinned
        self.links = CoordinatorLinks(PROVIDER.address, seeds, settings, pace_seconds=0.01)
        self.links.make_link = self._make
        self.made: list[str] = []

    def _make(self, url: str, *, seed: str | None, coordinator: Address | None) -> NodeLink:
        self.made.append(url)
        return NodeLink(
            url,
            signer=PROVIDER,
            domain=DOMAIN,
            handler=self.handler,
            listing=lambda _: Listing.of_one_group(make_asks().current, Capacity(2, 3)),
            capacities=lambda: {0: Capacity(2, 3)},
            settings=self.settings,
            coordinator=coordinator or self.pinned,
            observer=self.links,
            seed=seed,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Node]:
        task = asyncio.create_task(self.links.run())
        try:
            async with asyncio.timeout(60):
                yield self
        finally:
            await self.links.close()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def connected(self) -> set[str]:
        """The URLs of the open links."""
        return {link.url for link in self.links if link.session is not None}

    async def until_connected(self, *coordinators: FakeCoordinator) -> None:
        """Waits until these links are open, and no others."""
        await until(lambda: self.connected() == {node_url(coordinator.url) for coordinator in coordinators})


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a state of which no event tells."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.005)


@asynccontextmanager
async def replicas(count: int, account: Address = COORDINATOR.address) -> AsyncIterator[list[FakeCoordinator]]:
    """Serves the replicas of one coordinator, each of which lists them all."""
    async with AsyncExitStack() as stack:
        served = [await stack.enter_async_context(FakeCoordinator(account=account).serving()) for _ in range(count)]
        for coordinator in served:
            coordinator.replicas += [replica.url for replica in served]
        yield served


async def announce(connection: Connection, *coordinators: FakeCoordinator) -> None:
    """Sends a new list of replicas."""
    await connection.send(Kind.REPLICAS, NO_JOB, dumps([coordinator.url for coordinator in coordinators]))


async def test_whether_links_compete_for_slots() -> None:
    """Links of several replicas do, and so do those of several coordinators; the only link does not."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        assert node.links.shares_slots
    assert Node("http://a.example", "http://b.example").links.shares_slots is False, "before they run"
    async with FakeCoordinator().serving() as alone, Node(alone.url).running() as node:
        await node.until_connected(alone)
        assert not node.links.shares_slots


async def test_a_lone_coordinator_has_one_link() -> None:
    """A coordinator that lists no replicas is dialled where it was configured."""
    async with FakeCoordinator().serving() as coordinator, Node(coordinator.url).running() as node:
        await node.until_connected(coordinator)
        assert node.links.status() == {node_url(coordinator.url): {node_url(coordinator.url): COORDINATOR.address}}
        assert node.links.coordinators() == [COORDINATOR.address]


async def test_a_link_to_every_replica() -> None:
    """The node dials each listed replica once, also its configured URL, and belongs to one coordinator on all of them."""
    async with replicas(3) as served, Node(served[1].url).running() as node:
        await node.until_connected(*served)
        assert sorted(node.made) == sorted(node_url(coordinator.url) for coordinator in served)
        seed = node_url(served[1].url)
        assert node.links.coordinators() == [COORDINATOR.address]
        assert {node.links.seed_of(link) for link in node.handler.open} == {seed}
        endpoint = served[1].url.removeprefix("http://")
        assert {link.endpoint for link in node.handler.open} == {endpoint}
        assert node.links.status() == {seed: dict.fromkeys(map(node_url, served[0].replicas), COORDINATOR.address)}


async def test_the_signed_answer_names_the_dialled_replica() -> None:
    """A replica that listed another one's address gets no answer that it could pass on there."""
    async with replicas(2) as served, Node(served[0].url).running():
        for coordinator in served:
            connection = await coordinator.connections.get()
            assert connection.hello.connect.message.endpoint == coordinator.url.removeprefix("http://")


async def test_a_replica_that_comes_later_is_dialled() -> None:
    """REPLICAS adds a link."""
    async with replicas(2) as served:
        served[0].replicas = []
        async with Node(served[0].url).running() as node:
            await node.until_connected(served[0])
            await announce(await served[0].connections.get(), *served)
            await node.until_connected(*served)


async def test_a_replica_that_left_the_list_keeps_its_link_for_its_jobs() -> None:
    """The link stays while the replica keeps it, and is not opened again after that."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        first, second = [await coordinator.connections.get() for coordinator in served]
        await announce(first, served[0])
        (left,) = [link for link in node.links if link.url == node_url(served[1].url)]
        await until(lambda: left.retired)
        assert left.session is not None
        await announce(second)  # its own list is out of date and is not heard
        await second.socket.close()
        await until(lambda: left not in node.links)
        assert node.connected() == {node_url(served[0].url)}
        assert served[1].connections.empty()
        await announce(first, *served)
        await node.until_connected(*served)


async def test_the_grace_of_a_link_ends() -> None:
    """The link to a replica that left the list closes after the configured time."""
    async with replicas(2) as served, Node(served[0].url, settings=replace(QUICK, replica_grace_seconds=0.01)).running() as node:
        await node.until_connected(*served)
        first, second = [await coordinator.connections.get() for coordinator in served]
        await announce(first, served[0])
        await second.closed.wait()
        await node.until_connected(served[0])


async def test_a_coordinator_that_lists_ever_new_replicas() -> None:
    """No more links than `max_replicas` stay open beside those to the replicas of the newest list."""
    async with replicas(5) as served, Node(served[0].url, settings=replace(QUICK, max_replicas=1)).running() as node:
        for coordinator in served:
            coordinator.replicas = [served[0].url]
        await node.until_connected(served[0])
        connection = await served[0].connections.get()
        for coordinator in served[1:]:
            await announce(connection, coordinator)
            connection = await coordinator.connections.get()
        await until(lambda: len(node.links) <= 2)
        assert node_url(served[4].url) in node.connected()


async def test_more_replicas_than_a_node_may_have_links_to() -> None:
    """The node dials those that come first for its account, so that the nodes spread over them."""
    settings = replace(QUICK, max_replicas=2, replica_grace_seconds=0.01)
    async with replicas(5) as served, Node(served[0].url, settings=settings).running() as node:
        first = replica_order(PROVIDER.address, served[0].replicas)[:2]
        await node.until_connected(*(coordinator for coordinator in served if coordinator.url in first))


async def test_a_configured_url_that_is_not_listed() -> None:
    """A load balancer's URL gives the list; it is dialled again only while no replica is connected."""
    settings = replace(QUICK, replica_grace_seconds=0.01)
    async with (
        replicas(2) as served,
        FakeCoordinator(replicas=served[0].replicas).serving() as balancer,
        Node(balancer.url, settings=settings).running() as node,
    ):
        await node.until_connected(*served)
        assert {node.links.seed_of(link) for link in node.handler.open} == {node_url(balancer.url)}
        await (await balancer.connections.get()).closed.wait()
        balancer.replicas = []
        for coordinator in served:
            connection = await coordinator.connections.get()
            coordinator.account = signer("an heir").address
            await connection.socket.close()
        await node.until_connected(balancer)
        assert {link.endpoint for link in node.handler.open} == {balancer.url.removeprefix("http://")}


async def test_a_listed_address_of_another_coordinator() -> None:
    """A listed URL at which another account answers is dropped with a warning, and is not dialled again while it is listed."""
    async with replicas(2) as served, FakeCoordinator(account=signer("other").address).serving() as other:
        served[0].replicas.append(other.url)
        with capture_logs() as logs:
            async with Node(served[0].url).running() as node:
                await node.until_connected(*served)
                await until(lambda: node_url(other.url) not in {link.url for link in node.links})
                await announce(await served[0].connections.get(), *served, other)
                await node.until_connected(*served)
                assert node.made.count(node_url(other.url)) == 1
        assert other.connections.empty()
        assert [entry["log_level"] for entry in logs if "another coordinator's" in entry["event"]] == ["warning"]


async def test_a_coordinator_cannot_take_anothers_link() -> None:
    """A coordinator that lists the configured URL of another one changes nothing for that one."""
    other_account = signer("other").address
    async with FakeCoordinator().serving() as honest, FakeCoordinator(account=other_account).serving() as other:
        other.replicas = [other.url, honest.url]
        async with Node(honest.url, other.url).running() as node:
            await node.until_connected(honest, other)
            honest_connection, connection = await honest.connections.get(), await other.connections.get()
            await announce(connection, other)
            await announce(honest_connection, honest)
            await until(lambda: honest.url in {url for group in node.links._groups.values() for url in group.listed})
            await node.until_connected(honest, other)
            assert node.links.status()[node_url(honest.url)] == {node_url(honest.url): COORDINATOR.address}
            assert node.links.session(COORDINATOR.address) is not node.links.session(other_account)
            assert sorted(node.made) == sorted(map(node_url, (honest.url, other.url)))


async def test_two_configured_replicas_of_one_coordinator() -> None:
    """URLs of one coordinator's replicas may all be configured: each has one link."""
    async with replicas(3) as served, Node(served[0].url, served[2].url).running() as node:
        await node.until_connected(*served)
        assert sorted(node.made) == sorted(node_url(coordinator.url) for coordinator in served)


async def test_a_coordinator_with_a_new_account() -> None:
    """After a change of the account, the replicas are dialled anew and must give the new one."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        connections = [await coordinator.connections.get() for coordinator in served]
        for coordinator in served:
            coordinator.account = signer("an heir").address
        await connections[0].socket.close()
        await until(lambda: node.links.coordinators() == [signer("an heir").address])
        await node.until_connected(*served)


async def test_addresses_that_a_coordinator_may_not_list() -> None:
    """Replicas that `split_allowed` refuses are not dialled; a warning names them."""
    seed = "http://coordinator.invalid"
    node = Node(seed)
    with capture_logs() as logs:
        async with node.running():
            await until(lambda: len(node.made) == 1)
            (link,) = node.links
            node.links.replicas_listed(link, COORDINATOR.address, ("http://127.0.0.1:1", "http://replica.invalid"))
            await until(lambda: len(node.made) == 2)
    assert node.made == [node_url(seed), node_url("http://replica.invalid")]
    assert [entry["urls"] for entry in logs if "urls" in entry] == [["http://127.0.0.1:1"]]


@pytest.mark.parametrize("payload", [b"{}", b"[1]", b'["ftp://x"]', b"x", dumps(["https://a.example"] * 65)])
async def test_a_malformed_list_ends_the_link(payload: bytes) -> None:
    """A coordinator that sends what is no list of replicas is disconnected, and dialled again."""
    async with FakeCoordinator().serving() as coordinator, Node(coordinator.url).running():
        connection = await coordinator.connections.get()
        await connection.send(Kind.REPLICAS, NO_JOB, payload)
        await connection.closed.wait()
        await coordinator.connections.get()


async def test_capacity_and_asks_go_to_every_replica() -> None:
    """A change of the free slots or of the asks is told on each link."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        node.links.announce_asks()
        for coordinator in served:
            await (await coordinator.connections.get()).until(Kind.ASKS)


@pytest.mark.parametrize("reach", [Reach.ANYWHERE, Reach.NETWORK, Reach.LINK])
async def test_a_replica_is_no_nearer_than_its_coordinator(reach: Reach) -> None:
    """A name that leads to this machine is not used for a coordinator elsewhere: the service there gets no request."""
    async with FakeCoordinator().serving() as coordinator:
        node = Node()
        node.links = CoordinatorLinks(PROVIDER.address, ["http://coordinator.invalid"], QUICK)
        link = node._make(coordinator.url, seed="http://coordinator.invalid", coordinator=COORDINATOR.address)
        link.limit = reach
        assert not await link._run_connection()
        assert "127.0.0.1 is nearer to this machine than the coordinator that listed it" in link.problem
        assert coordinator.connections.empty()


async def test_the_limit_is_the_address_of_the_configured_link() -> None:
    """Links to listed replicas get the reach at which the configured URL was connected."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        assert {link.limit for link in node.links} == {Reach.MACHINE}
        assert {link.reach for link in node.links} == {Reach.MACHINE}
    node = Node("http://coordinator.invalid")
    async with node.running():
        await until(lambda: len(node.made) == 1)
        (link,) = node.links
        link.reach = Reach.NETWORK
        node.links.replicas_listed(link, COORDINATOR.address, ("http://replica.invalid",))
        await until(lambda: len(node.made) == 2)
        assert {other.limit for other in node.links} == {Reach.NETWORK}


async def test_http_requests_go_no_nearer_than_links() -> None:
    """A question to a listed replica has its link's limit; one to the configured URL none; one to another address the widest."""
    async with replicas(2) as served, Node(served[0].url).running() as node:
        await node.until_connected(*served)
        (listed,) = (link for link in node.links if link.url != node_url(served[0].url))
        listed.limit = Reach.NETWORK
        limits = [
            node.links.limit_of(f"{url}/v1/log/proof?since=1") for url in (served[0].url, served[1].url, f"{served[1].url}1")
        ]
        assert limits == [Reach.MACHINE, Reach.NETWORK, Reach.ANYWHERE]

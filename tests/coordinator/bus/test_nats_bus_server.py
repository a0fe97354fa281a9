"""The bus between replicas, over a real NATS server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.bus.nats_address import parse_nats_address
from coordinator.bus.nats_bus import NatsBus, dial_nats
from tests.nats_server import nats_server
from tests.node.engines.test_http_client import certificate_of

SECONDS = 120


class Peer:
    """A bus with what it got."""

    def __init__(self, url: str, prefix: str = "tallystick.0xab") -> None:
        self.bus = NatsBus(parse_nats_address(url, "bus"), prefix)
        self.got: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self.connected = asyncio.Event()
        self.bus.on_message = lambda topic, payload: self.got.put_nowait((topic, payload))
        self.bus.on_connected = self.connected.set


@asynccontextmanager
async def _running(*peers: Peer) -> AsyncIterator[None]:
    runners = [asyncio.create_task(peer.bus.run()) for peer in peers]
    try:
        async with asyncio.timeout(SECONDS):
            yield
    finally:
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)


async def test_a_message_reaches_all_others_of_the_same_coordinator() -> None:
    """The sender does not hear itself, and coordinators that share a server do not hear each other."""
    async with nats_server() as server:
        ann, bob, other = Peer(server.url), Peer(server.url), Peer(server.url, "tallystick.0xcd")
        async with _running(ann, bob, other):
            for peer in (ann, bob, other):
                await peer.connected.wait()
            ann.bus.publish("tab", b"from ann")
            assert await bob.got.get() == ("tab", b"from ann")
            bob.bus.publish("cancel", b"from bob")
            assert await ann.got.get() == ("cancel", b"from bob")
            assert ann.got.empty()
            assert other.got.empty()


async def test_a_server_that_comes_late_and_again() -> None:
    """A bus starts without its server, connects when it comes, notices its death, and connects to the next one."""
    async with nats_server(started=False) as server:
        ann, bob = Peer(server.url), Peer(server.url)
        async with _running(ann, bob):
            for _ in range(2):
                await server.start()
                for peer in (ann, bob):
                    await peer.connected.wait()
                    peer.connected.clear()
                ann.bus.publish("members", b"hello")
                assert await bob.got.get() == ("members", b"hello")
                await server.stop()
                while ann.bus.connected or bob.bus.connected:  # noqa: ASYNC110 - what is waited for has no event
                    await asyncio.sleep(0.01)
                ann.bus.publish("members", b"lost")
    assert ann.bus.dropped["disconnected"] == 2


async def test_a_server_that_refuses_the_password() -> None:
    """The bus goes on trying, and the process is not kept busy; the right password connects."""
    async with nats_server("--user", "ann", "--pass", "right") as server:
        wrong, right = (Peer(server.url.replace("//", f"//ann:{word}@")) for word in ("wrong", "right"))
        async with _running(wrong, right):
            await right.connected.wait()
            right.connected.clear()
        assert not wrong.connected.is_set()


@pytest.mark.parametrize(
    ("options", "credentials"),
    [
        (("--user", "ann", "--pass", "p@s/s:w%1"), "ann:p%40s%2Fs%3Aw%251"),
        (("--user", "a@b", "--pass", "plain"), "a%40b:plain"),
        (("--auth", "s3/cret"), "s3%2Fcret"),
    ],
)
async def test_credentials_are_decoded(options: tuple[str, ...], credentials: str) -> None:
    """The server gets a name, password or token as it is, not as a URL writes it."""
    async with nats_server(*options) as server:
        peer = Peer(server.url.replace("//", f"//{credentials}@"))
        async with _running(peer):
            await peer.connected.wait()


async def test_one_server_of_several_suffices() -> None:
    """A server that is away, and one that refuses the password, do not keep the bus from the next; each has its own reason."""
    async with nats_server("--user", "ann", "--pass", "right") as server, nats_server(started=False) as away:
        wrong, right = (server.url.replace("//", f"//ann:{word}@") for word in ("wrong", "right"))
        peer = Peer(f"{away.url},{wrong},{right}")
        async with _running(peer):
            await peer.connected.wait()
        with pytest.raises(ConnectionError) as caught:
            await dial_nats((away.url, wrong), "tallystick.0xab.*", lambda *_: None)
    assert "Authorization Violation" in str(caught.value)
    assert f"127.0.0.1:{away.port}: " in str(caught.value)


async def test_tls_is_not_dropped_for_a_server_without_it() -> None:
    """Else whoever is on the way could have the password, by answering as a server without TLS."""
    async with nats_server("--user", "ann", "--pass", "s3cret") as server:
        with pytest.raises(ConnectionError, match="does not require TLS"):
            await dial_nats((server.url.replace("nats://", "tls://ann:s3cret@"),), "tallystick.0xab.*", lambda *_: None)


async def test_a_certificate_that_is_not_trusted_is_the_reason(tmp_path: Path) -> None:
    """The operator reads why, and not that a time ran out."""
    file = str(certificate_of("localhost", tmp_path / "server.pem"))
    async with nats_server("--tls", "--tlscert", file, "--tlskey", file) as server:
        with pytest.raises(ConnectionError, match="certificate verify failed"):
            await dial_nats((server.url.replace("127.0.0.1", "localhost"),), "tallystick.0xab.*", lambda *_: None)


async def test_the_server_knows_the_subscription_when_it_is_connected() -> None:
    """Else a message that another replica sends at once would be lost."""
    lines: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"A","version":"2.11.0","proto":1,"max_payload":1048576,"headers":true}\r\n')
        while line := await reader.readline():
            lines.append(line.split()[0])
            if lines[-1] == b"PING":
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1") as server, asyncio.timeout(SECONDS):
        address = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        connection = await dial_nats((address,), "tallystick.0xab.*", lambda *_: None)
        assert b"PING" in lines[lines.index(b"SUB") :], lines
        await connection.close()

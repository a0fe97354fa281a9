from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tallystick.protocol.errors import BadMessage
from tallystick.runtime.connection_limiter import ConnectionLimits
from tallystick.runtime.serving import serving
from tallystick.runtime.trusted_proxies import MAX_HOPS, MAX_PROXIES, TrustedProxies

PROXIES = TrustedProxies.parse(["127.0.0.1", "10.0.0.0/8", "2001:db8:1::/48"])
NETWORKS = ["10.0.0.0/8", "2001:db8:1::/48"]


def _client(*values: bytes, peer: str = "10.0.0.1") -> str:
    return PROXIES.client_address(peer, [(b"host", b"x"), *((b"x-forwarded-for", value) for value in values)])


@pytest.mark.parametrize(
    ("value", "client"),
    [
        (b"198.51.100.7", "198.51.100.7"),
        (b" 198.51.100.7 ", "198.51.100.7"),
        (b"198.51.100.7:4711", "198.51.100.7"),
        (b"2001:db8:2::7", "2001:db8:2::7"),
        (b"2001:DB8:2:0::7", "2001:db8:2::7"),
        (b"[2001:db8:2::7]", "2001:db8:2::7"),
        (b"[2001:db8:2::7]:4711", "2001:db8:2::7"),
        (b"::ffff:198.51.100.7", "198.51.100.7"),
    ],
)
def test_how_a_client_may_be_written(value: bytes, client: str) -> None:
    """IPv4 and IPv6, with brackets and ports, in one spelling."""
    assert _client(value) == client


def test_the_rightmost_address_that_is_no_proxy_is_the_client() -> None:
    """What stands further left is the client's own claim, in the same header or in one before it."""
    assert _client(b"203.0.113.1, 198.51.100.7") == "198.51.100.7"
    assert _client(b"203.0.113.1, 198.51.100.7, 10.9.9.9, [2001:db8:1::5]:80") == "198.51.100.7"
    assert _client(b"203.0.113.1", b"198.51.100.7", b"10.9.9.9") == "198.51.100.7"
    assert _client(b"garbage, 198.51.100.7") == "198.51.100.7"


def test_a_client_among_the_proxies_is_the_leftmost() -> None:
    """A client in the proxies' network counts as itself."""
    assert _client(b"10.3.3.3, 10.2.2.2") == "10.3.3.3"


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b",", b"unknown", b"198.51.100.7,", b"198.51.100.7 203.0.113.1", b"198.51.100", b"198.51.100.7:"),
        *(b"1.2.3.4:x", b"[2001:db8:2::7", b"2001:db8:2::7]", b"[]", b"[198.51.100.7", b"fe80::1%eth0"),
        *(b"[fe80::1%25eth0]:80", b":80", b"_secret", b"198.51.100.7, nobody", b"nobody, 10.2.2.2", b"\xff\xfe"),
        *("\N{FULLWIDTH DIGIT ONE}.2.3.4".encode(), b'for="198.51.100.7"', b"127.1", b"0x7f000001"),
    ],
)
def test_a_header_that_names_nobody_counts_as_the_proxy(value: bytes) -> None:
    """No text becomes an address of its own: a client could otherwise choose a new one for each request."""
    assert _client(value) == "10.0.0.1"
    assert PROXIES.client_address("10.0.0.1", [(b"host", b"x")]) == "10.0.0.1"


def test_only_so_many_hops_are_read() -> None:
    """A chain of proxies that never ends counts as the proxy; the rest of a long header is not read."""
    assert _client(b", ".join([b"198.51.100.7"] + [b"10.2.2.2"] * (MAX_HOPS - 1))) == "198.51.100.7"
    assert _client(b", ".join([b"198.51.100.7"] * 9 + [b"10.2.2.2"] * MAX_HOPS)) == "10.0.0.1"


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        *(("10.0.0.1", True), ("10.255.255.255", True), ("::ffff:10.0.0.1", True), ("2001:db8:1::9%eth0", True)),
        *(("11.0.0.1", False), ("2001:db8:2::9", False), ("", False), ("unix", False), ("127.0.0.2", False)),
    ],
)
def test_whom_a_server_believes(peer: str, trusted: bool) -> None:
    """The networks of the settings, however the system writes the address; without the setting nobody."""
    assert PROXIES.trust(peer) is trusted
    assert not TrustedProxies().trust(peer)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "proxy.example", "", "*", "0.0.0.0/0", "::/0", "10.0.0.0/33"])
def test_settings_that_name_no_proxy_are_refused(text: str) -> None:
    """A name, a network with host bits, or everybody: the error names the setting."""
    with pytest.raises(BadMessage, match="trusted_proxies"):
        TrustedProxies.parse([text])


def test_the_number_of_networks_is_bounded() -> None:
    """Each connection is compared with all of them."""
    assert len(TrustedProxies.parse([f"10.0.0.{n}" for n in range(MAX_PROXIES)]).networks) == MAX_PROXIES
    with pytest.raises(BadMessage, match="at most 64"):
        TrustedProxies.parse([f"10.0.0.{n}" for n in range(MAX_PROXIES + 1)])


# At a server


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it knows of the client."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": scope["client"][0]})
        await receive()
        return
    body = json.dumps([scope["client"][0], scope["scheme"]]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _ask(port: int, *headers: str, times: int = 1) -> list[Any]:
    """Sends requests over one connection. Returns what the app answered to the last one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(60):
        for _ in range(times):
            writer.write("\r\n".join(("GET / HTTP/1.1", "host: x", *headers, "", "")).encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            answer = json.loads(await reader.readexactly(length))
        writer.close()
    return list(answer)


@pytest.fixture
async def proxied() -> AsyncIterator[int]:
    """A server behind a proxy on this machine, with two connections for each address."""
    limits = ConnectionLimits(connections=8, per_address=2, proxies=TrustedProxies.parse(["127.0.0.1"]))
    async with serving(_app, "127.0.0.1", 0, limits=limits) as port:
        yield port


async def test_a_trusted_proxy_names_client_and_scheme(proxied: int) -> None:
    """The app sees the client, and that it came by https; requests of one connection may be of different clients."""
    assert await _ask(proxied, "X-Forwarded-For: 198.51.100.7", "X-Forwarded-Proto: https") == ["198.51.100.7", "https"]
    assert await _ask(proxied, "X-Forwarded-Proto: gopher") == ["127.0.0.1", "http"]
    assert await _ask(proxied, "X-Forwarded-For: nonsense", times=3) == ["127.0.0.1", "http"]


async def test_nobody_else_is_believed() -> None:
    """Without the setting, and from another address than the proxy's, the headers change nothing, on loopback neither."""
    spoof = ("X-Forwarded-For: 198.51.100.7", "X-Forwarded-Proto: https", "Forwarded: for=198.51.100.7")
    async with serving(_app, "127.0.0.1", 0) as port:
        assert await _ask(port, *spoof) == ["127.0.0.1", "http"]
    limits = ConnectionLimits(proxies=TrustedProxies.parse(NETWORKS))
    async with serving(_app, "127.0.0.1", 0, limits=limits) as port:
        assert await _ask(port, *spoof) == ["127.0.0.1", "http"]
        headers = {"X-Forwarded-For": "198.51.100.7"}
        async with connect(f"ws://127.0.0.1:{port}", proxy=None, additional_headers=headers) as socket:
            assert await socket.recv() == "127.0.0.1"


async def test_a_proxys_connections_are_not_one_clients(proxied: int) -> None:
    """More of them than one address may have, up to the server's maximum."""
    kept = [await asyncio.open_connection("127.0.0.1", proxied) for _ in range(7)]
    assert await _ask(proxied, "X-Forwarded-For: 198.51.100.7") == ["198.51.100.7", "http"]
    for _, writer in kept:
        writer.close()


async def test_websockets_count_as_their_clients(proxied: int) -> None:
    """One client's third WebSocket is refused with 429, another client's is not; a closed one makes room."""

    def opened(client: str) -> connect:
        return connect(f"ws://127.0.0.1:{proxied}", proxy=None, additional_headers={"X-Forwarded-For": f"{client}, 127.0.0.1"})

    first: list[ClientConnection] = [await opened("198.51.100.7") for _ in range(2)]
    assert [await socket.recv() for socket in first] == ["198.51.100.7"] * 2
    with pytest.raises(InvalidStatus) as refused:
        await opened("198.51.100.7")
    assert refused.value.response.status_code == 429
    async with opened("198.51.100.8") as socket:
        assert await socket.recv() == "198.51.100.8"
    await first[0].close()
    async with asyncio.timeout(60):
        while True:
            try:
                async with opened("198.51.100.7"):
                    break
            except InvalidStatus:
                await asyncio.sleep(0.01)
    await first[1].close()

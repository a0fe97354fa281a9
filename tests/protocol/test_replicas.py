"""The replicas of a coordinator: their lists, their order for a payer, and which of them may be dialled."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.replicas import (
    MAX_REPLICA_ID,
    MAX_REPLICA_URL,
    MAX_REPLICAS,
    Reach,
    Replica,
    reach_of,
    read_replica_url,
    read_replica_urls,
    read_replicas,
    read_welcome,
    replica_order,
    split_allowed,
)
from tallystick.protocol.types import Address
from tests.protocol.strategies import addresses, many, some

PAYER = Address("0x" + "11" * 20)
hosts = st.from_regex(r"\A[a-z][a-z0-9]{0,12}\Z")
replica_lists = st.lists(st.builds("https://{}.example:{}".format, hosts, st.integers(1, 65_535)), unique=True, max_size=8)


def test_the_order_is_this_one() -> None:
    """The rank is the SHA-256 of the payer's bytes and the URL, as other implementations compute it."""
    urls = [f"https://r{i}.example" for i in range(5)]
    ranks = {url: hashlib.sha256(bytes([0x11]) * 20 + url.encode()).hexdigest() for url in urls}
    assert replica_order(PAYER, urls) == sorted(urls, key=ranks.__getitem__, reverse=True)
    assert replica_order(PAYER, urls)[0] == "https://r4.example"


@many
@given(addresses, replica_lists, st.randoms(use_true_random=False))
def test_every_client_of_a_payer_agrees(payer: Address, urls: list[str], random: Any) -> None:
    """The order depends on the payer and the set of replicas alone, and contains each replica once."""
    shuffled = [*urls, *urls]
    random.shuffle(shuffled)
    assert replica_order(payer, shuffled) == replica_order(payer, urls)
    assert sorted(replica_order(payer, urls)) == sorted(urls)


@some
@given(st.lists(addresses, min_size=1, max_size=20), replica_lists.filter(bool), st.data())
def test_a_lost_replica_moves_only_its_own_payers(payers: list[Address], urls: list[str], data: st.DataObject) -> None:
    """Without a replica, the order of the others stays: only payers for which it was first get another one."""
    lost = data.draw(st.sampled_from(urls))
    rest = [url for url in urls if url != lost]
    for payer in payers:
        assert replica_order(payer, rest) == [url for url in replica_order(payer, urls) if url != lost]


def test_payers_spread_over_the_replicas() -> None:
    """Each of three replicas is first for about a third of the payers."""
    urls = [f"https://r{i}.example" for i in range(3)]
    first = [replica_order(Address(f"0x{i:040x}"), urls)[0] for i in range(3_000)]
    assert all(850 < first.count(url) < 1_150 for url in urls)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("https://coordinator.example", "https://coordinator.example"),
        ("https://coordinator.example/", "https://coordinator.example"),
        ("http://10.0.0.1:8420/market/", "http://10.0.0.1:8420/market"),
        ("http://[2001:db8::1]:8420", "http://[2001:db8::1]:8420"),
    ],
)
def test_a_replicas_address(text: str, read: str) -> None:
    """Base URLs over http and https, with a port and a path, are read; a slash at the end is dropped."""
    assert read_replica_url(text, "url") == read


@pytest.mark.parametrize(
    "raw",
    [
        None,
        7,
        "",
        "coordinator.example",
        "ftp://coordinator.example",
        "ws://coordinator.example",
        "https://",
        "https:///path",
        "https://a.example:0",
        "https://a.example:99999",
        "https://a.example:x",
        "https://[::1",
        "https://user:secret@a.example",
        "https://a.example?key=1",
        "https://a.example#part",
        "https://a.example\\@b.example",
        "https://a example",
        "https://a.example\r\nx: y",
        "https://ä.example",
        "https://" + "a" * MAX_REPLICA_URL,
    ],
)
def test_what_is_no_address(raw: object) -> None:
    """Other schemes, credentials, queries, control characters and overlong URLs are refused; the error names the member."""
    with pytest.raises(BadMessage, match=r"^welcome\.replicas\[0\]: "):
        read_welcome({"replicas": [raw]})


def test_the_list_in_welcome() -> None:
    """WELCOME lists URLs, each once; an older coordinator, and a lone one, list none."""
    url = "https://a.example"
    assert read_welcome({}) == ()
    assert read_welcome({"replicas": [url, url + "/", "https://b.example"], "later": 1}) == (url, "https://b.example")
    raw: object
    for raw in (None, [], "x"):
        with pytest.raises(BadMessage, match=r"^welcome: "):
            read_welcome(raw)


def test_a_list_is_bounded() -> None:
    """At most MAX_REPLICAS replicas are read, from either list."""
    urls = [f"https://r{i}.example" for i in range(MAX_REPLICAS + 1)]
    assert len(read_replica_urls(urls[:-1], "x")) == MAX_REPLICAS
    with pytest.raises(BadMessage, match=r"^x: "):
        read_replica_urls(urls, "x")
    entries = [{"id": str(i), "url": url} for i, url in enumerate(urls)]
    assert len(read_replicas(entries[:-1], "x")) == MAX_REPLICAS
    with pytest.raises(BadMessage, match=r"^x: "):
        read_replicas(entries, "x")


def test_the_list_in_info() -> None:
    """Each replica of /v1/info has an id and a URL; what is written is read again."""
    replica = Replica("a1", "https://a.example")
    assert read_replicas([replica.to_json(), {"id": "b", "url": replica.url + "/", "more": 1}], "info.replicas") == (replica,)
    for entry in (7, {"id": "a"}, {"url": "https://a.example"}, {"id": 1, "url": "https://a.example"}):
        with pytest.raises(BadMessage, match=r"^info\.replicas\[0\]"):
            read_replicas([entry], "info.replicas")
    with pytest.raises(BadMessage, match=r"^info\.replicas\[0\]\.id: "):
        read_replicas([{"id": "x" * (MAX_REPLICA_ID + 1), "url": "https://a.example"}], "info.replicas")


@pytest.mark.parametrize("seed", ["https://a.example", "wss://a.example/v1/node"])
def test_an_encrypted_coordinator_cannot_ask_for_plaintext(seed: str) -> None:
    """Peers that were given an https URL do not dial http replicas."""
    assert split_allowed(seed, ["https://b.example", "http://b.example"]) == (["https://b.example"], ["http://b.example"])


NEAR = [
    "localhost:9",
    "LOCALHOST.:9",
    "x.localhost",
    "localhost.localdomain",
    "localhost4",
    "localhost6.localdomain6",
    "ip6-localhost",
    "ip6-loopback",
    "box.localdomain",
    "127.0.0.1:9",
    "127.1.2.3",
    "[::1]:9",
    "[::ffff:127.0.0.1]:9",
    "[::7f00:1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "0.0.0.0",
    "0.1.2.3",
    "[::]",
    "169.254.169.254",
    "[64:ff9b::a9fe:a9fe]",
    "[fe80::1]",
    "224.0.0.1",
    "2130706433",
    "127.1",
    "127.1.",
    "0x7f000001",
    "0X7F.1",
    "127.0x0.0x0.0x1",
    "127.0.0.01",
    "0177.0.0.1",
    "127.0.0.1%2e",
    "127%2e0.0.1",
    "%31.example",
    "a.0x",
]


@pytest.mark.parametrize("host", NEAR)
def test_a_distant_coordinator_cannot_send_its_peers_home(host: str) -> None:
    """Replicas on the peer's own machine or link are dialled only if the configured coordinator is on this machine."""
    url = f"http://{host}"
    for seed in ("http://coordinator.example", "http://8.8.8.8", "http://10.0.0.1"):
        assert split_allowed(seed, [url]) == ([], [url])
    assert split_allowed("http://127.0.0.1:8420", [url]) == ([url], [])


@pytest.mark.parametrize("host", ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.100.100.200", "[fd00::2]", "[64:ff9b::a00:1]"])
def test_a_public_coordinator_cannot_send_its_peers_into_their_network(host: str) -> None:
    """Private addresses are dialled only for a coordinator at a private address; a name is judged when it is dialled."""
    url = f"http://{host}:8420"
    for seed in ("http://8.8.8.8", "http://[2a00::1]"):
        assert split_allowed(seed, [url]) == ([], [url])
    for seed in ("http://10.0.0.1", "http://coordinator-1:8420", "http://localhost"):
        assert split_allowed(seed, [url]) == ([url], [])


@pytest.mark.parametrize(
    ("seed", "path"),
    [
        ("http://c.example", ""),
        ("ws://c.example/v1/node", ""),
        ("http://c.example/market/", "/market"),
        ("ws://c/m/v1/node", "/m"),
    ],
)
def test_the_path_is_the_configured_one(seed: str, path: str) -> None:
    """A replica has the path of the configured coordinator, or none: the coordinator chooses no path of another service."""
    good = [f"http://r.example{path}", "http://r.example"]
    bad = [f"http://r.example{path}{more}" for more in ("/admin/delete", "/x/v1/node")] + ["http://r.example/%61"]
    assert split_allowed(seed, good + bad) == (good, bad)


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("8.8.8.8", Reach.ANYWHERE),
        ("2a00::1", Reach.ANYWHERE),
        ("::ffff:8.8.8.8", Reach.ANYWHERE),
        ("64:ff9b::808:808", Reach.ANYWHERE),
        ("10.0.0.1", Reach.NETWORK),
        ("fd00::1", Reach.NETWORK),
        ("::ffff:10.0.0.1", Reach.NETWORK),
        ("240.0.0.1", Reach.NETWORK),
        ("64:ff9b:1::808:808", Reach.NETWORK),
        ("169.254.169.254", Reach.LINK),
        ("fe80::1%eth0", Reach.LINK),
        ("127.9.9.9", Reach.MACHINE),
        ("::ffff:127.0.0.1", Reach.MACHINE),
        ("::1", Reach.MACHINE),
        ("::7f00:1", Reach.MACHINE),
        ("0.0.0.0", Reach.MACHINE),
        ("/run/socket", Reach.MACHINE),
        ("", Reach.MACHINE),
    ],
)
def test_from_where_an_address_can_be_reached(address: str, reach: Reach) -> None:
    """An address is as near as the nearest one in it; what is no address is nearest."""
    assert reach_of(address) is reach


def test_replicas_in_a_private_network() -> None:
    """A coordinator in a private network lists its replicas there."""
    urls = ["http://10.0.0.2:8420", "http://coordinator-1:8420", "http://[fd00::2]:8420"]
    assert split_allowed("http://10.0.0.1:8420", urls) == (urls, [])

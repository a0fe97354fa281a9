"""Origins of public URLs, as browsers write them, and those of a server that listens at an address."""

from __future__ import annotations

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.origins import check_urls, is_loopback_name, own_origins, read_origin, same_host


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://A.example", "https://a.example"),
        ("https://a.example:443/path", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("https://[::1]:8420", "https://[::1]:8420"),
        ("https://[::443]", "https://[::443]"),
        ("https://[::1]:443", "https://[::1]"),
        ("https://a.example./path", "https://a.example"),
        ("https://A.example.:443", "https://a.example"),
        ("https://a.example.:80", "https://a.example:80"),
    ],
)
def test_origin_of_a_public_url(url: str, origin: str) -> None:
    """Public URLs are compared as browsers write origins."""
    assert read_origin(url) == origin


def test_own_origins() -> None:
    """A server is its public URLs, and the address on which it listens, if others can name that."""
    assert own_origins(("https://a.example",), "0.0.0.0", 1) == ("https://a.example",)
    assert own_origins((), "::", 1) == ()
    assert own_origins((), "10.0.0.5", 8421) == ("http://10.0.0.5:8421",)
    assert own_origins((), "fd00::1", 8421) == ("http://[fd00::1]:8421",)
    assert own_origins((), "127.0.0.1", 8421) == ("http://127.0.0.1:8421",)
    assert own_origins(("https://a.example",), "10.0.0.5", 1) == ("https://a.example", "http://10.0.0.5:1")
    for host in ("127.0.0.1", "::1", "localhost"):
        assert own_origins(("https://a.example",), host, 1) == ("https://a.example",), "each visitor's own machine"


@pytest.mark.parametrize(
    ("scheme", "host", "written"),
    [
        ("https", "A.example:443", "a.example"),
        ("https", "a.example.", "a.example"),
        ("https", "a.example.:443", "a.example"),
        ("http", "a.example:443", "a.example:443"),
        ("http", "[::1]:80", "[::1]"),
        *(("https", host, "") for host in ("", "u@a.example", "a.example/b", "a.example?b", "a.example#b", "[::1", "[x]")),
    ],
)
def test_same_host(scheme: str, host: str, written: str) -> None:
    """A host is written in one way, however a client wrote it; what is none is empty."""
    assert same_host(scheme, host) == written


def test_loopback_names() -> None:
    """Names and addresses of this machine, with and without a port."""
    for host in ("localhost", "LOCALHOST.:80", "a.localhost:9", "127.9.9.9", "[::1]:8420"):
        assert is_loopback_name(host), host
    for host in ("", "localhost.example", "10.0.0.5", "[::2]", "[::1", "127.0.0.1.example"):
        assert not is_loopback_name(host), host


@pytest.mark.parametrize(
    "url", ["", "a.example", "ftp://a.example", "http://", "https://user@a.example", "http://a:99999", "http://[::1"]
)
def test_urls_that_are_none(url: str) -> None:
    """The setting is named."""
    check_urls(("https://a.example", "http://10.0.0.5:8421/path"), "page_urls")
    with pytest.raises(BadMessage, match="config: page_urls"):
        check_urls((url,), "page_urls")

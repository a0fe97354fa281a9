"""Origins of public URLs, as browsers write them, and those of a server that listens at an address."""

from __future__ import annotations

import pytest

from tallystick.protocol.errors import BadMessage
from tallystick.protocol.origins import check_urls, own_origins, read_origin


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://A.example", "https://a.example"),
        ("https://a.example:443/path", "https://a.example"),
        ("http://a.example:80", "http://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("https://[::1]:8420", "https://[::1]:8420"),
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


@pytest.mark.parametrize(
    "url", ["", "a.example", "ftp://a.example", "http://", "https://user@a.example", "http://a:99999", "http://[::1"]
)
def test_urls_that_are_none(url: str) -> None:
    """The setting is named."""
    check_urls(("https://a.example", "http://10.0.0.5:8421/path"), "page_urls")
    with pytest.raises(BadMessage, match="config: page_urls"):
        check_urls((url,), "page_urls")

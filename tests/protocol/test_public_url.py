from __future__ import annotations

from urllib.parse import unquote

import pytest

from tallystick.protocol.public_url import has_secret, public_url, without_secrets

KEY = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8545", "http://127.0.0.1:8545"),
        ("http://127.0.0.1:8545/", "http://127.0.0.1:8545"),
        ("http://[::1]:8545", "http://[::1]:8545"),
        (f"https://mainnet.infura.io/v3/{KEY}", "https://mainnet.infura.io/…"),
        (f"https://eth.example/?apikey={KEY}", "https://eth.example/…"),
        (f"https://lb.drpc.org/ogrpc?network=base&dkey={KEY}", "https://lb.drpc.org/…"),
        (f"https://user:{KEY}@node.example:8545", "https://node.example:8545"),
        (f"wss://node.example/ws#{KEY}", "wss://node.example/…"),
        ("not a url", "…"),
        (f"{KEY}://{KEY}", "…"),
        ("http://[", "…"),
        ("http://host:99999999", "…"),
        ("", "…"),
    ],
)
def test_what_is_shown_of_a_url(url: str, shown: str) -> None:
    """Scheme, host and port are shown; path, query, fragment and user name are not."""
    assert public_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        f"https://mainnet.infura.io/v3/{KEY}",
        f"https://x.quiknode.pro/{KEY}/",
        f"https://eth.example/?apikey={KEY}",
        f"https://user:{KEY}@node.example",
        "https://nd-1.p2pify.com/correct-horse-battery",
        "https://eth.example/rpc?key=a%2Fb%20c1",
    ],
)
def test_a_servers_words_do_not_show_the_key(url: str) -> None:
    """The key is removed from a text in which the server or an HTTP library repeats the URL or the key itself."""
    assert has_secret(url)
    secret = next(part for part in ("correct-horse-battery", "a/b c1", KEY) if part in unquote(url))
    shown = without_secrets(f"cannot reach {url}: the key {secret} is not valid", url)
    assert secret not in shown
    assert "the key … is not valid" in shown
    assert public_url(url) in shown


def test_ordinary_urls_have_no_secret() -> None:
    """Ordinary words of a path stay in a text."""
    for url in ("http://127.0.0.1:8545", "https://mainnet.example/rpc/v1/ethereum", "http://[", "", "https://base.example/?x=1"):
        assert not has_secret(url)
        assert without_secrets("block ethereum v1 rpc not found", url) == "block ethereum v1 rpc not found"

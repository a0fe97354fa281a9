"""Plain HTTP to another machine causes a warning; to this machine it does not."""

from __future__ import annotations

import pytest
import structlog

from tallystick.client.config import ClientConfig
from tallystick.client.sdk.market import Market
from tallystick.protocol.eip712 import Signer
from tallystick.runtime.plaintext import is_plaintext


@pytest.mark.parametrize(
    ("url", "readable"),
    [
        ("http://market.example", True),
        ("http://192.168.1.5:8420", True),
        ("HTTP://market.example:8420/", True),
        ("ws://10.0.0.1/v1/node", True),
        ("http://[2001:db8::1]:8420", True),
        ("http://localhost.evil.example", True),
        ("http://127.0.0.1.example", True),
        ("http://0.0.0.0:8420", True),
        ("https://market.example", False),
        ("wss://market.example", False),
        ("http://localhost:8420", False),
        ("http://127.0.0.1:8420", False),
        ("http://127.9.9.9", False),
        ("http://[::1]:8420", False),
        ("http://[::ffff:127.0.0.1]", False),
        ("http://[bad", False),
        ("", False),
    ],
)
def test_readers_of_a_connection(url: str, readable: bool) -> None:
    """Names everybody who can read a connection: nobody with TLS or on the same machine."""
    assert is_plaintext(url) is readable


async def test_plain_http_to_a_coordinator_is_never_silent(config: ClientConfig, wallet: Signer) -> None:
    """Opening a client warns about readable data; a client with TLS, or on the coordinator's machine, does not warn."""
    for url, warned in (("http://market.example:8420", 1), ("http://127.0.0.1:1", 0), ("https://market.example", 0)):
        with structlog.testing.capture_logs() as logs:
            async with Market(url, wallet, config):
                pass
        warnings = [entry for entry in logs if "PLAIN HTTP" in entry["event"]]
        assert len(warnings) == warned
        assert all(entry["log_level"] == "warning" and "which account buys" in entry["exposed"] for entry in warnings)

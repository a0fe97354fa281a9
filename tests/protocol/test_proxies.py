from __future__ import annotations

import pytest

from tallystick.protocol.proxies import uses_proxy


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v1", "http://127.8.0.1", "http://localhost:1", "http://[::1]:1", "ws://localhost"]
)
def test_this_machine_is_reached_directly(url: str) -> None:
    """No proxy stands between two programs of one machine."""
    assert not uses_proxy(url)


@pytest.mark.parametrize("url", ["https://engine.example/v1", "http://10.0.0.1:8000", "wss://market.example"])
def test_other_machines_are_reached_as_the_environment_says(url: str) -> None:
    """HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply."""
    assert uses_proxy(url)

"""Addresses of NATS servers."""

from __future__ import annotations

import pytest

from coordinator.bus.nats_address import MAX_SERVERS, describe_nats, parse_nats_address
from tallystick.protocol.errors import BadMessage


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nats://127.0.0.1:4222", ("nats://127.0.0.1:4222",)),
        ("nats://bus.example", ("nats://bus.example:4222",)),
        ("nats://bus.example/", ("nats://bus.example:4222",)),
        ("tls://ann:se%40cret@bus.example:443", ("tls://ann:se%40cret@bus.example:443",)),
        ("nats://token@bus.example", ("nats://token@bus.example:4222",)),
        ("nats://[::1]:4222", ("nats://[::1]:4222",)),
        (" nats://a:1 , nats://b:2,", ("nats://a:1", "nats://b:2")),
    ],
)
def test_addresses_of_servers(text: str, servers: tuple[str, ...]) -> None:
    """Each server has a scheme, a host and a port; credentials stay as they were written."""
    assert parse_nats_address(text, "bus") == servers


@pytest.mark.parametrize(
    "text",
    [
        "",
        " , ",
        "127.0.0.1:4222",
        "bus.example",
        "http://bus.example:4222",
        "redis://bus.example",
        "nats://",
        "nats://:4222",
        "nats://bus.example:0",
        "nats://bus.example:70000",
        "nats://bus.example:x",
        "nats://bus.example/path",
        "nats://bus.example?tls=1",
        "nats://bus.example#x",
        "nats://[::1",
        "nats://ann:s3cret/x@bus.example",
        ",".join(["nats://a:1"] * (MAX_SERVERS + 1)),
    ],
)
def test_other_addresses_are_refused_without_their_secrets(text: str) -> None:
    """The error names the setting and the expected form, and shows no password."""
    with pytest.raises(BadMessage, match="bus: expected nats://") as caught:
        parse_nats_address(text, "bus")
    assert "s3cret" not in str(caught.value)


def test_a_description_has_no_credentials() -> None:
    """Logs name hosts and ports alone."""
    assert describe_nats(parse_nats_address("tls://ann:secret@a:1,nats://b", "bus")) == "a:1, b:4222"

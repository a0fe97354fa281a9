"""The address of a NATS server, or of the servers of one NATS cluster. No message contains a password or a token."""

from __future__ import annotations

from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage

FORMS = "nats://HOST:PORT or tls://USER:PASSWORD@HOST:PORT, several separated by commas"
DEFAULT_PORT = 4222
MAX_SERVERS = 16


def parse_nats_address(text: str, setting: str) -> tuple[str, ...]:
    """Returns the URL of each server. Raises BadMessage that names the setting."""
    servers = tuple(part.strip() for part in text.split(",") if part.strip())
    if not 1 <= len(servers) <= MAX_SERVERS:
        raise BadMessage(f"{setting}: expected {FORMS}, at most {MAX_SERVERS}, got {len(servers)} addresses")
    return tuple(_parse_server(server, setting) for server in servers)


def _parse_server(server: str, setting: str) -> str:
    try:
        parts = urlsplit(server)
        host, port = parts.hostname, DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        raise BadMessage(f"{setting}: expected {FORMS}; in user and password, write @ as %40, : as %3A and / as %2F") from None
    if parts.scheme not in {"nats", "tls"}:
        raise BadMessage(f"{setting}: expected {FORMS}, got {f'the scheme {parts.scheme[:40]!r}' if host else 'no scheme'}")
    if not host or not port or parts.path.strip("/") or parts.query or parts.fragment:
        raise BadMessage(f"{setting}: expected {FORMS}, got an address without a host, or with more than host and port")
    credentials = parts.netloc.rpartition("@")[0]
    name = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{f'{credentials}@' if credentials else ''}{name}:{port}"


def describe_nats(servers: tuple[str, ...]) -> str:
    """The hosts and ports of the servers, without credentials."""
    return ", ".join(server.rpartition("@")[2].rpartition("/")[2] for server in servers)

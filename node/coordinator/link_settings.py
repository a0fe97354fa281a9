"""Settings of the link to a coordinator, and its address."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from tallystick.protocol.errors import BadMessage


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Settings of the link; times are seconds. `outbox_frames`: frames that may wait before jobs are slowed down.

    `max_replicas`: replicas of one coordinator to connect to. `replica_grace_seconds`: how long the link to a replica that is no
    longer listed may stay open for its jobs.
    """

    connect_seconds: float = 10.0
    heartbeat_seconds: float = 5.0
    ping_seconds: float = 20.0
    min_backoff_seconds: float = 0.5
    max_backoff_seconds: float = 10.0
    outbox_frames: int = 1_024
    max_replicas: int = 8
    replica_grace_seconds: float = 600.0


def node_url(url: str) -> str:
    """Returns the URL of a coordinator's node link, given its base URL (http, https, ws or wss). Raises BadMessage."""
    parts = urlsplit(url if "//" in url else f"//{url}", scheme="http")
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise BadMessage(f"coordinator: expected a URL such as https://coordinator.example, got {url!r}")
    path = parts.path.rstrip("/")
    return f"{scheme}://{parts.netloc}{path if path.endswith('/v1/node') else path + '/v1/node'}"

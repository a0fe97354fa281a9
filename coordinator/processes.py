"""Several replicas on this machine by one command: one shared port, and a port of its own for each."""

from __future__ import annotations

import socket
from dataclasses import replace

from coordinator.config import CoordinatorConfig
from tallystick.runtime import logs
from tallystick.runtime.process_group import fork_processes
from tallystick.runtime.serving import SharedPort, listen

STOP_SECONDS = 30
"""How long a process may take to stop after its jobs had their time to end."""


def split(config: CoordinatorConfig) -> tuple[CoordinatorConfig, SharedPort]:
    """Forks `workers` processes, and returns in each its config and the port that all share. The parent does not return.

    The own ports follow the shared one; if that is 0, the system chooses all. Raises Unavailable (port_unavailable).
    """
    logs.configure(json=config.log_json, level=config.log_level)
    with reserve(config.host, config.port) as held:
        shared = int(held.getsockname()[1])
        index = fork_processes(config.workers, config.drain_seconds + STOP_SECONDS, shared)
    own = config.port + 1 + index if config.port else 0
    return replace(config, port=own), SharedPort(shared)


def reserve(host: str, port: int) -> socket.socket:
    """Holds a shared port for this user without listening on it. Raises Unavailable if another program listens there."""
    if port:
        listen(host, port).close()
    held = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind((host, port))
    return held

"""Ports of several replicas on one machine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from coordinator import processes as module
from coordinator.config import CoordinatorConfig
from coordinator.processes import reserve, split
from tallystick.cli.local.processes import free_port
from tallystick.protocol.errors import Code, Unavailable
from tallystick.runtime.serving import listen

CONFIG = CoordinatorConfig(deployment=Path("d.json"), db="postgresql://db.example/market", bus="nats://bus.example", workers=3)


def test_a_held_port_is_shared_by_the_own_processes_alone() -> None:
    """Whoever listens as they do shares it; whoever listens in the ordinary way is refused."""
    with reserve("127.0.0.1", 0) as held:
        port = int(held.getsockname()[1])
        with listen("127.0.0.1", port, shared=True), listen("127.0.0.1", port, shared=True):
            socket.create_connection(("127.0.0.1", port)).close()
            with pytest.raises(Unavailable, match="cannot listen"):
                listen("127.0.0.1", port)


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_on_which_another_program_listens(shared: bool) -> None:
    """It is refused before any process starts, and the error names the port: a second command must not take its requests."""
    with listen("127.0.0.1", 0, shared=shared) as other:
        port = int(other.getsockname()[1])
        with pytest.raises(Unavailable, match=f"port {port}") as caught:
            reserve("127.0.0.1", port)
        assert caught.value.code is Code.PORT_UNAVAILABLE


def test_each_process_gets_the_port_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process with index i listens on the shared port and on `port` + 1 + i, which its URL names."""
    port = free_port(0)
    calls: list[tuple[int, float, int]] = []

    def fork(count: int, stop_seconds: float, shared_port: int) -> int:
        calls.append((count, stop_seconds, shared_port))
        return 2

    monkeypatch.setattr(module, "fork_processes", fork)
    config, shared = split(CoordinatorConfig(**{**vars(CONFIG), "port": port, "drain_seconds": 7}))
    assert (config.port, shared.port) == (port + 3, port)
    assert config.own_url(config.port) == f"http://127.0.0.1:{port + 3}"
    assert calls == [(3, 7 + module.STOP_SECONDS, port)]
    config, shared = split(CoordinatorConfig(**{**vars(CONFIG), "port": 0}))
    assert config.port == 0
    assert shared.port

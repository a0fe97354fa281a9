"""Child processes that prove which port they serve, and ports for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tallystick.cli.local import processes as processes_module
from tallystick.cli.local.processes import ProcessGroup, free_port, still_free
from tallystick.cli.local.services import is_healthy
from tallystick.protocol.errors import Code, Unavailable
from tests.runtime.processes import line, script

ASK = "from tallystick.cli.local.processes import free_port; print(free_port({}), flush=True); input()"
PARENT = """
import asyncio, sys
from pathlib import Path
from tallystick.cli.local.processes import ProcessGroup, free_port

async def main():
    async with ProcessGroup(Path(sys.argv[1]), {}) as processes:
        port = free_port(0)
        async def ready():
            return True
        child = await processes.start("chain", "chain", "--port", str(port), ready=ready, port=port)
        print(child.process.pid)
        await asyncio.sleep(600)

asyncio.run(main())
"""
WAIT_SECONDS = 90


class Impostor(BaseHTTPRequestHandler):
    """Answers every GET as a healthy service does."""

    def do_GET(self) -> None:
        """Says that all is well."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"status": "ok"}')

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Impostor)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[ProcessGroup]:
    """A group of processes, stopped at the end."""
    async with ProcessGroup(tmp_path, {"TALLYSTICK_HOME": str(tmp_path)}) as group:
        yield group


def test_no_port_is_given_twice() -> None:
    """No port is given to two callers, in this or another process, before it is in use; a caller that ends frees its port."""
    first = free_port(0)
    assert free_port(first) != first
    others = [
        subprocess.Popen([sys.executable, "-c", ASK.format(first)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    given = [int(other.stdout.readline()) for other in others if other.stdout is not None]
    assert len({first, *given}) == 3
    for other in others:
        other.communicate("\n")
    assert free_port(given[0]) == given[0]


def test_a_taken_port_is_not_given(taken_port: int) -> None:
    """A port on which any program listens is no free port."""
    assert free_port(taken_port) != taken_port
    assert still_free(taken_port) != taken_port
    assert still_free(free := free_port(0)) == free


@pytest.mark.parametrize(
    ("assigned", "given"),
    [("20002 65535", range(20_000, 20_002)), ("no range", range(20_000, 49_152)), ("20000 65535", range(1, 1 << 16))],
)
def test_a_free_port_is_none_that_the_system_assigns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assigned: str, given: range
) -> None:
    """Else any program's next connection could take it before the child listens. If there is no other, any port will do."""
    (tmp_path / "range").write_text(assigned)
    monkeypatch.setattr(processes_module, "EPHEMERAL_PORTS", tmp_path / "range")
    assert free_port(0) in given


async def test_an_answer_on_a_taken_port_is_not_the_childs(processes: ProcessGroup, taken_port: int) -> None:
    """If another program has the port and answers there, the start fails, and the error names that program."""
    url = f"http://127.0.0.1:{taken_port}/health"
    assert await is_healthy(url)
    with pytest.raises(Unavailable, match=f"chain did not start: process {os.getpid()} .* listens on port") as failed:
        await processes.start("chain", "chain", "--port", str(taken_port), ready=lambda: is_healthy(url), port=taken_port)
    assert failed.value.code is Code.PROCESS_FAILED


async def test_a_child_that_serves_another_port_is_not_ready(processes: ProcessGroup, taken_port: int) -> None:
    """The report names the child's own port; the answer of a program at the expected one does not count."""
    url = f"http://127.0.0.1:{taken_port}/health"
    with pytest.raises(Unavailable, match="chain did not start"):
        await processes.start("chain", "chain", "--port", "0", ready=lambda: is_healthy(url), port=taken_port)


async def test_a_child_that_takes_too_long_is_told_from_one_that_ended(
    processes: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how long it waited."""

    async def never() -> bool:
        return False

    monkeypatch.setattr(processes_module, "READY_SECONDS", 0.2)
    with pytest.raises(Unavailable, match=r"chain did not start within 0\.2 s; the end of its log"):
        await processes.start("chain", "chain", "--port", "0", ready=never)


@pytest.mark.parametrize("command", ["chain", "node demo-engine"])
async def test_a_child_reports_the_port_that_it_serves(processes: ProcessGroup, command: str) -> None:
    """A child that listens where it should is ready."""
    port = free_port(0)
    url = f"http://127.0.0.1:{port}/{'health' if command == 'chain' else 'v1/models'}"
    child = await processes.start("child", *command.split(), "--port", str(port), ready=lambda: is_healthy(url), port=port)
    assert child.process.returncode is None
    assert await is_healthy(url)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_children_end_with_their_parent(tmp_path: Path) -> None:
    """A child does not outlive a parent that was killed, so that no port stays taken."""
    with script(PARENT, str(tmp_path)) as parent:
        child = int(line(parent))
        assert Path(f"/proc/{child}").exists()
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_SECONDS
        while _is_running(child):
            assert time.monotonic() < deadline, "the child runs on"
            time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False

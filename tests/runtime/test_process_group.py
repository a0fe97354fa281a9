"""Several processes of one daemon: started and stopped together, started again alone, on one shared port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.runtime.processes import TIMEOUT_SECONDS, line, script

GROUP = """
import asyncio, os, socket, sys
import structlog
from tallystick.runtime import process_group
from tallystick.runtime.process_group import fork_processes
from tallystick.runtime.serving import SharedPort, serving, wait_for_stop_signal

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
process_group.FIRST_RETRY_SECONDS = 0.01

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # in one piece: several processes write

mode, count = sys.argv[1], int(sys.argv[2])
held = socket.socket()
held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
held.bind(("127.0.0.1", 0))
shared = SharedPort(held.getsockname()[1])
say("parent", os.getpid(), shared.port)
index = fork_processes(count, 30, shared.port)

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})

async def main():
    if mode == "fails" and index == count - 1:
        sys.exit(7)
    if mode == "hangs":
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    async with serving(app, "127.0.0.1", 0, shared=shared):
        signalled = asyncio.create_task(wait_for_stop_signal())
        await asyncio.sleep(0)  # from here on it handles the signal
        say("child", os.getpid(), index)
        await signalled
        shared.leave()
    say("stopped", os.getpid(), index)

asyncio.run(main())
"""


@contextmanager
def _group(mode: str = "serves", count: int = 3) -> Iterator[tuple[subprocess.Popen[str], int, dict[int, int]]]:
    """Runs a group. Yields its parent, the shared port, and the process of each index."""
    with script(GROUP, mode, str(count)) as parent:
        word, pid, port = line(parent).split()
        assert (word, int(pid)) == ("parent", parent.pid)
        children: dict[int, int] = {}
        try:
            while mode != "fails" and len(children) < count:
                children.update(_child(parent))
            yield parent, int(port), children
        finally:
            parent.kill()


def _child(parent: subprocess.Popen[str], word: str = "child") -> dict[int, int]:
    printed, pid, index = line(parent).split()
    assert printed == word
    return {int(index): int(pid)}


def _ask(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=TIMEOUT_SECONDS) as answer:  # the test's own server
        return int(answer.read())


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_they_share_a_port_and_stop_together() -> None:
    """Each process serves the shared port; SIGTERM ends all of them in their order, and the parent after them with status 0."""
    with _group() as (parent, port, children):
        assert sorted(children) == [0, 1, 2]
        assert _ask(port) in children.values()
        parent.terminate()
        stopped = [_child(parent, "stopped") for _ in children]
        assert {pid for entry in stopped for pid in entry.values()} == set(children.values())
        assert parent.wait(TIMEOUT_SECONDS) == 0
        assert all(map(_gone, children.values()))
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port))


def test_a_killed_process_is_started_again() -> None:
    """One that dies comes back under the same index, and the others do not notice."""
    with _group() as (parent, port, children):
        for _ in range(2):
            os.kill(children[1], signal.SIGKILL)
            (again,) = _child(parent).items()
            assert again[0] == 1
            assert again[1] not in children.values()
            children[1] = again[1]
        assert _ask(port) in children.values()
        assert not any(map(_gone, children.values()))


def test_a_failed_start_ends_all() -> None:
    """If one cannot start, the others are stopped, and the parent ends with its status."""
    with _group("fails") as (parent, _, _):
        assert parent.wait(TIMEOUT_SECONDS) == 7


def test_they_end_with_their_parent() -> None:
    """A parent that is killed leaves nobody behind."""
    with _group() as (parent, _, children):
        parent.kill()
        parent.wait(TIMEOUT_SECONDS)
        for _ in children:
            _child(parent, "stopped")


def test_a_second_signal_kills() -> None:
    """Processes that do not stop are killed at the second signal, and nothing is left."""
    with _group("hangs") as (parent, _, children):
        parent.terminate()
        while parent.poll() is None:
            parent.terminate()
        assert parent.returncode != 0
        assert all(map(_gone, children.values()))


def test_the_parents_parent_learns_of_the_shared_port() -> None:
    """Once all are ready, the parent reports the shared port as its own; if its own parent ends, all stop."""
    above, inherited = socket.socketpair()
    environment = {"TALLYSTICK_PARENT_SOCKET": str(inherited.fileno())}
    command = [sys.executable, "-c", GROUP, "serves", "2"]
    with subprocess.Popen(
        command, env=os.environ | environment, pass_fds=[inherited.fileno()], stdout=subprocess.PIPE, text=True
    ) as parent:
        inherited.close()
        above.settimeout(TIMEOUT_SECONDS)
        port = int(line(parent).split()[2])
        report = above.recv(200)
        assert f'"pid": {parent.pid}, "port": {port}' in report.decode()
        above.close()
        assert parent.wait(TIMEOUT_SECONDS) == 0

"""The report of a child process to its parent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from tallystick.runtime.supervision import PARENT_SOCKET_ENV, parse_report
from tests.runtime.processes import TIMEOUT_SECONDS
from tests.runtime.test_serving import LOOPBACK

CHILD = """
import asyncio, os, sys
from tallystick.runtime.supervision import attach_to_parent, PARENT_SOCKET_ENV
from tallystick.runtime.serving import serving, wait_for_stop_signal

async def app(scope, receive, send):
    pass

async def main():
    attach_to_parent()
    assert PARENT_SOCKET_ENV not in os.environ
    async with serving(app, "127.0.0.1", 0):
        await wait_for_stop_signal()

asyncio.run(main())
"""


def test_a_child_reports_and_ends_with_its_parents_socket() -> None:
    """The child's report has its process id and the port that it serves; closing the parent's end stops the child."""
    parent, inherited = socket.socketpair()
    environment = os.environ | {PARENT_SOCKET_ENV: str(inherited.fileno())}
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=environment, pass_fds=[inherited.fileno()])
    inherited.close()
    parent.settimeout(TIMEOUT_SECONDS)
    pid, port = parse_report(parent.recv(200)) or (0, 0)
    assert pid == child.pid
    socket.create_connection((LOOPBACK, port)).close()
    parent.close()
    assert child.wait(TIMEOUT_SECONDS) in {0, -signal.SIGTERM}, "it may not handle the signal yet"


@pytest.mark.parametrize("report", [b"", b"ready", b"[1, 2]", b"{}", b'{"pid": 1}', b'{"pid": "a", "port": 2}', b"\xff"])
def test_a_malformed_report_is_none(report: bytes) -> None:
    """Whatever is no report gives None."""
    assert parse_report(report) is None


def test_a_report_is_read() -> None:
    """A report has a process id and a port."""
    assert parse_report(json.dumps({"pid": 3, "port": 4}).encode()) == (3, 4)
